"""What the scoring kernels share on the device: a tile's rows, residuals and log-likelihoods.

`TILE` is `genrep_fast.kernels.scoring_chunk.Tile` everywhere. Kernels get integers and pointers as
parameters of their own, and put those that belong together into these tuples.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class View(NamedTuple):
    """A tensor [B, K, S, outer, inner]: pointer and strides."""

    pointer: tl.tensor
    batch: tl.tensor
    class_: tl.tensor
    step: tl.tensor
    outer: tl.tensor
    inner: tl.tensor


class Pairs(NamedTuple):
    """First axis of a tile: image, class and location of its pairs, and which of them exist."""

    image: tl.tensor  # [PAIRS], or a number where all have the same
    class_: tl.tensor
    location: tl.tensor
    mask: tl.tensor  # [PAIRS]


class Steps(NamedTuple):
    """Second axis of a tile."""

    index: tl.tensor  # [STEPS]
    mask: tl.tensor


class Rows(NamedTuple):
    """A tensor's rows in a tile [PAIRS, STEPS, 1], and strides of their elements."""

    pointers: tl.tensor
    mask: tl.tensor
    outer: tl.tensor
    inner: tl.tensor


class Factors(NamedTuple):
    """The tables' numbers of a tile's steps."""

    data: tl.tensor  # [1, STEPS, 1]
    noisy: tl.tensor
    output: tl.tensor
    inv_var: tl.tensor  # [1, STEPS]
    log_norm: tl.tensor


@triton.jit
def views_of(x, output, noisy, TILE: tl.constexpr):
    """Views of x, model_output and, where it is there, x_t; from pointers and strides of each."""
    # A sum of tuples would forget the names of what they hold.
    if noisy[0] is None:
        return view_of(x, TILE), view_of(output, TILE)
    else:
        return view_of(x, TILE), view_of(output, TILE), view_of(noisy, TILE)


@triton.jit
def view_of(tensor, TILE: tl.constexpr):
    """View of a tensor's pointer and strides; that they are multiples of 16, the compiler sees."""
    step, outer = tensor[3], tensor[4]
    if TILE.aligned:
        step = step // 16 * 16
        if TILE.kind == "locations":
            outer = outer // 16 * 16
    return View(tensor[0], tensor[1], tensor[2], step, outer, tensor[5])


@triton.jit
def exact_sizes(pairs, elements, TILE: tl.constexpr):
    """Pairs and elements; that wide loads divide those along a row, the compiler sees."""
    if TILE.aligned:
        if TILE.kind == "locations":
            pairs = pairs // 16 * 16
        else:
            elements = elements // 16 * 16
    return pairs, elements


@triton.jit
def pairs_of_program(pairs, classes, TILE: tl.constexpr):
    """The pairs of the program's tile, and the group of steps."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(pairs, TILE.pairs)
    other = program // tiles
    first = (program % tiles) * TILE.pairs
    index = first + tl.arange(0, TILE.pairs)
    if TILE.kind == "rows":
        return Pairs(index // classes, index % classes, 0, index < pairs), other
    elif TILE.kind == "shared_centers":
        return Pairs(index, other % classes, 0, index < pairs), other // classes
    else:
        return Pairs(other // classes, other % classes, index, index < pairs), 0


@triton.jit
def steps_from(first, steps, TILE: tl.constexpr):
    """A tile's steps from `first` on."""
    index = first + tl.arange(0, TILE.steps)
    return Steps(index, index < steps)


@triton.jit
def tile_rows(views, pairs, steps, TILE: tl.constexpr):
    """Rows of x, model_output and x_t in a tile of pairs and steps."""
    SHARED: tl.constexpr = TILE.kind == "shared_centers"
    x = _rows_of_pairs(views[0], pairs, TILE)
    output = rows_of(views[1], pairs, steps, SHARED, TILE)
    if len(views) == 2:
        return x, output
    else:
        return x, output, rows_of(views[2], pairs, steps, TILE.shares_noisy, TILE)


