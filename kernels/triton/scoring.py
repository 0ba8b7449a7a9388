"""Posterior scoring: log-likelihoods of images under every class, and their streaming update.

With residual r = a_s x + b_s x_t + c_s o over the D elements of a row (image i, class k, step s),
see `genrep_fast.reference.scoring`:

    l[i, k, s] = sum(-v_s r^2 / 2 + n_s)
    L[i, k] = logsumexp_s l - log S  or  mean_s l

Reads the B K S D elements of o once and does 6 FLOPs for each (8 with x_t): memory bounds it,
unless a batch shares its centres o [K, S, D]. Then a tile of images meets every centre that is
read, and the residuals of a tile, computed one by one, bound it.

A program has a tile of residuals [PAIRS, STEPS, BLOCK]. One kernel serves the three kinds of tile
(`genrep_fast.kernels.scoring_chunk`), which differ in how a program finds its rows, and bears the
kind in its name: csrc has files of their own for "locations" and "shared_centers", whose loops
differ there. A program takes a group of steps in its turn and keeps a state of its own for them.
The states of the groups are merged in their order.

Squares are added up in float32 over runs of at most 8 elements that do not depend on the tile, and
these sums in float64. So backward finds every l as forward had it, up to a rounding of float64, and
the weights exp(l - L) add up to 1 however large L is. The exponentials of one tile are float32's;
whatever scales a state again and again is float64.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from .residuals import (
    Pairs,
    exact_sizes,
    factors_of,
    log_likelihoods,
    pairs_of_program,
    steps_from,
    tile_rows,
    views_of,
)
from .scoring_chunk import INTEGERS, POINTERS, Chunk, chunk_of
from .states import (
    empty_state,
    load_partial,
    log_likelihood_of,
    merge_states,
    state_of,
    store_partial,
    update_state,
)


def log_likelihood(
    x: Tensor,
    model_output: Tensor,
    x_t: Tensor | None,
    tables: Tensor,
    reduction: str,
    per_location: bool,
) -> tuple[Tensor, Tensor]:
    """L and what rounding took from it, float32 [B, K, *loc] each; see the reference."""
    chunk = chunk_of(x, model_output, x_t, tables, per_location)
    shape = (chunk.batch, chunk.classes, *(x.shape[2:] if per_location else ()))
    likelihood = x.new_empty(shape, dtype=torch.float32)
    remainder = torch.empty_like(likelihood) if reduction == "mixture" else likelihood.new_empty(0)
    _score(chunk, reduction, "log_likelihood", (likelihood, remainder), chunk.classes)
    return likelihood, remainder


def score_update(
    x: Tensor,
    model_output: Tensor,
    x_t: Tensor | None,
    tables: Tensor,
    classes: Tensor | None,
    reduction: str,
    per_location: bool,
    count: Tensor,
    state: Tensor,
) -> None:
    """Add a chunk to `count` and `state` in place; see the reference."""
    chunk = chunk_of(x, model_output, x_t, tables, per_location)
    if not (count.is_contiguous() and state.is_contiguous()):
        raise ValueError(
            f"count and state must be contiguous, got strides {count.stride()} and {state.stride()}"
        )
    results = (count, state, None if classes is None else classes.contiguous())
    _score(chunk, reduction, "score_update", results, len(count))
    if classes is None:
        count += chunk.steps
    else:
        count.index_copy_(0, classes, count.index_select(0, classes) + chunk.steps)


def _score(
    chunk: Chunk, reduction: str, operator: str, results: tuple[Tensor | None, ...], columns: int
) -> None:
    """Reduce the chunk's steps and write the operator's `results`, of `columns` classes."""
    tile = chunk.tile(backward=False)
    split = chunk.split(tile)
    if split.programs == 0:
        return
    rows = chunk.rows()
    plane = rows // chunk.classes * columns
    options = {"MIXTURE": reduction == "mixture", "OPERATOR": operator}
    with torch.cuda.device_of(chunk.x):
        partials = None
        if split.groups > 1:
            partials = chunk.x.new_empty(split.groups, 3, rows, dtype=torch.float64)
        score_kernel[(split.programs * split.groups,)](
            *chunk.arguments(),
            *(chunk.pairs(), split.group_size, columns, plane, rows),
            partials,
            results,
            TILE=tile,
            **options,
            num_warps=tile.num_warps,
        )
        if partials is not None:
            sizes = (rows, split.groups, chunk.classes, chunk.steps, columns, plane)
            merge_kernel[(triton.cdiv(rows, 32),)](
                partials, results, *sizes, **options, BLOCK=32, num_warps=1
            )


def _score_name(specialization: Any) -> str:
    constants = specialization.constants
    return f"{constants['OPERATOR']}_{constants['TILE'].kind}_kernel"


def _merge_name(specialization: Any) -> str:
    return f"{specialization.constants['OPERATOR']}_merge_kernel"


# A line a tensor, with its strides.
@triton.jit(
    repr=_score_name,
    do_not_specialize=[*INTEGERS, "pairs", "group_size", "columns", "plane", "num_rows"],
    do_not_specialize_on_alignment=[*POINTERS, "partials_ptr"],
)
def score_kernel(
    x_ptr, x_batch: tl.int64, x_outer: tl.int64, x_inner: tl.int64,
    model_output_ptr, output_batch: tl.int64, output_class: tl.int64, output_step: tl.int64,
    output_outer: tl.int64, output_inner: tl.int64,
    x_t_ptr, noisy_batch: tl.int64, noisy_class: tl.int64, noisy_step: tl.int64,
    noisy_outer: tl.int64, noisy_inner: tl.int64,
    tables_ptr, table_stride: tl.int32,
    classes: tl.int64, steps: tl.int32, elements: tl.int32, inner_size: tl.int32,
    pairs: tl.int64, group_size: tl.int32, columns: tl.int64, plane: tl.int64, num_rows: tl.int64,
    partials_ptr, results,
    MIXTURE: tl.constexpr, OPERATOR: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """State of one group of steps of a tile of pairs.

    Goes into partials [groups, 3, rows], or where it is the only group into `results`.
    """
    PAIRS: tl.constexpr = TILE.pairs
    views = views_of(
        (x_ptr, x_batch, 0, 0, x_outer, x_inner),
        (model_output_ptr, output_batch, output_class, output_step, output_outer, output_inner),
        (x_t_ptr, noisy_batch, noisy_class, noisy_step, noisy_outer, noisy_inner),
        TILE,
    )
    num_pairs, elements = exact_sizes(pairs, elements, TILE)
    pairs, group = pairs_of_program(num_pairs, classes, TILE)
    state = empty_state(PAIRS, MIXTURE)
    first = (group * group_size).to(tl.int32)
    end = tl.minimum(first + group_size, steps)
    while first < end:
        tile_steps = steps_from(first, steps, TILE)
        rows = tile_rows(views, pairs, tile_steps, TILE)
        factors = factors_of(tables_ptr, table_stride, tile_steps)
        step_scores = log_likelihoods(rows, factors, elements, inner_size, TILE)
        new_state = state_of(step_scores, tile_steps.mask[None, :], MIXTURE)
        state = merge_states(state, new_state, MIXTURE)
        first += TILE.steps
    if partials_ptr is not None:
        row = pairs.image * classes + pairs.class_
        store_partial(state, partials_ptr, group, row, pairs.mask, num_rows)
    else:
        locations = inner_size if TILE.kind == "locations" else 1
        _write_results(state, results, pairs, locations, steps, columns, plane, MIXTURE, OPERATOR)


@triton.jit(
    repr=_merge_name,
    do_not_specialize=["num_rows", "groups", "classes", "steps", "columns", "plane"],
    do_not_specialize_on_alignment=["partials_ptr"],
)
def merge_kernel(
    partials_ptr,
    results,
    num_rows: tl.int64,
    groups: tl.int32,
    classes: tl.int64,
    steps: tl.int32,
    columns: tl.int64,
    plane: tl.int64,
    MIXTURE: tl.constexpr,
    OPERATOR: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the states of all groups in their order, and write `results`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < num_rows
    state = empty_state(BLOCK, MIXTURE)
    group = 0
    while group < groups:
        partial = load_partial(partials_ptr, group, row, mask, num_rows)
        state = merge_states(state, partial, MIXTURE)
        group += 1
    pairs = Pairs(row // classes, row % classes, 0, mask)
    _write_results(state, results, pairs, 1, steps, columns, plane, MIXTURE, OPERATOR)


@triton.jit
def _write_results(
    state,
    results,
    pairs,
    locations,
    steps,
    columns,
    plane,
    MIXTURE: tl.constexpr,
    OPERATOR: tl.constexpr,
):
    """Write L and its remainder [plane], or merge into an accumulation's state [3 or 2, plane].

    plane: image, column, location.
    """
    if OPERATOR == "log_likelihood":
        row = (pairs.image * columns + pairs.class_) * locations + pairs.location
        exact = log_likelihood_of(state, steps, MIXTURE)
        likelihood = exact.to(tl.float32)
        tl.store(results[0] + row, likelihood, mask=pairs.mask)
        if MIXTURE:
            is_infinite = tl.abs(likelihood) == float("inf")
            remainder = tl.where(is_infinite, 0.0, exact - likelihood.to(tl.float64))
            tl.store(results[1] + row, remainder.to(tl.float32), mask=pairs.mask)
    else:
        count_ptr, state_ptr, classes_ptr = results
        column = pairs.class_ if classes_ptr is None else tl.load(classes_ptr + pairs.class_)
        # The caller's assertion about the others comes later.
        inside = (column >= 0) & (column < columns)
        column, mask = tl.where(inside, column, 0), pairs.mask & inside
        row = (pairs.image * columns + column) * locations + pairs.location
        update_state(state, count_ptr, state_ptr, column, row, mask, plane, MIXTURE)
