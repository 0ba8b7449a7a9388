"""Gradients of log-likelihoods, see `genrep_fast.kernels.scoring` and its reference.

    dL/do = -v_s c_s r softmax_s(l),    dL/dx and dL/dx_t likewise, summed over what shares them

`rows_kernel` reads a row twice, of which the second time comes from a cache, and writes it. A
gradient that sums over images, classes or steps needs beside it the scale dl/dr = -scale r of every
row, 1/D of what is read, and `sums_kernel` reads its terms once more. With `per_location` scales
would be 1/C of what is read, and are computed again instead.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .residuals import (
    Factors,
    Rows,
    element_offsets,
    exact_sizes,
    factors_of,
    log_likelihoods,
    pairs_of_program,
    residual,
    residuals_from,
    rows_of,
    steps_from,
    tile_rows,
    view_of,
    views_of,
)
from .scoring_chunk import (
    ALIGNMENT,
    INTEGERS,
    POINTERS,
    RUN,
    Chunk,
    Strides,
    Tile,
    chunk_of,
    five_axes,
    strides_of,
)

_GRAD_POINTERS = ["grad_ptr", "likelihood_ptr", "remainder_ptr", "scales_ptr", "target_ptr"]
# Rows of the tables that have the factors of x, model_output and x_t.
_TABLES = (0, 2, 1)
# Elements by terms; where scales are computed again each element is a location, of any strides.
_SUMS = Tile("locations", False, False, False, 64, 16, 1, RUN, num_warps=8)
_SINGLE_TERMS = Tile("locations", False, False, False, 512, 1, 1, RUN, num_warps=8)
_TARGET_STRIDES = ["target_batch", "target_class", "target_step", "target_outer", "target_inner"]


class Likelihoods(NamedTuple):
    """What backward gets of each likelihood, [B, K, *loc] each; remainder [0] for "mean"."""

    grad: Tensor
    likelihood: Tensor
    remainder: Tensor


def log_likelihood_backward(
    grad: Tensor,
    log_likelihood: Tensor,
    remainder: Tensor,
    x: Tensor,
    model_output: Tensor,
    x_t: Tensor | None,
    tables: Tensor,
    reduction: str,
    per_location: bool,
    output_mask: list[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, model_output and x_t; empty where `output_mask` is False.

    See the reference.
    """
    chunk = chunk_of(x, model_output, x_t, tables, per_location)
    gradients = [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device) if needed else x.new_empty(0)
        for tensor, needed in zip((x, model_output, x_t), output_mask, strict=True)
    ]
    # Gradients that are sums, by the position of their tensor; that of x as [B, 1, 1, C, *spatial].
    sums = {i: gradients[i] for i in range(3) if output_mask[i]}
    if 0 in sums:
        sums[0] = sums[0][:, None, None]
    whole_output = None
    if output_mask[1]:
        gradients[1][:, :, :, chunk.channels :] = 0
        if model_output.shape[:2] == (chunk.batch, chunk.classes):
            whole_output = sums.pop(1)
    likelihoods = Likelihoods(
        grad.contiguous(), log_likelihood.contiguous(), remainder.contiguous()
    )
    scales = None
    if sums and not per_location:
        scales = x.new_empty(chunk.rows(), chunk.steps, dtype=torch.float32)
    with torch.cuda.device_of(x):
        if whole_output is not None or scales is not None:
            _write_rows(chunk, reduction, likelihoods, whole_output, scales)
        for i, gradient in sums.items():
            _write_sums(chunk, reduction, likelihoods, scales, gradient, _TABLES[i])
    return tuple(gradients)


def _write_rows(
    chunk: Chunk,
    reduction: str,
    likelihoods: Likelihoods,
    grad_output: Tensor | None,
    scales: Tensor | None,
) -> None:
    """Write the gradient of a model_output that no axis shares, and all scales, where wanted."""
    tile = chunk.tile(backward=True)
    split = chunk.split(tile)
    if split.programs == 0 or chunk.steps == 0:
        return
    strides, grad_flat = Strides(), True
    if grad_output is not None:
        view = five_axes(grad_output, chunk.channels, chunk.locations)
        strides = strides_of(view, chunk.channels_inner)
        grad_flat = chunk.is_flat(strides)
        grad_aligned = all(distance % ALIGNMENT == 0 for distance in chunk.row_distances(strides))
        tile = tile._replace(aligned=tile.aligned and grad_aligned)
    rows_kernel[(split.programs * split.groups,)](
        *chunk.arguments(),
        *(chunk.pairs(), split.group_size),
        *likelihoods,
        scales,
        grad_output,
        *strides,
        MIXTURE=reduction == "mixture",
        TILE=tile,
        GRAD_TILE=tile._replace(flat=grad_flat),
        num_warps=tile.num_warps,
    )


