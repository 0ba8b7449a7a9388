"""Posterior scoring: log-likelihoods of images under every class, gradients, streaming update.

With residual r = a_s x + b_s x_t + c_s o over the D elements of a row (image i, class k, step s),
see `genrep_fast.reference.scoring`:

    l[i, k, s] = sum(-v_s r^2 / 2 + n_s)
    L[i, k] = logsumexp_s l - log S  or  mean_s l
    dL/do = -v_s c_s r softmax_s(l)

Forward reads the B K S D elements of o once and does 6 FLOPs for each (8 with x_t): memory bounds
it, unless a batch shares its centres o [K, S, D]. Then a tile of images meets every centre that is
read, and the residuals of a tile, computed one by one, bound it. Backward reads a row twice, of
which the second time comes from a cache, and writes it.

A program has a tile of residuals [PAIRS, STEPS, BLOCK]: pairs of image and class ("rows"), images
of one class ("images") or locations of one pair ("locations"), by steps, by elements. It takes a
group of steps in its turn and keeps a state of its own for them: the largest l, the sums of w =
exp(l - largest) and of w^2, or mean, squared deviations and count. The states of the groups are
merged in their order.

Squares are added up in float32 over runs of at most 8 elements that do not depend on the tile, and
these sums in float64. So backward finds every l as forward had it, up to a rounding of float64, and
the weights exp(l - L) add up to 1 however large L is. The exponentials of one tile are float32's;
whatever scales a state again and again is float64.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

_PROGRAMS = 2048  # enough to fill a GPU; steps are split into groups up to there
_GROUP_ELEMENTS = 32768  # the least that is worth a group
_RUN = 8
_SHARING_IMAGES = 4  # images from which on a tile of them pays

_POINTERS = [
    "x_ptr",
    "model_output_ptr",
    "x_t_ptr",
    "data_ptr",
    "noisy_ptr",
    "output_ptr",
    "inv_var_ptr",
    "log_norm_ptr",
]
_STRIDES = [
    *("x_batch", "x_outer", "x_inner"),
    *("output_batch", "output_class", "output_step", "output_outer", "output_inner"),
    *("noisy_batch", "noisy_class", "noisy_step", "noisy_outer", "noisy_inner"),
]
_GRAD_POINTERS = ["grad_ptr", "likelihood_ptr", "remainder_ptr"]
_SIZES = ["classes", "steps", "elements", "inner_size"]
_GRAD_STRIDES = ["grad_batch", "grad_class", "grad_step", "grad_outer", "grad_inner"]


class Tile(NamedTuple):
    """Shape of a program's tile, and the blocks of elements that are added up in float32."""

    pairs: int
    steps: int
    block: int
    run: int
    num_warps: int = 4

    def options(self) -> dict[str, int]:
        """Arguments of a kernel's launch."""
        return {
            "PAIRS": self.pairs,
            "STEPS": self.steps,
            "BLOCK": self.block,
            "RUN": self.run,
            "num_warps": self.num_warps,
        }


