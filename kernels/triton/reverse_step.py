"""Reverse step of a chain, fused with its counter-based noise and with the score of the same step.

With z from Philox 4x32-10 (Salmon et al., SC 2011) and Box-Muller, see
`genrep_fast.reference.reverse_step`:

    x' = A x_t + B o + std z,        score = sum(-v r^2 / 2 + n),        r = a x + b x_t + c o

Reads x_t, o and x once and writes x': 4 elements for each (3 without x), about 45 integer
operations and 60 FLOPs, most of them for the noise: bound by memory and arithmetic alike. A thread
draws four neighbouring elements from one counter.

Words are the reference's bit by bit. Box-Muller is in float32 with polynomials of its own, so that
every GPU draws the same noise: its absolute error is below 1e-6. -log u keeps its relative
precision where u is next to 1, since 1 - u is taken from the integer.
"""

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

_BLOCK = 1024  # elements
_PARTIALS = 1024  # of one chain's score at most

_DATA = ["x_t_ptr", "model_output_ptr", "x_ptr", "scale_ptr", "x_prev_ptr"]
_STRIDES = [
    *("x_t_batch", "x_t_channel", "x_t_location"),
    *("output_batch", "output_channel", "output_location"),
    *("x_batch", "x_channel", "x_location"),
    *("scale_batch", "scale_channel", "scale_location"),
]
_SIZES = ["locations", "elements", "parts", "size", "steps"]


