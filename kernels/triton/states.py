"""Streaming states on the device.

A kernel has one for a group of steps; the states of groups are merged in their order.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl


class State(NamedTuple):
    """center, weight and squares as `genrep_fast.reference.scoring` defines them, float64 each.

    The weight of "mean" is the number of steps.
    """

    center: tl.tensor
    weight: tl.tensor
    squares: tl.tensor


@triton.jit
def finite(center):
    """Replace -inf by 0: exp(-inf - -inf) would be NaN where the 0 of exp(-inf - 0) is meant."""
    return tl.where(center == float("-inf"), 0.0, center)


@triton.jit
def empty_state(PAIRS: tl.constexpr, MIXTURE: tl.constexpr):
    """State before any step."""
    center = tl.full([PAIRS], float("-inf") if MIXTURE else 0.0, tl.float64)
    return State(center, tl.zeros([PAIRS], tl.float64), tl.zeros([PAIRS], tl.float64))


@triton.jit
def state_of(step_scores, mask, MIXTURE: tl.constexpr):
    """State of the steps [PAIRS, STEPS] in `mask`."""
    if MIXTURE:
        step_scores = tl.where(mask, step_scores, float("-inf"))
        center = tl.max(step_scores, axis=1)
        w = tl.exp((step_scores - finite(center)[:, None]).to(tl.float32)).to(tl.float64)
        return State(center, tl.sum(w, axis=1), tl.sum(w * w, axis=1))
    else:
        mask = tl.broadcast_to(mask, step_scores.shape)
        weight = tl.sum(mask.to(tl.float64), axis=1)
        center = tl.sum(tl.where(mask, step_scores, 0.0), axis=1) / weight
        deviation = tl.where(mask, step_scores - center[:, None], 0.0)
        return State(center, weight, tl.sum(deviation * deviation, axis=1))


@triton.jit
def merge_states(one, other, MIXTURE: tl.constexpr):
    """State of the steps of both."""
    if MIXTURE:
        center = tl.maximum(one.center, other.center)
        scale = tl.exp(one.center - finite(center))
        other_scale = tl.exp(other.center - finite(center))
        weight = scale * one.weight + other_scale * other.weight
        squares = scale * scale * one.squares + other_scale * other_scale * other.squares
        return State(center, weight, squares)
    else:
        weight = one.weight + other.weight
        total = tl.maximum(weight, 1.0)
        difference = other.center - one.center
        center = (one.weight * one.center + other.weight * other.center) / total
        between = difference * difference * one.weight * other.weight / total
        return State(center, weight, one.squares + other.squares + between)


@triton.jit
def load_partial(partials_ptr, group, row, mask, num_rows):
    """State of a group of steps, from partials [groups, 3, rows]."""
    pointers = partials_ptr + 3 * group * num_rows + row
    center = tl.load(pointers, mask=mask, other=0.0)
    weight = tl.load(pointers + num_rows, mask=mask, other=0.0)
    squares = tl.load(pointers + 2 * num_rows, mask=mask, other=0.0)
    return State(center, weight, squares)


@triton.jit
def store_partial(state, partials_ptr, group, row, mask, num_rows):
    """Write a group's state into partials [groups, 3, rows]."""
    pointers = partials_ptr + 3 * group * num_rows + row
    tl.store(pointers, state.center, mask=mask)
    tl.store(pointers + num_rows, state.weight, mask=mask)
    tl.store(pointers + 2 * num_rows, state.squares, mask=mask)


@triton.jit
def log_likelihood_of(state, steps, MIXTURE: tl.constexpr):
    """L in float64."""
    if MIXTURE:
        return state.center + (tl.log(state.weight) - tl.log(tl.maximum(steps, 1).to(tl.float64)))
    else:
        return state.center


@triton.jit
def update_state(state, count_ptr, state_ptr, column, row, mask, plane, MIXTURE: tl.constexpr):
    """Merge a state into an accumulation's, [3 or 2, plane], behind what is there."""
    pointers = state_ptr + row
    center = tl.load(pointers, mask=mask, other=0.0)
    second = tl.load(pointers + plane, mask=mask, other=0.0)
    if MIXTURE:
        squares = tl.load(pointers + 2 * plane, mask=mask, other=0.0)
        merged = merge_states(State(center, second, squares), state, MIXTURE)
        # The maximum of numbers and NaN is a number: the sums tell.
        is_nan = merged.weight != merged.weight
        tl.store(pointers, tl.where(is_nan, merged.weight, merged.center), mask=mask)
        tl.store(pointers + plane, merged.weight, mask=mask)
        tl.store(pointers + 2 * plane, merged.squares, mask=mask)
    else:
        weight = tl.load(count_ptr + column).to(tl.float64)
        merged = merge_states(State(center, weight, second), state, MIXTURE)
        tl.store(pointers, merged.center, mask=mask)
        tl.store(pointers + plane, merged.squares, mask=mask)
