"""Gradient alignment: Gram matrices, GenRep's coefficients, and the combination of the gradients.

For n gradients of N elements, see `genrep_fast.reference.alignment`:

    gram[i, j] = sum_k gradients_i[k] gradients_j[k]
    out[k] = sum_i c_i gradients_i[k],    c from the Gram matrix

gram reads nN elements and does n(n+1)N FLOPs; combine reads nN, writes N, and does 2nN FLOPs:
memory bounds both. gram works in float64: products of float32 numbers are exact in it and never
overflow, and where the float64 rate is half of float32's (A100, H100) it hides behind the reads. Of
a pair of float32 gradients, a multiprocessor of an H100 reads an element each in 0.55 clocks,
converts them in 0.13 (16 a clock) and multiplies and adds in 0.05 (64 a clock).

Sums have a fixed order: every chunk writes its own to a slot, and a second kernel adds up the slots
of each group.

Between the two stand a few numbers a tensor and a group: sums of the tensors' own Gram matrices,
coefficients, the choice of a tensor's.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .multi_tensor import CHUNK, by_loss, chunk_pointers, group_tables, locate, plan


def gram(gradients: list[Tensor | None], n: int, groups: list[int], num_groups: int) -> Tensor:
    """Gram matrices [num_groups, n, n] float64 of n losses' gradients; see the reference."""
    sample = next(gradient for gradient in gradients if gradient is not None)
    matrices = sample.new_empty(num_groups, n, n, dtype=torch.float64)
    if num_groups == 0:
        return matrices
    with torch.cuda.device_of(sample):
        tables = plan(by_loss(gradients, len(groups)), groups, num_groups, sample.device)
        partials = sample.new_empty(tables.slots, n * (n + 1) // 2, dtype=torch.float64)
        for chunks, dtypes, _ in tables.launches:
            alignment_gram_kernel[(len(chunks),)](
                chunks, tables.rows, partials, dtypes, CHUNK, LANES=256, num_warps=8
            )
        alignment_gram_sums_kernel[(num_groups, n, n)](
            partials, tables.bounds, matrices, n, BLOCK=1024
        )
    return matrices


def group_gram(grams: Tensor, groups: list[int], num_groups: int) -> Tensor:
    """Gram matrices [num_groups, n, n] of groups from the tensors' [T, n, n]; see the reference."""
    n = grams.shape[1]
    matrices = grams.new_empty(num_groups, n, n)
    if num_groups > 0:
        with torch.cuda.device_of(grams):
            tables = group_tables(groups, num_groups, grams.device)
            entries = triton.next_power_of_2(n * n)
            alignment_group_gram_kernel[(num_groups,)](
                grams.contiguous(),
                tables.members,
                tables.bounds,
                matrices,
                n,
                BLOCK=2048 // entries,
                ENTRIES=entries,
            )
    return matrices


def tensor_coefficients(
    coefficients: Tensor,
    grams: Tensor,
    groups: list[int],
    weights: list[float],
) -> Tensor:
    """Coefficients [T, n] of tensors from those of groups [G, n]; see the reference."""
    num_tensors, n = grams.shape[:2]
    rows = coefficients.new_empty(num_tensors, n)
    if num_tensors > 0:
        with torch.cuda.device_of(grams):
            tables = group_tables(groups, len(coefficients), grams.device)
            eight_weights = (*weights, *[0.0] * (8 - n))
            grid = (triton.cdiv(num_tensors, 64),)
            alignment_tensor_coefficients_kernel[grid](
                coefficients.contiguous(),
                grams.contiguous(),
                tables.groups,
                rows,
                num_tensors,
                *eight_weights,
                n,
                BLOCK=64,
                num_warps=2,
            )
    return rows


def alignment_coefficients(
    gram: Tensor, weights: list[float], power: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Coefficients [G, 2], cosine and alpha [G], float64, of gram [G, 2, 2]; see the reference."""
    num_groups = len(gram)
    coefficients = gram.new_empty(num_groups, 2)
    cosine = gram.new_empty(num_groups)
    alpha = gram.new_empty(num_groups)
    if num_groups > 0:
        with torch.cuda.device_of(gram):
            grid = (triton.cdiv(num_groups, 64),)
            alignment_coefficients_kernel[grid](
                gram.contiguous(),
                coefficients,
                cosine,
                alpha,
                num_groups,
                *weights,
                power,
                BLOCK=64,
                num_warps=2,
            )
    return coefficients, cosine, alpha


def combine(
    gradients: list[Tensor | None],
    coefficients: Tensor,
    groups: list[int],
    weights: list[float],
    out: list[Tensor],
) -> None:
    """Write sum_i c_i gradients_i into ``out[t]``, maybe one of its inputs; see the reference."""
    by_list = by_loss(gradients, len(groups))
    with torch.cuda.device_of(coefficients):
        tables = plan([*by_list, out], groups, len(coefficients), coefficients.device)
        coefficients = coefficients.contiguous()
        # There are none where no tensor needs them.
        weights = tuple(weights) or (0.0,) * len(by_list)
        for chunks, dtypes, aligned in tables.launches:
            alignment_combine_kernel[(len(chunks),)](
                chunks,
                tables.rows,
                coefficients,
                weights,
                dtypes,
                aligned,
                CHUNK,
                BLOCK=2048,
                num_warps=8,
            )


@triton.jit
def combined(pointers, offsets, mask, row_weights, N: tl.constexpr, DTYPES: tl.constexpr):
    """sum_i row_weights_i gradients_i in float32, over the first N pointers that are there."""
    total = tl.zeros(offsets.shape, tl.float32)
    for i in tl.static_range(N):
        if DTYPES[i] is not None:
            total += row_weights[i] * tl.load(pointers[i] + offsets, mask=mask).to(tl.float32)
    return total


@triton.jit
def weights_of_group(group, coefficients_ptr, weights, N: tl.constexpr):
    """The group's row of coefficients, or `weights` for group -1, in float32."""
    row_weights = ()
    for i in tl.static_range(N):
        coefficient = tl.load(coefficients_ptr + group * N + i, mask=group >= 0, other=0.0).to(
            tl.float32
        )
        row_weights = row_weights + (tl.where(group >= 0, coefficient, weights[i]),)
    return row_weights


@triton.jit(do_not_specialize_on_alignment=["chunks_ptr", "rows_ptr", "partials_ptr"])
def alignment_gram_kernel(
    chunks_ptr,
    rows_ptr,
    partials_ptr,
    DTYPES: tl.constexpr,
    CHUNK: tl.constexpr,
    LANES: tl.constexpr,
):
    """partials[slot, pair] float64: inner products of the pairs i <= j over one chunk."""
    N: tl.constexpr = len(DTYPES)
    PAIRS: tl.constexpr = N * (N + 1) // 2
    row_ptr, _, chunk = locate(chunks_ptr, rows_ptr, N, CHUNK)
    # Never as aligned: another layout would add up in another order, and the same gradients would
    # give other bits at other addresses.
    pointers, count = chunk_pointers(row_ptr, chunk * CHUNK, DTYPES, False)
    # Neighbours are neighbouring threads, and a thread adds up its four columns by itself: one
    # number a pair stays in its registers.
    lanes = tl.arange(0, LANES)[:, None] + LANES * tl.arange(0, 4)[None, :]  # [LANES, 4]
    sums = ()
    for _ in tl.static_range(PAIRS):
        sums = sums + (tl.zeros([LANES], tl.float64),)
    for offset in range(0, CHUNK, 4 * LANES):
        offsets = offset + lanes
        values = ()
        for i in tl.static_range(N):
            if DTYPES[i] is None:
                values = values + (0,)
            else:
                values = values + (
                    tl.load(pointers[i] + offsets, mask=offsets < count, other=0.0).to(tl.float64),
                )
        new_sums = ()
        for i in tl.static_range(N):
            for j in tl.static_range(i, N):
                if DTYPES[i] is None or DTYPES[j] is None:
                    new_sums = new_sums + (sums[len(new_sums)],)
                else:
                    new_sums = new_sums + (
                        sums[len(new_sums)] + tl.sum(values[i] * values[j], axis=1),
                    )
        sums = new_sums
    partial_ptr = partials_ptr + (tl.load(row_ptr + N + 2) + chunk) * PAIRS
    for pair in tl.static_range(PAIRS):
        tl.store(partial_ptr + pair, tl.sum(sums[pair]))


@triton.jit(do_not_specialize_on_alignment=["partials_ptr", "bounds_ptr", "gram_ptr"])
def alignment_gram_sums_kernel(
    partials_ptr, bounds_ptr, gram_ptr, N: tl.constexpr, BLOCK: tl.constexpr
):
    """gram[group, i, j]: sum of the group's slots of partials for the pair i, j."""
    group, i, j = tl.program_id(0).to(tl.int64), tl.program_id(1), tl.program_id(2)
    low, high = tl.minimum(i, j), tl.maximum(i, j)
    pair = low * (2 * N - low - 1) // 2 + high  # of the pairs i <= j, row by row
    position = tl.load(bounds_ptr + group)
    end = tl.load(bounds_ptr + group + 1)
    total = tl.zeros([BLOCK], tl.float64)
    while position < end:
        slots = position + tl.arange(0, BLOCK)
        total += tl.load(
            partials_ptr + slots * (N * (N + 1) // 2) + pair, mask=slots < end, other=0.0
        )
        position += BLOCK
    tl.store(gram_ptr + (group * N + i) * N + j, tl.sum(total))


@triton.jit
def every_loss_reaches(matrix_ptr, mask, N: tl.constexpr):
    """Whether no gradient of a tensor is zero everywhere, from its own Gram matrix [N, N].

    A NaN is not zero.
    """
    reached = mask
    for i in tl.static_range(N):
        reached = reached & (tl.load(matrix_ptr + i * (N + 1), mask=mask, other=0.0) != 0)
    return reached


@triton.jit(
    do_not_specialize_on_alignment=["grams_ptr", "members_ptr", "bounds_ptr", "matrices_ptr"]
)
def alignment_group_gram_kernel(
    grams_ptr,
    members_ptr,
    bounds_ptr,
    matrices_ptr,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
    ENTRIES: tl.constexpr,
):
    """matrices[group]: sum of grams[t] over the members t that every loss reaches."""
    group = tl.program_id(0).to(tl.int64)
    entries = tl.arange(0, ENTRIES)[None, :]  # of a matrix, row by row
    position = tl.load(bounds_ptr + group)
    end = tl.load(bounds_ptr + group + 1)
    total = tl.zeros([BLOCK, ENTRIES], tl.float64)
    while position < end:
        places = position + tl.arange(0, BLOCK)
        members = tl.load(members_ptr + places, mask=places < end, other=0)
        reached = every_loss_reaches(grams_ptr + members * (N * N), places < end, N)
        mask = reached[:, None] & (entries < N * N)
        total += tl.load(grams_ptr + members[:, None] * (N * N) + entries, mask=mask, other=0.0)
        position += BLOCK
    matrix_ptrs = matrices_ptr + group * (N * N) + tl.arange(0, ENTRIES)
    tl.store(matrix_ptrs, tl.sum(total, axis=0), mask=tl.arange(0, ENTRIES) < N * N)


@triton.jit(
    do_not_specialize=["num_tensors"],
    do_not_specialize_on_alignment=["coefficients_ptr", "grams_ptr", "groups_ptr", "rows_ptr"],
)
def alignment_tensor_coefficients_kernel(
    coefficients_ptr,
    grams_ptr,
    groups_ptr,
    rows_ptr,
    num_tensors: tl.int64,
    weight_0: tl.float64,
    weight_1: tl.float64,
    weight_2: tl.float64,
    weight_3: tl.float64,
    weight_4: tl.float64,
    weight_5: tl.float64,
    weight_6: tl.float64,
    weight_7: tl.float64,
    N: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """rows[t]: coefficients of its group where every loss reaches t, else the weights.

    The weights are parameters of their own, as a tuple of numbers arrives in float32.
    """
    weights = (weight_0, weight_1, weight_2, weight_3, weight_4, weight_5, weight_6, weight_7)
    tensors = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = tensors < num_tensors
    groups = tl.load(groups_ptr + tensors, mask=mask, other=-1)
    shared = every_loss_reaches(grams_ptr + tensors * (N * N), groups >= 0, N)
    for i in tl.static_range(N):
        coefficients = tl.load(coefficients_ptr + groups * N + i, mask=shared, other=0.0)
        tl.store(rows_ptr + tensors * N + i, tl.where(shared, coefficients, weights[i]), mask=mask)


@triton.jit(
    do_not_specialize=["num_groups"],
    do_not_specialize_on_alignment=["gram_ptr", "coefficients_ptr", "cosine_ptr", "alpha_ptr"],
)
def alignment_coefficients_kernel(
    gram_ptr,
    coefficients_ptr,
    cosine_ptr,
    alpha_ptr,
    num_groups: tl.int64,
    first_weight: tl.float64,
    second_weight: tl.float64,
    power: tl.float64,
    BLOCK: tl.constexpr,
):
    """Coefficients, cosine and alpha of BLOCK groups; names and cases as in the reference."""
    groups = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = groups < num_groups
    first = tl.load(gram_ptr + 4 * groups, mask=mask)
    dot = tl.load(gram_ptr + 4 * groups + 1, mask=mask)
    second = tl.load(gram_ptr + 4 * groups + 3, mask=mask)
    has_zero = (first == 0) | (second == 0)
    cosine = tl.where(has_zero, 0.0, dot / tl.sqrt(first) / tl.sqrt(second))
    # A NaN stays.
    cosine = tl.where(cosine < -1, -1.0, cosine)
    cosine = tl.where(cosine > 1, 1.0, cosine)
    alpha = tl.exp2(power * tl.log2((cosine + 1) / 2))
    # Not 0 * log 0.
    alpha = tl.where(power == 0, 1.0, alpha)
    removed_first = (1 - alpha) * tl.where(has_zero, 0.0, dot / first)
    removed_second = (1 - alpha) * tl.where(has_zero, 0.0, dot / second)
    tl.store(coefficients_ptr + 2 * groups, first_weight - second_weight * removed_first, mask=mask)
    tl.store(
        coefficients_ptr + 2 * groups + 1, second_weight - first_weight * removed_second, mask=mask
    )
    tl.store(cosine_ptr + groups, cosine, mask=mask)
    tl.store(alpha_ptr + groups, alpha, mask=mask)


@triton.jit(do_not_specialize_on_alignment=["chunks_ptr", "rows_ptr", "coefficients_ptr"])
def alignment_combine_kernel(
    chunks_ptr,
    rows_ptr,
    coefficients_ptr,
    weights,
    DTYPES: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of out, the last of the lists."""
    N: tl.constexpr = len(DTYPES) - 1
    row_ptr, _, chunk = locate(chunks_ptr, rows_ptr, N + 1, CHUNK)
    pointers, count = chunk_pointers(row_ptr, chunk * CHUNK, DTYPES, ALIGNED)
    row_weights = weights_of_group(tl.load(row_ptr + N + 2), coefficients_ptr, weights, N)
    for offset in range(0, CHUNK, BLOCK):
        offsets = offset + tl.arange(0, BLOCK)
        mask = offsets < count
        total = combined(pointers, offsets, mask, row_weights, N, DTYPES)
        tl.store(pointers[N] + offsets, total.to(DTYPES[N]), mask=mask)