class Chunk(NamedTuple):
    """The first arguments of the operators as kernels see them."""

    # x, model_output, x_t [1|B, 1|K, 1|S, C, locations], and the tables [S]
    tensors: tuple[Tensor | None, ...]
    # of x: batch, outer, inner; of model_output, x_t: batch, class, step, outer, inner
    strides: tuple[int, ...]
    batch: int
    classes: int
    steps: int
    channels: int
    locations: int
    elements: int  # of a row
    # elements are outer * inner: in the order of model_output's memory, or channels * locations
    inner_size: int
    channels_inner: bool
    kind: str  # "rows", "images" or "locations"
    flat: bool  # elements, or locations, lie one behind the other
    aligned: bool  # ... and rows are as far apart as wide loads need it

    def pairs(self) -> int:
        """Pairs along the first axis of tiles."""
        return {
            "rows": self.batch * self.classes,
            "images": self.batch,
            "locations": self.locations,
        }[self.kind]

    def rows(self) -> int:
        """Likelihoods that are kept."""
        return self.batch * self.classes * (self.locations if self.kind == "locations" else 1)

    def arguments(self) -> tuple:
        """The leading arguments of the kernels."""
        return (
            *self.tensors,
            *self.strides,
            self.classes,
            self.steps,
            self.elements,
            self.inner_size,
        )

    def shares_noisy(self) -> bool:
        return self.tensors[2] is not None and len(self.tensors[2]) == 1

    def tile(self, backward: bool) -> Tile:
        if self.kind == "images":
            return Tile(8, 8, 32, _RUN, num_warps=8)
        if self.kind == "locations":
            return Tile(128, 8, 1, _RUN, num_warps=8)
        if self.elements <= 128:
            return Tile(16, 4, 16, 1)
        # In backward a cache has to keep the rows of all programs.
        return (
            Tile(1, 1, 1024, 1)
            if backward or self.steps < 4
            else Tile(1, 8, 256, 1)
            if self.aligned
            else Tile(1, 4, 128, 1)
        )

    def split(self, tile: Tile) -> tuple[int, int, int]:
        """Programs of a group, steps of a group, and groups; a function of the shapes alone."""
        others = {"rows": 1, "images": self.classes, "locations": self.batch * self.classes}[
            self.kind
        ]
        programs = triton.cdiv(self.pairs(), tile.pairs) * others
        if self.kind == "locations" or programs == 0:
            return programs, self.steps, 1
        least = max(tile.steps, _GROUP_ELEMENTS // (tile.pairs * max(self.elements, 1)))
        groups = max(1, min(triton.cdiv(self.steps, least), triton.cdiv(_PROGRAMS, programs)))
        size = max(1, triton.cdiv(triton.cdiv(self.steps, groups), tile.steps)) * tile.steps
        return programs, size, max(1, triton.cdiv(self.steps, size))


def log_likelihood(
    x: Tensor,
    model_output: Tensor,
    x_t: Tensor | None,
    tables: Tensor,
    reduction: str,
    per_location: bool,
) -> tuple[Tensor, Tensor]:
    """L and what rounding took from it, float32 [B, K, *loc] each; see the reference."""
    chunk = _chunk(x, model_output, x_t, tables.unbind(), per_location)
    likelihood = x.new_empty(
        chunk.batch, chunk.classes, *(x.shape[2:] if per_location else ()), dtype=torch.float32
    )
    remainder = torch.empty_like(likelihood) if reduction == "mixture" else likelihood.new_empty(0)
    _score(chunk, reduction, "likelihood", (likelihood, remainder), chunk.classes)
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
    chunk = _chunk(x, model_output, x_t, tables.unbind(), per_location)
    if not (count.is_contiguous() and state.is_contiguous()):
        raise ValueError(
            f"count and state must be contiguous, got strides {count.stride()} and {state.stride()}"
        )
    _score(
        chunk,
        reduction,
        "state",
        (count, state, None if classes is None else classes.contiguous()),
        len(count),
    )
    if classes is None:
        count += chunk.steps
    else:
        count.index_copy_(0, classes, count.index_select(0, classes) + chunk.steps)


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
    """Gradients of x, model_output and x_t; empty where `output_mask` is False; see the reference.

    A gradient that sums over images, classes or steps needs beside it the scale dl/dr = -scale r of
    every row, 1/D of what is read. With `per_location` that would be 1/C of it, and scales are
    computed again instead.
    """
    chunk = _chunk(x, model_output, x_t, tables.unbind(), per_location)
    gradients = [
        torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device) if needed else x.new_empty(0)
        for tensor, needed in zip((x, model_output, x_t), output_mask, strict=True)
    ]
    targets = [
        gradients[0][:, None, None] if output_mask[0] else None,
        *(gradients[i] if output_mask[i] else None for i in (1, 2)),
    ]
    whole_output = None
    if output_mask[1]:
        gradients[1][:, :, :, chunk.channels :] = 0
        if model_output.shape[:2] == (chunk.batch, chunk.classes):
            whole_output, targets[1] = targets[1], None
    likelihoods = (grad.contiguous(), log_likelihood.contiguous(), remainder.contiguous())
    data, noisy, output, *_ = tables
    sums = [i for i in range(3) if targets[i] is not None]
    scales = (
        x.new_empty(chunk.rows(), chunk.steps, dtype=torch.float32)
        if sums and not per_location
        else None
    )
    with torch.cuda.device_of(x):
        if whole_output is not None or scales is not None:
            _row_gradients(chunk, reduction, likelihoods, whole_output, scales)
        for i in sums:
            _sum_gradients(
                chunk, reduction, likelihoods, scales, targets[i], (data, output, noisy)[i]
            )
    return tuple(gradients)


