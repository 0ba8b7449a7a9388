"""Streaming states on the device; their words are those of `genrep_fast.reference.scoring`.

float64, one number a pair each. A kernel has one state for a group of steps; states of groups are
merged in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class Mixture(NamedTuple):
    """Largest l, and sums of w = exp(l - maximum) and of w^2."""

    maximum: tl.tensor
    weight: tl.tensor
    squares: tl.tensor


class Mean(NamedTuple):
    """Mean of l, sum of squared deviations from it, and number of steps."""

    mean: tl.tensor
    m2: tl.tensor
    count: tl.tensor


@triton.jit
def finite(maximum):
    """Replace -inf by 0: exp(-inf - -inf) would be NaN where the 0 of exp(-inf - 0) is meant."""
    return tl.where(maximum == float("-inf"), 0.0, maximum)


@triton.jit
def empty_state(PAIRS: tl.constexpr, MIXTURE: tl.constexpr):
    """State before any step."""
    zeros = tl.zeros([PAIRS], tl.float64)
    if MIXTURE:
        return Mixture(tl.full([PAIRS], float("-inf"), tl.float64), zeros, zeros)
    else:
        return Mean(zeros, zeros, zeros)


@triton.jit
def state_of(step_scores, mask, MIXTURE: tl.constexpr):
    """State of the steps [PAIRS, STEPS] in `mask`."""
    if MIXTURE:
        step_scores = tl.where(mask, step_scores, float("-inf"))
        maximum = tl.max(step_scores, axis=1)
        weight = tl.exp((step_scores - finite(maximum)[:, None]).to(tl.float32)).to(tl.float64)
        return Mixture(maximum, tl.sum(weight, axis=1), tl.sum(weight * weight, axis=1))
    else:
        mask = tl.broadcast_to(mask, step_scores.shape)
        count = tl.sum(mask.to(tl.float64), axis=1)
        mean = tl.sum(tl.where(mask, step_scores, 0.0), axis=1) / count
        deviation = tl.where(mask, step_scores - mean[:, None], 0.0)
        return Mean(mean, tl.sum(deviation * deviation, axis=1), count)


@triton.jit
def merge_states(one, other, MIXTURE: tl.constexpr):
    """State of the steps of both."""
    if MIXTURE:
        maximum = tl.maximum(one.maximum, other.maximum)
        scale = tl.exp(one.maximum - finite(maximum))
        other_scale = tl.exp(other.maximum - finite(maximum))
        weight = scale * one.weight + other_scale * other.weight
        squares = scale * scale * one.squares + other_scale * other_scale * other.squares
        return Mixture(maximum, weight, squares)
    else:
        count = one.count + other.count
        total = tl.maximum(count, 1.0)
        difference = other.mean - one.mean
        mean = (one.count * one.mean + other.count * other.mean) / total
        between = difference * difference * one.count * other.count / total
        return Mean(mean, one.m2 + other.m2 + between, count)


@triton.jit
def load_partial(partials_ptr, group, row, mask, num_rows, MIXTURE: tl.constexpr):
    """State of a group of steps, from partials [groups, 3, rows]."""
    pointers = partials_ptr + 3 * group * num_rows + row
    first = tl.load(pointers, mask=mask, other=0.0)
    second = tl.load(pointers + num_rows, mask=mask, other=0.0)
    third = tl.load(pointers + 2 * num_rows, mask=mask, other=0.0)
    if MIXTURE:
        return Mixture(first, second, third)
    else:
        return Mean(first, second, third)


@triton.jit
def store_partial(state, partials_ptr, group, row, mask, num_rows):
    """Write a group's state into partials [groups, 3, rows]."""
    for i in tl.static_range(3):
        tl.store(partials_ptr + (group * 3 + i) * num_rows + row, state[i], mask=mask)


@triton.jit
def log_likelihood_of(state, steps, MIXTURE: tl.constexpr):
    """L in float64."""
    if MIXTURE:
        return state.maximum + (tl.log(state.weight) - tl.log(tl.maximum(steps, 1).to(tl.float64)))
    else:
        return state.mean


@triton.jit
def update_state(state, count_ptr, state_ptr, column, row, mask, plane, MIXTURE: tl.constexpr):
    """Merge a state into those of an accumulation, [3 or 2, plane], behind what is there."""
    pointers = state_ptr + row
    first = tl.load(pointers, mask=mask, other=0.0)
    second = tl.load(pointers + plane, mask=mask, other=0.0)
    if MIXTURE:
        third = tl.load(pointers + 2 * plane, mask=mask, other=0.0)
        merged = merge_states(Mixture(first, second, third), state, MIXTURE)
        # The maximum of numbers and NaN is a number: the sums tell.
        is_nan = merged.weight != merged.weight
        tl.store(pointers, tl.where(is_nan, merged.weight, merged.maximum), mask=mask)
        tl.store(pointers + plane, merged.weight, mask=mask)
        tl.store(pointers + 2 * plane, merged.squares, mask=mask)
    else:
        count = tl.load(count_ptr + column).to(tl.float64)
        merged = merge_states(Mean(first, second, count), state, MIXTURE)
        tl.store(pointers, merged.mean, mask=mask)
        tl.store(pointers + plane, merged.m2, mask=mask)