def _write_sums(
    chunk: Chunk,
    reduction: str,
    likelihoods: Likelihoods,
    scales: Tensor | None,
    gradient: Tensor,
    table: int,
) -> None:
    """Write a gradient [1|B, 1|K, 1|S, C, *spatial], summed over axes of size 1.

    `table`: the row that has its input's factor in the residual.
    """
    target = five_axes(gradient, chunk.channels, chunk.locations)
    if target.numel() == 0:
        return
    own, whole = target.shape[:3], (chunk.batch, chunk.classes, chunk.steps)
    terms = math.prod(size for size, one in zip(whole, own, strict=True) if one == 1)
    tile = _SUMS if terms > 1 else _SINGLE_TERMS
    sums_kernel[(triton.cdiv(target.numel(), tile.pairs),)](
        *chunk.arguments(),
        *(chunk.batch, chunk.channels * chunk.locations),
        *likelihoods,
        scales,
        target,
        *strides_of(target, chunk.channels_inner),
        table,
        *own,
        MIXTURE=reduction == "mixture",
        TILE=tile,
        num_warps=tile.num_warps,
    )


def _rows_name(specialization: Any) -> str:
    return f"log_likelihood_backward_{specialization.constants['TILE'].kind}_kernel"


def _sums_name(specialization: Any) -> str:
    return "log_likelihood_backward_sums_kernel"


# A line a tensor, with its strides.
@triton.jit(
    repr=_rows_name,
    do_not_specialize=[*INTEGERS, "pairs", "group_size", *_TARGET_STRIDES],
    do_not_specialize_on_alignment=[*POINTERS, *_GRAD_POINTERS],
)
def rows_kernel(
    x_ptr, x_batch: tl.int64, x_outer: tl.int64, x_inner: tl.int64,
    model_output_ptr, output_batch: tl.int64, output_class: tl.int64, output_step: tl.int64,
    output_outer: tl.int64, output_inner: tl.int64,
    x_t_ptr, noisy_batch: tl.int64, noisy_class: tl.int64, noisy_step: tl.int64,
    noisy_outer: tl.int64, noisy_inner: tl.int64,
    tables_ptr, table_stride: tl.int32,
    classes: tl.int64, steps: tl.int32, elements: tl.int32, inner_size: tl.int32,
    pairs: tl.int64, group_size: tl.int32,
    grad_ptr, likelihood_ptr, remainder_ptr, scales_ptr,
    target_ptr, target_batch: tl.int64, target_class: tl.int64, target_step: tl.int64,
    target_outer: tl.int64, target_inner: tl.int64,
    MIXTURE: tl.constexpr, TILE: tl.constexpr, GRAD_TILE: tl.constexpr,
):  # fmt: skip
    """Of rows of one group of steps: scales [pairs, steps], and gradients of model_output.

    Either is written where its pointer is there.
    """
    views = views_of(
        (x_ptr, x_batch, 0, 0, x_outer, x_inner),
        (model_output_ptr, output_batch, output_class, output_step, output_outer, output_inner),
        (x_t_ptr, noisy_batch, noisy_class, noisy_step, noisy_outer, noisy_inner),
        TILE,
    )
    num_pairs, elements = exact_sizes(pairs, elements, TILE)
    pairs, group = pairs_of_program(num_pairs, classes, TILE)
    locations = inner_size if TILE.kind == "locations" else 1
    row = ((pairs.image * classes + pairs.class_) * locations + pairs.location)[:, None]
    pair_mask = pairs.mask[:, None]
    likelihoods = _load_likelihoods(
        grad_ptr, likelihood_ptr, remainder_ptr, row, pair_mask, MIXTURE
    )
    first = (group * group_size).to(tl.int32)
    end = tl.minimum(first + group_size, steps)
    while first < end:
        tile_steps = steps_from(first, steps, TILE)
        rows = tile_rows(views, pairs, tile_steps, TILE)
        factors = factors_of(tables_ptr, table_stride, tile_steps)
        scale = _scales(
            rows, likelihoods, factors, steps, elements, inner_size, MIXTURE, TILE
        )  # [PAIRS, STEPS]
        if scales_ptr is not None:
            places = row * steps + tile_steps.index[None, :]
            tl.store(scales_ptr + places, scale, mask=pair_mask & tile_steps.mask[None, :])
        if target_ptr is not None:
            target = (
                target_ptr,
                target_batch,
                target_class,
                target_step,
                target_outer,
                target_inner,
            )
            targets = rows_of(view_of(target, TILE), pairs, tile_steps, False, GRAD_TILE)
            _store_gradients(targets, rows, factors, scale, elements, inner_size, TILE, GRAD_TILE)
        first += TILE.steps