@triton.jit
def rows_of(view, pairs, steps, SHARED: tl.constexpr, TILE: tl.constexpr):
    """A tensor's rows [PAIRS, STEPS, 1], or [1, STEPS, 1] where images share them."""
    step_mask = steps.mask[None, :, None]
    if SHARED:
        pointer = view.pointer + pairs.class_ * view.class_
        if TILE.aligned:
            pointer = tl.multiple_of(pointer, 16)
        mask = step_mask
    else:
        rows = _rows_of_pairs(view, pairs, TILE)
        pointer, mask = rows.pointers, rows.mask & step_mask
    return Rows(pointer + steps.index[None, :, None] * view.step, mask, view.outer, view.inner)


@triton.jit
def _rows_of_pairs(view, pairs, TILE: tl.constexpr):
    """A tensor's rows of the first step, [PAIRS, 1, 1]."""
    offsets = pairs.image * view.batch + pairs.class_ * view.class_
    if TILE.kind == "locations":
        offsets += pairs.location if TILE.flat else pairs.location * view.inner
    pointers = view.pointer + offsets
    if TILE.aligned:
        pointers = tl.multiple_of(pointers, 16)
    return Rows(pointers[:, None, None], pairs.mask[:, None, None], view.outer, view.inner)


@triton.jit
def element_offsets(rows, e, inner_size, TILE: tl.constexpr):
    """Places of elements `e` of a row; of channels, where locations are rows."""
    if TILE.kind == "locations":
        return e * rows.outer
    elif TILE.flat:
        return e
    else:
        return (e // inner_size) * rows.outer + (e % inner_size) * rows.inner


@triton.jit
def factors_of(tables_ptr, table_stride, steps):
    """The tables' numbers of a tile's steps."""
    values = ()
    for i in tl.static_range(5):
        # Places in 32 bits: a pointer a row would cost thirty registers.
        pointers = tables_ptr + (i * table_stride + steps.index)
        values = values + (tl.load(pointers, mask=steps.mask, other=0.0),)
    return Factors(
        values[0][None, :, None],
        values[1][None, :, None],
        values[2][None, :, None],
        values[3][None, :],
        values[4][None, :],
    )


@triton.jit
def residual(pointers, masks, factors):
    """a x + b x_t + c o in float32, rounded the same way in every kernel."""
    r = factors.data * tl.load(pointers[0], mask=masks[0], other=0.0).to(tl.float32)
    r = tl.fma(factors.output, tl.load(pointers[1], mask=masks[1], other=0.0).to(tl.float32), r)
    if len(pointers) == 3:
        r = tl.fma(factors.noisy, tl.load(pointers[2], mask=masks[2], other=0.0).to(tl.float32), r)
    return r


@triton.jit
def residuals_from(first, rows, factors, elements, inner_size, TILE: tl.constexpr):
    """r of a block of elements from `first` on, [PAIRS, STEPS, BLOCK]; 0 where there is none."""
    e = (first + tl.arange(0, TILE.block))[None, None, :]
    pointers, masks = (), ()
    for i in tl.static_range(len(rows)):
        pointers = pointers + (rows[i].pointers + element_offsets(rows[i], e, inner_size, TILE),)
        masks = masks + (rows[i].mask & (e < elements),)
    return residual(pointers, masks, factors)


@triton.jit
def log_likelihoods(rows, factors, elements, inner_size, TILE: tl.constexpr):
    """l in float64 [PAIRS, STEPS]."""
    PAIRS: tl.constexpr = TILE.pairs
    STEPS: tl.constexpr = TILE.steps
    BLOCK: tl.constexpr = TILE.block
    total = tl.zeros([PAIRS, STEPS], tl.float64)
    start = 0
    while start < elements:
        if TILE.run == 1:
            r = residuals_from(start, rows, factors, elements, inner_size, TILE)
            squares = r * r
        else:
            squares = tl.zeros([PAIRS, STEPS, BLOCK], tl.float32)
            first = start
            while first < tl.minimum(start + BLOCK * TILE.run, elements):
                r = residuals_from(first, rows, factors, elements, inner_size, TILE)
                squares = tl.fma(r, r, squares)
                first += BLOCK
        total += tl.sum(squares.to(tl.float64), axis=2)
        start += BLOCK * TILE.run
    half = -0.5 * factors.inv_var.to(tl.float64)
    return half * total + elements * factors.log_norm.to(tl.float64)