def reverse_step(
    x_t: Tensor,
    model_output: Tensor,
    tables: Tensor,
    step: int,
    seed: int,
    chain_ids: Tensor,
    x: Tensor | None,
    std_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x' of x_t's shape and dtype; the score float32 [B], or [0] without x; see the reference."""
    batch, channels = x_t.shape[:2]
    locations = math.prod(x_t.shape[2:])
    elements = channels * locations
    x_prev = torch.empty(x_t.shape, dtype=x_t.dtype, device=x_t.device)
    size = triton.cdiv(triton.cdiv(elements, _PARTIALS), _BLOCK) * _BLOCK
    parts = triton.cdiv(elements, size) if elements else 0
    partials = None if x is None else x_t.new_empty(batch, parts, dtype=torch.float64)
    scale = None if std_scale is None else std_scale.expand(x_t.shape)
    tensors = [
        None if tensor is None else tensor[:, :channels].reshape(batch, channels, locations)
        for tensor in (x_t, model_output, x, scale)
    ]
    strides = [
        stride
        for tensor in tensors
        for stride in ((0, 0, 0) if tensor is None else tensor.stride())
    ]
    flat = all(tensor is None or tensor.stride()[1:] == (locations, 1) for tensor in tensors[:3])
    addresses = [tensor.data_ptr() for tensor in (*tensors[:3], x_prev) if tensor is not None]
    aligned = flat and all(number % 16 == 0 for number in (*addresses, *strides[:9:3], elements))
    with torch.cuda.device_of(x_t):
        if batch * parts > 0:
            _reverse_step_kernel[(batch * parts,)](
                *tensors,
                x_prev,
                partials,
                chain_ids.contiguous(),
                tables.contiguous(),
                *strides,
                locations,
                elements,
                parts,
                size,
                tables.shape[1],
                step,
                seed,
                FLAT=flat,
                ALIGNED=aligned,
                BLOCK=_BLOCK,
            )
        score = x_t.new_empty(0, dtype=torch.float32) if x is None else partials.sum(1).float()
    return x_prev, score


@triton.jit
def _negative_log(word):
    """-log u of u = (word + 1/2) 2^-32, by the polynomial of Cephes' logf for log(1 + f)."""
    y = (word.to(tl.float32) + 0.5) * 2.0**-32
    # The number is sqrt(1/2): y = 2^exponent (1 + f), 1 + f in [sqrt(1/2), sqrt(2)).
    bits = y.to(tl.int32, bitcast=True) - 0x3F3504F3
    exponent = (bits >> 23).to(tl.float32)
    f = ((bits & 0x007FFFFF) + 0x3F3504F3).to(tl.float32, bitcast=True) - 1.0
    distance = ((word ^ 0xFFFFFFFF).to(tl.float32) + 0.5) * 2.0**-32  # 1 - u
    near_one = distance <= 0.29289323
    f = tl.where(near_one, -distance, f)
    exponent = tl.where(near_one, 0.0, exponent)
    p = 7.0376836292e-2
    p = p * f - 1.1514610310e-1
    p = p * f + 1.1676998740e-1
    p = p * f - 1.2420140846e-1
    p = p * f + 1.4249322787e-1
    p = p * f - 1.6668057665e-1
    p = p * f + 2.0000714765e-1
    p = p * f - 2.4999993993e-1
    p = p * f + 3.3333331174e-1
    square = f * f
    log = f + (square * (f * p - 0.5) - 2.12194440e-4 * exponent)
    return -(log + 0.693359375 * exponent)


@triton.jit
def _cos_sin(word):
    """cos and sin of 2 pi (word + 1/2) 2^-32.

    By Cephes' polynomials within the quadrant around a multiple of pi / 2.
    """
    quadrant = (word + 0x20000000) >> 30
    rest = (word - (quadrant << 30)).to(tl.int32, bitcast=True)
    angle = (rest.to(tl.float32) + 0.5) * 1.4629180792671596e-9  # 2 pi 2^-32
    square = angle * angle
    sin = (
        (-1.9515295891e-4 * square + 8.3321608736e-3) * square - 1.6666654611e-1
    ) * square * angle + angle
    cos = (
        ((2.443315711809948e-5 * square - 1.388731625493765e-3) * square + 4.166664568298827e-2)
        * square
        * square
        - 0.5 * square
        + 1.0
    )
    swapped = (quadrant & 1) == 1
    cos, sin = tl.where(swapped, sin, cos), tl.where(swapped, cos, sin)
    return tl.where((quadrant == 1) | (quadrant == 2), -cos, cos), tl.where(
        quadrant >= 2, -sin, sin
    )


@triton.jit
def _pair(first_word, second_word):
    """Two standard normal numbers from two words (Box-Muller)."""
    radius = tl.sqrt_rn(2.0 * _negative_log(first_word))
    cos, sin = _cos_sin(second_word)
    return radius * cos, radius * sin


@triton.jit
def _noise(seed, chain, row, first, BLOCK: tl.constexpr):
    """Standard normal noise of elements `first`, a multiple of 4, to first + BLOCK - 1."""
    index = first // 4 + tl.arange(0, BLOCK // 4)
    low, high = (index & 0xFFFFFFFF).to(tl.uint32), (index >> 32).to(tl.uint32)
    zeros = tl.zeros_like(low)
    w0, w1, w2, w3 = tl.philox(
        seed, low, high, zeros + chain.to(tl.uint32), zeros + row.to(tl.uint32)
    )
    z0, z1 = _pair(w0, w1)
    z2, z3 = _pair(w2, w3)
    return tl.reshape(tl.join(tl.join(z0, z2), tl.join(z1, z3)), [BLOCK])


@triton.jit
def _load(
    pointer,
    chain,
    e,
    locations,
    mask,
    batch,
    channel,
    location,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
):
    """Elements `e` of a chain in float32."""
    pointer += chain * batch
    if ALIGNED:
        pointer = tl.multiple_of(pointer, 16)
    places = e if FLAT else (e // locations) * channel + (e % locations) * location
    return tl.load(pointer + places, mask=mask, other=0.0).to(tl.float32)


@triton.jit(
    do_not_specialize=[*_STRIDES, *_SIZES, "step", "seed"],
    do_not_specialize_on_alignment=[*_DATA, "partials_ptr", "chain_ids_ptr", "tables_ptr"],
)
def _reverse_step_kernel(
    x_t_ptr,
    model_output_ptr,
    x_ptr,
    scale_ptr,
    x_prev_ptr,
    partials_ptr,
    chain_ids_ptr,
    tables_ptr,
    x_t_batch: tl.int64,
    x_t_channel: tl.int64,
    x_t_location: tl.int64,
    output_batch: tl.int64,
    output_channel: tl.int64,
    output_location: tl.int64,
    x_batch: tl.int64,
    x_channel: tl.int64,
    x_location: tl.int64,
    scale_batch: tl.int64,
    scale_channel: tl.int64,
    scale_location: tl.int64,
    locations: tl.int64,
    elements: tl.int64,
    parts: tl.int64,
    size: tl.int64,
    steps: tl.int64,
    step: tl.int64,
    seed: tl.int64,
    FLAT: tl.constexpr,
    ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """`size` elements of one chain, and their part of its score."""
    program = tl.program_id(0).to(tl.int64)
    chain, part = program // parts, program % parts
    chain_id = tl.load(chain_ids_ptr + chain)
    # The step's column of the tables [8, S], whose rows are in the order of StepCoefficients.
    column_ptr = tables_ptr + step
    mean_noisy = tl.load(column_ptr + 5 * steps)
    mean_output = tl.load(column_ptr + 6 * steps)
    std = tl.load(column_ptr + 7 * steps)
    if x_ptr is not None:
        data = tl.load(column_ptr)
        noisy = tl.load(column_ptr + steps)
        output = tl.load(column_ptr + 2 * steps)
        inv_var = tl.load(column_ptr + 3 * steps)
        log_norm = tl.load(column_ptr + 4 * steps)
    x_prev_ptr += chain * elements
    if ALIGNED:  # the quotients are exact: the compiler sees the factors
        x_prev_ptr, elements = tl.multiple_of(x_prev_ptr, 16), elements // 16 * 16
    size = size // BLOCK * BLOCK
    score = tl.zeros([BLOCK], tl.float64)
    first = part * size
    end = tl.minimum(first + size, elements)
    while first < end:
        e = first + tl.arange(0, BLOCK)
        mask = e < elements
        x_t = _load(
            x_t_ptr, chain, e, locations, mask, x_t_batch, x_t_channel, x_t_location, FLAT, ALIGNED
        )
        prediction = _load(
            model_output_ptr,
            chain,
            e,
            locations,
            mask,
            output_batch,
            output_channel,
            output_location,
            FLAT,
            ALIGNED,
        )
        spread = std
        if scale_ptr is not None:
            scale = _load(
                scale_ptr,
                chain,
                e,
                locations,
                mask,
                scale_batch,
                scale_channel,
                scale_location,
                False,
                False,
            )
            spread = std * scale
        x_prev = (
            mean_noisy * x_t
            + mean_output * prediction
            + spread * _noise(seed, chain_id, step, first, BLOCK)
        )
        tl.store(x_prev_ptr + e, x_prev.to(x_prev_ptr.dtype.element_ty), mask=mask)
        if x_ptr is not None:
            x = _load(
                x_ptr, chain, e, locations, mask, x_batch, x_channel, x_location, FLAT, ALIGNED
            )
            r = data * x + noisy * x_t + output * prediction
            if scale_ptr is not None:
                term = -0.5 * inv_var / (scale * scale) * r * r + (log_norm - tl.log(scale))
            else:
                term = -0.5 * inv_var * r * r + log_norm
            score += tl.where(mask, term, 0.0).to(tl.float64)
        first += BLOCK
    if partials_ptr is not None:
        tl.store(partials_ptr + program, tl.sum(score))