@triton.jit
def _store_gradients(
    targets, rows, factors, scale, elements, inner_size, TILE: tl.constexpr, GRAD_TILE: tl.constexpr
):
    """Write the gradients of a tile's rows of model_output, from their scales [PAIRS, STEPS]."""
    scale = scale[:, :, None]
    start = 0
    while start < elements:
        r = residuals_from(start, rows, factors, elements, inner_size, TILE)
        gradient = tl.where(scale == 0, 0.0, scale * r * factors.output)
        e = (start + tl.arange(0, TILE.block))[None, None, :]
        places = targets.pointers + element_offsets(targets, e, inner_size, GRAD_TILE)
        mask = (e < elements) & targets.mask
        tl.store(places, gradient.to(targets.pointers.dtype.element_ty), mask=mask)
        start += TILE.block


@triton.jit(
    repr=_sums_name,
    do_not_specialize=[
        *INTEGERS,
        "batch",
        "row_elements",
        "table",
        *_TARGET_STRIDES,
        "own_batch",
        "own_classes",
        "own_steps",
    ],
    do_not_specialize_on_alignment=[*POINTERS, *_GRAD_POINTERS],
)
def sums_kernel(
    x_ptr, x_batch: tl.int64, x_outer: tl.int64, x_inner: tl.int64,
    model_output_ptr, output_batch: tl.int64, output_class: tl.int64, output_step: tl.int64,
    output_outer: tl.int64, output_inner: tl.int64,
    x_t_ptr, noisy_batch: tl.int64, noisy_class: tl.int64, noisy_step: tl.int64,
    noisy_outer: tl.int64, noisy_inner: tl.int64,
    tables_ptr, table_stride: tl.int32,
    classes: tl.int64, steps: tl.int32, elements: tl.int32, inner_size: tl.int32,
    batch: tl.int64, row_elements: tl.int32,
    grad_ptr, likelihood_ptr, remainder_ptr, scales_ptr,
    target_ptr, target_batch: tl.int64, target_class: tl.int64, target_step: tl.int64,
    target_outer: tl.int64, target_inner: tl.int64,
    table: tl.int64, own_batch: tl.int64, own_classes: tl.int64, own_steps: tl.int64,
    MIXTURE: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Elements of a gradient, each the sum over all images, classes and steps that share it.

    TILE.pairs elements a program, TILE.steps terms at a time. Without `scales_ptr`, where
    likelihoods are of locations, scales are computed here.
    """
    BLOCK: tl.constexpr = TILE.pairs
    TERMS: tl.constexpr = TILE.steps
    views = views_of(
        (x_ptr, x_batch, 0, 0, x_outer, x_inner),
        (model_output_ptr, output_batch, output_class, output_step, output_outer, output_inner),
        (x_t_ptr, noisy_batch, noisy_class, noisy_step, noisy_outer, noisy_inner),
        TILE,
    )
    index = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)[:, None]
    target_row, e = index // row_elements, index % row_elements
    outer, inner = e // inner_size, e % inner_size
    own_step = target_row % own_steps
    own_class = target_row // own_steps % own_classes
    own_image = target_row // own_steps // own_classes
    inside = own_image < own_batch
    # Of an axis that the target has, one place; of another one, all.
    shared_steps = tl.where(own_steps == 1, steps, 1).to(tl.int64)
    shared_classes = tl.where(own_classes == 1, classes, 1)
    terms = tl.where(own_batch == 1, batch, 1) * shared_classes * shared_steps
    total = tl.zeros([BLOCK, TERMS], tl.float64)
    first = 0
    while first < terms:
        term = first + tl.arange(0, TERMS)[None, :]
        step = own_step + term % shared_steps
        class_ = own_class + term // shared_steps % shared_classes
        image = own_image + term // shared_steps // shared_classes
        mask = inside & (term < terms)
        factors = _factors_of_terms(tables_ptr, table_stride, step, mask)
        rows = _rows_of_terms(views, image, class_, step, inner, mask)
        row = image * classes + class_
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + row * steps + step, mask=mask, other=0.0)
        else:
            likelihoods = _load_likelihoods(
                grad_ptr, likelihood_ptr, remainder_ptr, row * inner_size + inner, mask, MIXTURE
            )
            scale = _scales_of_locations(
                rows, likelihoods, factors, steps, elements, inner_size, MIXTURE, TILE
            )
        pointers, masks = (), ()
        for i in tl.static_range(len(rows)):
            pointers = pointers + (rows[i].pointers + outer * rows[i].outer,)
            masks = masks + (mask,)
        r = residual(pointers, masks, factors)
        factor = tl.load(tables_ptr + table * table_stride + step, mask=mask, other=0.0)
        total += tl.where(mask & (scale != 0), scale * r * factor, 0.0).to(tl.float64)
        first += TERMS
    places = (
        own_image * target_batch
        + own_class * target_class
        + own_step * target_step
        + outer * target_outer
        + inner * target_inner
    )
    gradient = tl.sum(total, axis=1)[:, None].to(tl.float32)
    tl.store(target_ptr + places, gradient.to(target_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _factors_of_terms(tables_ptr, table_stride, step, mask):
    """The tables' numbers of terms [BLOCK, TERMS]."""
    values = ()
    for i in tl.static_range(5):
        values = values + (tl.load(tables_ptr + (i * table_stride + step), mask=mask, other=0.0),)
    return Factors(values[0], values[1], values[2], values[3], values[4])


@triton.jit
def _rows_of_terms(views, image, class_, step, inner, mask):
    """Rows of x, model_output and x_t of terms [BLOCK, TERMS], each one location's channels."""
    x = _row_of_terms(views[0], image, class_, step, inner, mask)
    output = _row_of_terms(views[1], image, class_, step, inner, mask)
    if len(views) == 2:
        return x, output
    else:
        return x, output, _row_of_terms(views[2], image, class_, step, inner, mask)


@triton.jit
def _row_of_terms(view, image, class_, step, inner, mask):
    offsets = image * view.batch + class_ * view.class_ + step * view.step + inner * view.inner
    return Rows(view.pointer + offsets, mask, view.outer, view.inner)


@triton.jit
def _scales_of_locations(
    rows,
    likelihoods,
    factors,
    steps,
    elements,
    inner_size,
    MIXTURE: tl.constexpr,
    TILE: tl.constexpr,
):
    """`_scales` of terms [BLOCK, TERMS]: a tile whose rows are the channels of locations."""
    wide = Factors(
        factors.data[:, :, None],
        factors.noisy[:, :, None],
        factors.output[:, :, None],
        factors.inv_var,
        factors.log_norm,
    )
    if len(rows) == 2:
        tile = (_with_elements(rows[0]), _with_elements(rows[1]))
    else:
        tile = (_with_elements(rows[0]), _with_elements(rows[1]), _with_elements(rows[2]))
    return _scales(tile, likelihoods, wide, steps, elements, inner_size, MIXTURE, TILE)


@triton.jit
def _with_elements(rows):
    """Rows [BLOCK, TERMS] with an axis for their elements."""
    return Rows(rows.pointers[:, :, None], rows.mask[:, :, None], rows.outer, rows.inner)


@triton.jit
def _load_likelihoods(grad_ptr, likelihood_ptr, remainder_ptr, places, mask, MIXTURE: tl.constexpr):
    """What backward gets of the likelihoods at `places`."""
    grad = tl.load(grad_ptr + places, mask=mask, other=0.0)
    likelihood = tl.load(likelihood_ptr + places, mask=mask, other=0.0)
    remainder = tl.load(remainder_ptr + places, mask=mask, other=0.0) if MIXTURE else 0.0
    return Likelihoods(grad, likelihood, remainder)


@triton.jit
def _scales(
    rows,
    likelihoods,
    factors,
    steps,
    elements,
    inner_size,
    MIXTURE: tl.constexpr,
    TILE: tl.constexpr,
):
    """dL/dr = scale r of a tile's rows, float32; a step without weight has 0."""
    if MIXTURE:
        step_scores = log_likelihoods(rows, factors, elements, inner_size, TILE)
        # Dividing afterwards keeps what is rounded to float32 small: log S would cost a digit.
        log_weight = step_scores - likelihoods.likelihood.to(tl.float64)
        log_weight -= likelihoods.remainder.to(tl.float64)
        weight = tl.where(
            likelihoods.likelihood == float("-inf"),
            0.0,
            tl.exp(log_weight.to(tl.float32)) / steps.to(tl.float32),
        )
    else:
        weight = 1.0 / steps.to(tl.float32)
    return -factors.inv_var * weight * likelihoods.grad