def _chunk(
    x: Tensor,
    model_output: Tensor,
    x_t: Tensor | None,
    tables: tuple[Tensor, ...],
    per_location: bool,
) -> Chunk:
    batch, channels = x.shape[:2]
    locations = math.prod(x.shape[2:])
    output = _five_axes(model_output, channels, locations)
    noisy = None if x_t is None else _five_axes(x_t, channels, locations)
    x = _five_axes(x[:, None, None], channels, locations)
    classes = (
        output.shape[1]
        if noisy is None
        else torch.broadcast_shapes(output.shape[1:2], noisy.shape[1:2])[0]
    )
    kind = (
        "locations"
        if per_location
        else "images"
        if len(output) == 1 and batch >= _SHARING_IMAGES
        else "rows"
    )
    channels_inner = (
        not per_location and channels > 1 and locations > 1 and output.stride(4) > output.stride(3)
    )
    elements, inner_size = (
        (channels, locations)
        if per_location
        else (channels * locations, channels if channels_inner else locations)
    )
    views = [_strides(tensor, channels_inner) for tensor in (x, output, noisy)]
    sizes = (channels * locations // max(inner_size, 1), inner_size)
    flat = all(_is_flat(view, *sizes, per_location) for view in views[: 2 if noisy is None else 3])
    addresses = [0 if tensor is None else tensor.data_ptr() for tensor in (x, output, noisy)]
    distances = [stride for view in views for stride in (view[:4] if per_location else view[:3])]
    multiples = (*addresses, *distances, locations if per_location else elements)
    aligned = flat and all(number % 16 == 0 for number in multiples)
    return Chunk(
        tensors=(x, output, noisy, *tables),
        strides=(views[0][0], *views[0][3:], *views[1], *views[2]),
        batch=batch,
        classes=classes,
        steps=output.shape[2],
        channels=channels,
        locations=locations,
        elements=elements,
        inner_size=inner_size,
        channels_inner=channels_inner,
        kind=kind,
        flat=flat,
        aligned=aligned,
    )


def _five_axes(tensor: Tensor, channels: int, locations: int) -> Tensor:
    """[..., C', *spatial] -> the first channels [..., C, locations].

    A copy where the locations have no common stride.
    """
    return tensor[:, :, :, :channels].reshape(*tensor.shape[:3], channels, locations)


def _strides(tensor: Tensor | None, channels_inner: bool) -> tuple[int, ...]:
    """Strides of batch, class, step, outer and inner; 0 along axes of size 1."""
    if tensor is None:
        return (0,) * 5
    *leading, channel, location = (
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    return (*leading, location, channel) if channels_inner else (*leading, channel, location)


def _is_flat(view: tuple[int, ...], outer_size: int, inner_size: int, per_location: bool) -> bool:
    """Whether the elements of a row, or the locations of a channel, lie one behind the other."""
    *_, outer, inner = view
    return (inner == 1 or inner_size == 1) and (
        per_location or outer == inner_size or outer_size == 1
    )


def _score(
    chunk: Chunk, reduction: str, target: str, results: tuple[Tensor | None, ...], columns: int
) -> None:
    """Reduce the chunk's steps and write `results`, of `columns` classes."""
    tile = chunk.tile(backward=False)
    programs, group_size, groups = chunk.split(tile)
    if programs == 0:
        return
    x = chunk.tensors[0]
    plane = chunk.batch * columns * (chunk.rows() // (chunk.batch * chunk.classes))
    mixture = reduction == "mixture"
    with torch.cuda.device_of(x):
        partials = x.new_empty(groups, 3, chunk.rows(), dtype=torch.float64) if groups > 1 else None
        _score_kernel[(programs * groups,)](
            *chunk.arguments(),
            chunk.pairs(),
            group_size,
            columns,
            plane,
            chunk.rows(),
            partials,
            results,
            KIND=chunk.kind,
            FLAT=chunk.flat,
            ALIGNED=chunk.aligned,
            SHARED_NOISY=chunk.shares_noisy(),
            MIXTURE=mixture,
            TARGET="partials" if groups > 1 else target,
            **tile.options(),
        )
        if groups > 1:
            grid = (triton.cdiv(chunk.rows(), 32),)
            sizes = (chunk.rows(), groups, chunk.classes, chunk.steps, columns, plane)
            _merge_kernel[grid](
                partials, results, *sizes, MIXTURE=mixture, TARGET=target, BLOCK=32, num_warps=1
            )


def _row_gradients(
    chunk: Chunk,
    reduction: str,
    likelihoods: tuple[Tensor, ...],
    grad_output: Tensor | None,
    scales: Tensor | None,
) -> None:
    """Write the gradient of a model_output that no axis shares, and all scales, where wanted."""
    tile = chunk.tile(backward=True)
    programs, group_size, groups = chunk.split(tile)
    if programs == 0 or chunk.steps == 0:
        return
    view, flat, aligned = (0,) * 5, True, True
    if grad_output is not None:
        per_location = chunk.kind == "locations"
        view = _strides(
            _five_axes(grad_output, chunk.channels, chunk.locations), chunk.channels_inner
        )
        outer_size = chunk.channels * chunk.locations // max(chunk.inner_size, 1)
        flat = _is_flat(view, outer_size, chunk.inner_size, per_location)
        aligned = all(stride % 16 == 0 for stride in view[: 4 if per_location else 3])
    _backward_kernel[(programs * groups,)](
        *chunk.arguments(),
        chunk.pairs(),
        group_size,
        *likelihoods,
        grad_output,
        scales,
        *view,
        MIXTURE=reduction == "mixture",
        KIND=chunk.kind,
        FLAT=chunk.flat,
        GRAD_FLAT=flat,
        ALIGNED=chunk.aligned and aligned,
        SHARED_NOISY=chunk.shares_noisy(),
        **tile.options(),
    )


def _sum_gradients(
    chunk: Chunk,
    reduction: str,
    likelihoods: tuple[Tensor, ...],
    scales: Tensor | None,
    gradient: Tensor,
    table: Tensor,
) -> None:
    """Write a gradient [1|B, 1|K, 1|S, C, *spatial], summed over axes of size 1.

    `table` is its input's factor in the residual.
    """
    target = _five_axes(gradient, chunk.channels, chunk.locations)
    if target.numel() == 0:
        return
    leading = target.shape[:3]
    terms = math.prod(
        full
        for own, full in zip(leading, (chunk.batch, chunk.classes, chunk.steps), strict=True)
        if own == 1
    )
    block, at_once = (64, 16) if terms > 1 else (512, 1)
    _sum_kernel[(triton.cdiv(target.numel(), block),)](
        *chunk.arguments(),
        chunk.batch,
        chunk.channels * chunk.locations,
        *likelihoods,
        scales,
        target,
        table,
        *leading,
        *_strides(target, chunk.channels_inner),
        MIXTURE=reduction == "mixture",
        BLOCK=block,
        TERMS=at_once,
        RUN=_RUN,
        num_warps=8,
    )


@triton.jit
def _view(pointer, batch, class_, step, outer, inner, KIND: tl.constexpr, ALIGNED: tl.constexpr):
    """A tensor's pointer and strides; that they are multiples of 16, the compiler sees."""
    if ALIGNED:
        step = step // 16 * 16
        outer = outer // 16 * 16 if KIND == "locations" else outer
    return pointer, batch, class_, step, outer, inner


@triton.jit
def _locate(pairs, classes, KIND: tl.constexpr, PAIRS: tl.constexpr):
    """Image, class and location of the pairs, [PAIRS] or scalars; which exist; and the group."""
    program = tl.program_id(0).to(tl.int64)
    tiles = tl.cdiv(pairs, PAIRS)
    other = program // tiles
    first = (program % tiles) * PAIRS
    index = first + tl.arange(0, PAIRS)
    if KIND == "rows":
        return index // classes, index % classes, 0, index < pairs, other
    elif KIND == "images":
        return index, other % classes, 0, index < pairs, other // classes
    else:
        return other // classes, other % classes, index, index < pairs, 0


@triton.jit
def _rows(
    view,
    image,
    class_,
    location,
    step,
    KIND: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARED: tl.constexpr,
):
    """Pointers to rows [PAIRS, 1 or STEPS, 1], or [1, STEPS, 1] where images share them."""
    if SHARED:
        pointer = view[0] + class_ * view[2]
        return (tl.multiple_of(pointer, 16) if ALIGNED else pointer) + step[None, :, None] * view[3]
    else:
        offset = image * view[1] + class_ * view[2]
        if KIND == "locations":
            offset += location if FLAT else location * view[5]
        pointers = view[0] + offset
        pointers = (tl.multiple_of(pointers, 16) if ALIGNED else pointers)[:, None, None]
        return pointers if step is None else pointers + step[None, :, None] * view[3]


@triton.jit
def _offsets(e, view, inner_size, KIND: tl.constexpr, FLAT: tl.constexpr):
    """Places of elements `e` of a row; of channels, where locations are rows."""
    if KIND == "locations":
        return e * view[4]
    elif FLAT:
        return e
    else:
        return (e // inner_size) * view[4] + (e % inner_size) * view[5]


@triton.jit
def _residual(pointers, masks, factors):
    """a x + b x_t + c o in float32, rounded the same way in every kernel."""
    r = factors[0] * tl.load(pointers[0], mask=masks[0], other=0.0).to(tl.float32)
    r = tl.fma(factors[2], tl.load(pointers[1], mask=masks[1], other=0.0).to(tl.float32), r)
    if len(pointers) == 3:
        r = tl.fma(factors[1], tl.load(pointers[2], mask=masks[2], other=0.0).to(tl.float32), r)
    return r


@triton.jit
def _tile(
    views,
    image,
    class_,
    location,
    mask,
    step,
    inside,
    KIND: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARED_NOISY: tl.constexpr,
):
    """Pointers to rows of x, model_output and x_t in a tile of pairs and steps, and their masks."""
    SHARED: tl.constexpr = KIND == "images"
    pair_mask, step_mask = mask[:, None, None], inside[None, :, None]
    rows = (
        _rows(views[0], image, class_, location, None, KIND, FLAT, ALIGNED, False),
        _rows(views[1], image, class_, location, step, KIND, FLAT, ALIGNED, SHARED),
    )
    masks = (pair_mask, step_mask if SHARED else pair_mask & step_mask)
    if len(views) == 3:
        rows = rows + (
            _rows(
                views[2],
                image,
                class_,
                location,
                step,
                KIND,
                FLAT,
                ALIGNED,
                SHARED and SHARED_NOISY,
            ),
        )
        masks = masks + (step_mask if SHARED and SHARED_NOISY else pair_mask & step_mask,)
    return rows, masks


@triton.jit
def _factors(tables, step, mask):
    """(a, b, c) of steps [STEPS], each [1, STEPS, 1]; v and n, each [1, STEPS]."""
    factors = ()
    for i in tl.static_range(3):
        factors = factors + (tl.load(tables[i] + step, mask=mask, other=0.0)[None, :, None],)
    inv_var = tl.load(tables[3] + step, mask=mask, other=0.0)[None, :]
    return factors, inv_var, tl.load(tables[4] + step, mask=mask, other=0.0)[None, :]


@triton.jit
def _residuals(
    rows,
    views,
    masks,
    factors,
    first,
    elements,
    inner_size,
    KIND: tl.constexpr,
    FLAT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """r of BLOCK elements from `first` on, [PAIRS, STEPS, BLOCK]; 0 where there is none."""
    e = (first + tl.arange(0, BLOCK))[None, None, :]
    pointers, element_masks = (), ()
    for i in tl.static_range(len(rows)):
        pointers = pointers + (rows[i] + _offsets(e, views[i], inner_size, KIND, FLAT),)
        element_masks = element_masks + (masks[i] & (e < elements),)
    return _residual(pointers, element_masks, factors)


@triton.jit
def _log_likelihoods(
    rows,
    views,
    masks,
    factors,
    inv_var,
    log_norm,
    elements,
    inner_size,
    KIND: tl.constexpr,
    FLAT: tl.constexpr,
    PAIRS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    """l in float64 [PAIRS, STEPS]; inv_var and log_norm are [1, STEPS]."""
    total = tl.zeros([PAIRS, STEPS], tl.float64)
    start = 0
    while start < elements:
        if RUN == 1:
            r = _residuals(
                rows, views, masks, factors, start, elements, inner_size, KIND, FLAT, BLOCK
            )
            squares = r * r
        else:
            squares = tl.zeros([PAIRS, STEPS, BLOCK], tl.float32)
            first = start
            while first < tl.minimum(start + BLOCK * RUN, elements):
                r = _residuals(
                    rows, views, masks, factors, first, elements, inner_size, KIND, FLAT, BLOCK
                )
                squares = tl.fma(r, r, squares)
                first += BLOCK
        total += tl.sum(squares.to(tl.float64), axis=2)
        start += BLOCK * RUN
    return -0.5 * inv_var.to(tl.float64) * total + elements * log_norm.to(tl.float64)


@triton.jit
def _scales(step_scores, likelihood, remainder, grad, inv_var, steps, MIXTURE: tl.constexpr):
    """dL/dr = scale r, float32; a step without weight has 0."""
    if MIXTURE:
        # Dividing afterwards keeps what is rounded to float32 small: log S would cost a digit.
        log_weight = step_scores - likelihood.to(tl.float64) - remainder.to(tl.float64)
        weight = tl.where(
            likelihood == float("-inf"),
            0.0,
            tl.exp(log_weight.to(tl.float32)) / steps.to(tl.float32),
        )
    else:
        weight = 1.0 / steps.to(tl.float32)
    return -inv_var * weight * grad


@triton.jit
def finite(maximum):
    """Replace -inf by 0: exp(-inf - -inf) would be NaN where the 0 of exp(-inf - 0) is meant."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def _empty_state(PAIRS: tl.constexpr, MIXTURE: tl.constexpr):
    """Maximum, sum w and sum w^2, or mean, squared deviations and count, float64 [PAIRS] each."""
    first = tl.full([PAIRS], float("-inf") if MIXTURE else 0.0, tl.float64)
    return first, tl.zeros([PAIRS], tl.float64), tl.zeros([PAIRS], tl.float64)


@triton.jit
def _state_of(step_scores, mask, MIXTURE: tl.constexpr):
    """State of the steps [PAIRS, STEPS] in `mask`."""
    if MIXTURE:
        step_scores = tl.where(mask, step_scores, float("-inf"))
        maximum = tl.max(step_scores, axis=1)
        weight = tl.exp((step_scores - finite(maximum)[:, None]).to(tl.float32)).to(tl.float64)
        return maximum, tl.sum(weight, axis=1), tl.sum(weight * weight, axis=1)
    else:
        mask = tl.broadcast_to(mask, step_scores.shape)
        count = tl.sum(mask.to(tl.float64), axis=1)
        mean = tl.sum(tl.where(mask, step_scores, 0.0), axis=1) / count
        deviation = tl.where(mask, step_scores - mean[:, None], 0.0)
        return mean, tl.sum(deviation * deviation, axis=1), count


@triton.jit
def _merge(one, other, MIXTURE: tl.constexpr):
    """State of the steps of both."""
    if MIXTURE:
        maximum = tl.maximum(one[0], other[0])
        scale, other_scale = tl.exp(one[0] - finite(maximum)), tl.exp(other[0] - finite(maximum))
        weight = scale * one[1] + other_scale * other[1]
        return maximum, weight, scale * scale * one[2] + other_scale * other_scale * other[2]
    else:
        count = one[2] + other[2]
        total = tl.maximum(count, 1.0)
        difference = other[0] - one[0]
        mean = (one[2] * one[0] + other[2] * other[0]) / total
        return mean, one[1] + other[1] + difference * difference * one[2] * other[2] / total, count


@triton.jit
def _finish(
    state,
    results,
    image,
    class_,
    location,
    locations,
    mask,
    steps,
    columns,
    plane,
    MIXTURE: tl.constexpr,
    TARGET: tl.constexpr,
):
    """Write L and its remainder [plane], or merge into an accumulation's state [3 or 2, plane].

    plane: image, column, location.
    """
    if TARGET == "likelihood":
        row = (image * columns + class_) * locations + location
        exact = state[0]
        if MIXTURE:
            exact += tl.log(state[1]) - tl.log(tl.maximum(steps, 1).to(tl.float64))
        likelihood = exact.to(tl.float32)
        tl.store(results[0] + row, likelihood, mask=mask)
        if MIXTURE:
            remainder = tl.where(
                tl.abs(likelihood) == float("inf"), 0.0, exact - likelihood.to(tl.float64)
            )
            tl.store(results[1] + row, remainder.to(tl.float32), mask=mask)
    else:
        column = class_ if results[2] is None else tl.load(results[2] + class_)
        # The caller's assertion about the others comes later.
        inside = (column >= 0) & (column < columns)
        column, mask = tl.where(inside, column, 0), mask & inside
        row = (image * columns + column) * locations + location
        first = tl.load(results[1] + row, mask=mask, other=0.0)
        second = tl.load(results[1] + plane + row, mask=mask, other=0.0)
        third = (
            tl.load(results[1] + 2 * plane + row, mask=mask, other=0.0)
            if MIXTURE
            else tl.load(results[0] + column).to(tl.float64)
        )
        merged = _merge((first, second, third), state, MIXTURE)
        # The maximum of numbers and NaN is a number: the sums tell.
        first = tl.where(merged[1] == merged[1], merged[0], merged[1]) if MIXTURE else merged[0]
        tl.store(results[1] + row, first, mask=mask)
        tl.store(results[1] + plane + row, merged[1], mask=mask)
        if MIXTURE:
            tl.store(results[1] + 2 * plane + row, merged[2], mask=mask)


@triton.jit(
    do_not_specialize=[*_STRIDES, *_SIZES, "pairs", "group_size", "columns", "plane", "num_rows"],
    do_not_specialize_on_alignment=[*_POINTERS, "partials_ptr"],
)
def _score_kernel(
    x_ptr,
    model_output_ptr,
    x_t_ptr,
    data_ptr,
    noisy_ptr,
    output_ptr,
    inv_var_ptr,
    log_norm_ptr,
    x_batch: tl.int64,
    x_outer: tl.int64,
    x_inner: tl.int64,
    output_batch: tl.int64,
    output_class: tl.int64,
    output_step: tl.int64,
    output_outer: tl.int64,
    output_inner: tl.int64,
    noisy_batch: tl.int64,
    noisy_class: tl.int64,
    noisy_step: tl.int64,
    noisy_outer: tl.int64,
    noisy_inner: tl.int64,
    classes: tl.int64,
    steps: tl.int32,
    elements: tl.int32,
    inner_size: tl.int32,
    pairs: tl.int64,
    group_size: tl.int32,
    columns: tl.int64,
    plane: tl.int64,
    num_rows: tl.int64,
    partials_ptr,
    results,
    MIXTURE: tl.constexpr,
    TARGET: tl.constexpr,
    KIND: tl.constexpr,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARED_NOISY: tl.constexpr,
    PAIRS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    """State of one group of steps of a tile of pairs.

    Goes into partials [groups, 3, rows], or where it is the only group into `results`.
    """
    views = (
        _view(x_ptr, x_batch, 0, 0, x_outer, x_inner, KIND, ALIGNED),
        _view(
            model_output_ptr,
            output_batch,
            output_class,
            output_step,
            output_outer,
            output_inner,
            KIND,
            ALIGNED,
        ),
    )
    if x_t_ptr is not None:
        views = views + (
            _view(
                x_t_ptr,
                noisy_batch,
                noisy_class,
                noisy_step,
                noisy_outer,
                noisy_inner,
                KIND,
                ALIGNED,
            ),
        )
    tables = (data_ptr, noisy_ptr, output_ptr, inv_var_ptr, log_norm_ptr)
    if ALIGNED:
        pairs, elements = (
            (pairs // 16 * 16, elements) if KIND == "locations" else (pairs, elements // 16 * 16)
        )
    image, class_, location, mask, group = _locate(pairs, classes, KIND, PAIRS)
    state = _empty_state(PAIRS, MIXTURE)
    first = (group * group_size).to(tl.int32)
    end = tl.minimum(first + group_size, steps)
    while first < end:
        step = first + tl.arange(0, STEPS)
        inside = step < steps
        rows, masks = _tile(
            views, image, class_, location, mask, step, inside, KIND, FLAT, ALIGNED, SHARED_NOISY
        )
        factors, inv_var, log_norm = _factors(tables, step, inside)
        step_scores = _log_likelihoods(
            rows,
            views,
            masks,
            factors,
            inv_var,
            log_norm,
            elements,
            inner_size,
            KIND,
            FLAT,
            PAIRS,
            STEPS,
            BLOCK,
            RUN,
        )
        state = _merge(state, _state_of(step_scores, inside[None, :], MIXTURE), MIXTURE)
        first += STEPS
    if TARGET == "partials":
        row = image * classes + class_
        for i in tl.static_range(3):
            tl.store(partials_ptr + (group * 3 + i) * num_rows + row, state[i], mask=mask)
    else:
        locations = inner_size if KIND == "locations" else 1
        _finish(
            state,
            results,
            image,
            class_,
            location,
            locations,
            mask,
            steps,
            columns,
            plane,
            MIXTURE,
            TARGET,
        )


@triton.jit(
    do_not_specialize=["num_rows", "groups", "classes", "steps", "columns", "plane"],
    do_not_specialize_on_alignment=["partials_ptr"],
)
def _merge_kernel(
    partials_ptr,
    results,
    num_rows: tl.int64,
    groups: tl.int32,
    classes: tl.int64,
    steps: tl.int32,
    columns: tl.int64,
    plane: tl.int64,
    MIXTURE: tl.constexpr,
    TARGET: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Merge the states of all groups in their order, and write `results`."""
    row = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    mask = row < num_rows
    state = _empty_state(BLOCK, MIXTURE)
    group = 0
    while group < groups:
        other = ()
        for i in tl.static_range(3):
            other = other + (tl.load(partials_ptr + i * num_rows + row, mask=mask, other=0.0),)
        state = _merge(state, other, MIXTURE)
        partials_ptr += 3 * num_rows
        group += 1
    _finish(
        state,
        results,
        row // classes,
        row % classes,
        0,
        1,
        mask,
        steps,
        columns,
        plane,
        MIXTURE,
        TARGET,
    )


@triton.jit(
    do_not_specialize=[*_STRIDES, *_SIZES, "pairs", "group_size", *_GRAD_STRIDES],
    do_not_specialize_on_alignment=[*_POINTERS, *_GRAD_POINTERS, "grad_output_ptr", "scales_ptr"],
)
def _backward_kernel(
    x_ptr,
    model_output_ptr,
    x_t_ptr,
    data_ptr,
    noisy_ptr,
    output_ptr,
    inv_var_ptr,
    log_norm_ptr,
    x_batch: tl.int64,
    x_outer: tl.int64,
    x_inner: tl.int64,
    output_batch: tl.int64,
    output_class: tl.int64,
    output_step: tl.int64,
    output_outer: tl.int64,
    output_inner: tl.int64,
    noisy_batch: tl.int64,
    noisy_class: tl.int64,
    noisy_step: tl.int64,
    noisy_outer: tl.int64,
    noisy_inner: tl.int64,
    classes: tl.int64,
    steps: tl.int32,
    elements: tl.int32,
    inner_size: tl.int32,
    pairs: tl.int64,
    group_size: tl.int32,
    grad_ptr,
    likelihood_ptr,
    remainder_ptr,
    grad_output_ptr,
    scales_ptr,
    grad_batch: tl.int64,
    grad_class: tl.int64,
    grad_step: tl.int64,
    grad_outer: tl.int64,
    grad_inner: tl.int64,
    MIXTURE: tl.constexpr,
    KIND: tl.constexpr,
    FLAT: tl.constexpr,
    GRAD_FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    SHARED_NOISY: tl.constexpr,
    PAIRS: tl.constexpr,
    STEPS: tl.constexpr,
    BLOCK: tl.constexpr,
    RUN: tl.constexpr,
):
    """Of rows of one group of steps: gradients of model_output, and scales [pairs, steps].

    Either is written where its pointer is there.
    """
    views = (
        _view(x_ptr, x_batch, 0, 0, x_outer, x_inner, KIND, ALIGNED),
        _view(
            model_output_ptr,
            output_batch,
            output_class,
            output_step,
            output_outer,
            output_inner,
            KIND,
            ALIGNED,
        ),
    )
    if x_t_ptr is not None:
        views = views + (
            _view(
                x_t_ptr,
                noisy_batch,
                noisy_class,
                noisy_step,
                noisy_outer,
                noisy_inner,
                KIND,
                ALIGNED,
            ),
        )
    tables = (data_ptr, noisy_ptr, output_ptr, inv_var_ptr, log_norm_ptr)
    if ALIGNED:
        pairs, elements = (
            (pairs // 16 * 16, elements) if KIND == "locations" else (pairs, elements // 16 * 16)
        )
    image, class_, location, mask, group = _locate(pairs, classes, KIND, PAIRS)
    locations = inner_size if KIND == "locations" else 1
    row = (image * classes + class_) * locations + location
    grad = tl.load(grad_ptr + row, mask=mask, other=0.0)[:, None]
    likelihood = tl.load(likelihood_ptr + row, mask=mask, other=0.0)[:, None]
    remainder = tl.load(remainder_ptr + row, mask=mask, other=0.0)[:, None] if MIXTURE else 0.0
    first = (group * group_size).to(tl.int32)
    end = tl.minimum(first + group_size, steps)
    while first < end:
        step = first + tl.arange(0, STEPS)
        inside = step < steps
        rows, masks = _tile(
            views, image, class_, location, mask, step, inside, KIND, FLAT, ALIGNED, SHARED_NOISY
        )
        factors, inv_var, log_norm = _factors(tables, step, inside)
        step_scores = 0.0
        if MIXTURE:
            step_scores = _log_likelihoods(
                rows,
                views,
                masks,
                factors,
                inv_var,
                log_norm,
                elements,
                inner_size,
                KIND,
                FLAT,
                PAIRS,
                STEPS,
                BLOCK,
                RUN,
            )
        scale = _scales(
            step_scores, likelihood, remainder, grad, inv_var, steps, MIXTURE
        )  # [PAIRS, STEPS]
        if scales_ptr is not None:
            tl.store(
                scales_ptr + row[:, None] * steps + step[None, :],
                scale,
                mask=mask[:, None] & inside[None, :],
            )
        if grad_output_ptr is not None:
            view = _view(
                grad_output_ptr,
                grad_batch,
                grad_class,
                grad_step,
                grad_outer,
                grad_inner,
                KIND,
                ALIGNED,
            )
            targets = _rows(view, image, class_, location, step, KIND, GRAD_FLAT, ALIGNED, False)
            scale = scale[:, :, None]
            start = 0
            while start < elements:
                r = _residuals(
                    rows, views, masks, factors, start, elements, inner_size, KIND, FLAT, BLOCK
                )
                gradient = tl.where(scale == 0, 0.0, scale * r * factors[2])
                e = (start + tl.arange(0, BLOCK))[None, None, :]
                places = targets + _offsets(e, view, inner_size, KIND, GRAD_FLAT)
                inside_row = (e < elements) & mask[:, None, None] & inside[None, :, None]
                tl.store(places, gradient.to(grad_output_ptr.dtype.element_ty), mask=inside_row)
                start += BLOCK
        first += STEPS


@triton.jit(
    do_not_specialize=[
        *_STRIDES,
        *_SIZES,
        "batch",
        "row_elements",
        "own_batch",
        "own_classes",
        "own_steps",
        *_GRAD_STRIDES,
    ],
    do_not_specialize_on_alignment=[
        *_POINTERS,
        *_GRAD_POINTERS,
        "scales_ptr",
        "target_ptr",
        "table_ptr",
    ],
)
def _sum_kernel(
    x_ptr,
    model_output_ptr,
    x_t_ptr,
    data_ptr,
    noisy_ptr,
    output_ptr,
    inv_var_ptr,
    log_norm_ptr,
    x_batch: tl.int64,
    x_outer: tl.int64,
    x_inner: tl.int64,
    output_batch: tl.int64,
    output_class: tl.int64,
    output_step: tl.int64,
    output_outer: tl.int64,
    output_inner: tl.int64,
    noisy_batch: tl.int64,
    noisy_class: tl.int64,
    noisy_step: tl.int64,
    noisy_outer: tl.int64,
    noisy_inner: tl.int64,
    classes: tl.int64,
    steps: tl.int32,
    elements: tl.int32,
    inner_size: tl.int32,
    batch: tl.int64,
    row_elements: tl.int32,
    grad_ptr,
    likelihood_ptr,
    remainder_ptr,
    scales_ptr,
    target_ptr,
    table_ptr,
    own_batch: tl.int64,
    own_classes: tl.int64,
    own_steps: tl.int64,
    grad_batch: tl.int64,
    grad_class: tl.int64,
    grad_step: tl.int64,
    grad_outer: tl.int64,
    grad_inner: tl.int64,
    MIXTURE: tl.constexpr,
    BLOCK: tl.constexpr,
    TERMS: tl.constexpr,
    RUN: tl.constexpr,
):
    """BLOCK elements of a gradient, summed over what shares it, TERMS rows at a time.

    Each is the sum over all images, classes and steps that share it. Without `scales_ptr`, where
    likelihoods are of locations, scales are computed here.
    """
    views = (
        _view(x_ptr, x_batch, 0, 0, x_outer, x_inner, "locations", False),
        _view(
            model_output_ptr,
            output_batch,
            output_class,
            output_step,
            output_outer,
            output_inner,
            "locations",
            False,
        ),
    )
    if x_t_ptr is not None:
        views = views + (
            _view(
                x_t_ptr,
                noisy_batch,
                noisy_class,
                noisy_step,
                noisy_outer,
                noisy_inner,
                "locations",
                False,
            ),
        )
    tables = (data_ptr, noisy_ptr, output_ptr, inv_var_ptr, log_norm_ptr)
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
        factors, rows, pointers, masks = (), (), (), ()
        for i in tl.static_range(5):
            factors = factors + (tl.load(tables[i] + step, mask=mask, other=0.0),)
        for i in tl.static_range(len(views)):
            row_pointers = views[i][0] + (
                image * views[i][1]
                + class_ * views[i][2]
                + step * views[i][3]
                + inner * views[i][5]
            )
            rows = rows + (row_pointers[:, :, None],)
            pointers = pointers + (row_pointers + outer * views[i][4],)
            masks = masks + (mask[:, :, None],)
        row = image * classes + class_
        if scales_ptr is not None:
            scale = tl.load(scales_ptr + row * steps + step, mask=mask, other=0.0)
        else:
            places = row * inner_size + inner
            grad = tl.load(grad_ptr + places, mask=mask, other=0.0)
            likelihood = tl.load(likelihood_ptr + places, mask=mask, other=0.0)
            remainder, step_scores = 0.0, 0.0
            if MIXTURE:
                remainder = tl.load(remainder_ptr + places, mask=mask, other=0.0)
                wide = (factors[0][:, :, None], factors[1][:, :, None], factors[2][:, :, None])
                step_scores = _log_likelihoods(
                    rows,
                    views,
                    masks,
                    wide,
                    factors[3],
                    factors[4],
                    elements,
                    inner_size,
                    "locations",
                    False,
                    BLOCK,
                    TERMS,
                    1,
                    RUN,
                )
            scale = _scales(step_scores, likelihood, remainder, grad, factors[3], steps, MIXTURE)
        r = _residual(pointers, (mask, mask, mask), factors)
        factor = tl.load(table_ptr + step, mask=mask, other=0.0)
        total += tl.where(mask & (scale != 0), scale * r * factor, 0.0).to(tl.float64)
        first += TERMS
    places = (
        own_image * grad_batch
        + own_class * grad_class
        + own_step * grad_step
        + outer * grad_outer
        + inner * grad_inner
    )
    gradient = tl.sum(total, axis=1)[:, None].to(tl.float32)
    tl.store(target_ptr + places, gradient.to(target_ptr.dtype.element_ty), mask=inside)
