"""Definition of the scoring operators: likelihood, its gradients and the streaming state.

Shapes: B images, K classes, S scored steps, C channels, *spatial; *loc is *spatial where a
likelihood is kept for each location, and nothing where it is kept for each image. `model_output` is
[1|B, 1|K, S, C', *spatial] with C' >= C, `x_t` the same with exactly C channels (and 1 allowed for
S). `tables` is [5, S]: a row each of data (a), noisy (b), output (c), inv_var (v) and log_norm (n).
Everything is computed in float32, or in float64 where `x` is float64.

The streaming state of an image and class (and location) has three numbers, float64, which bear the
same names in every backend:

======= ============================================ ==========================
        "mixture"                                    "mean"
======= ============================================ ==========================
center  the largest l                                the mean of l
weight  sum of w, w = exp(l - center)                the number of steps (w = 1)
squares sum of w^2                                   sum of (l - center)^2
======= ============================================ ==========================

`state` [3, B, K, *loc] holds center, weight and squares for "mixture"; [2, B, K, *loc] holds center
and squares for "mean", whose weight is `count` [K], the number of steps of each class.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 where any of `tensors` is float64, else float32."""
    for tensor in tensors:
        if tensor.dtype == torch.float64:
            return torch.float64
    return torch.float32


def log_likelihood(
    x: Tensor,
    model_output: Tensor,
    x_t: Tensor | None,
    tables: Tensor,
    reduction: str,
    per_location: bool,
) -> tuple[Tensor, Tensor]:
    """L = logsumexp_s l - log S ("mixture") or the mean of l over the steps ("mean").

    Also what rounding took from it, the remainder. -> [B, K, *loc] each

    The remainder is for kernels: in backward they get softmax_s(l) = exp(l - L - remainder) / S
    from one step at a time. "mean", which has no such weights, has an empty one.
    """
    r = _residual(x, model_output, x_t, tables)
    steps = _step_log_likelihood(r, tables, per_location)  # [B, K, S, *loc]
    if reduction == "mean":
        return steps.mean(2), steps.new_empty(0)
    exact = steps.double().logsumexp(2) - math.log(max(steps.shape[2], 1))
    rounded = exact.to(steps.dtype)
    return rounded, torch.where(exact.isinf(), 0, exact - rounded).to(steps.dtype)


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
    """Gradients of x, model_output and x_t, each in its input's shape and dtype.

    An empty tensor where `output_mask` is False.

    dl/dr = -v r, times softmax_s(l) ("mixture") or 1/S ("mean"); r's derivatives are the tables a,
    c and b. What `log_likelihood` returned is for kernels: see there.
    """
    r = _residual(x, model_output, x_t, tables)
    weight: Tensor | float
    if reduction == "mean":
        weight = 1 / r.shape[2]
    else:
        steps = _step_log_likelihood(r, tables, per_location)
        no_component = (steps == -math.inf).all(2, keepdim=True)
        weight = steps.softmax(2).masked_fill(no_component, 0)
    data, noisy, output, inv_var, _ = tables
    v = _per_step(inv_var, r.dtype, grad.ndim - 1)
    scale = -v * weight * grad.to(r.dtype).unsqueeze(2)  # [B, K, S, *loc]
    scale = scale.unsqueeze(3) if per_location else scale.reshape(*scale.shape, *[1] * (r.ndim - 3))
    # A step without weight passes no gradient, even where its residual is infinite.
    grad_r = torch.where(scale == 0, 0, scale * r)  # [B, K, S, C, *spatial]

    def gradient_of(needed: bool, table: Tensor, like: Tensor | None) -> Tensor:
        if not needed or like is None:
            return x.new_empty(0)
        shape = (*like.shape[:3], *r.shape[3:])
        gradient = (grad_r * _per_step(table, r.dtype, x.ndim)).sum_to_size(shape)
        return gradient.to(like.dtype).contiguous()

    grad_x = gradient_of(output_mask[0], data, x[:, None, None])
    grad_output = gradient_of(output_mask[1], output, model_output)
    skipped = model_output.shape[3] - x.shape[1]
    if output_mask[1] and skipped > 0:
        shape = (*grad_output.shape[:3], skipped, *x.shape[2:])
        grad_output = torch.cat((grad_output, grad_output.new_zeros(shape)), 3)
    if output_mask[0]:
        grad_x = grad_x.reshape(x.shape)
    return grad_x, grad_output, gradient_of(output_mask[2], noisy, x_t)


def empty_state(shape: tuple[int, ...], reduction: str, device: torch.device) -> Tensor:
    """State of `shape` = [B, K, *loc] before any step, float64 [3 or 2, B, K, *loc]."""
    rows = 3 if reduction == "mixture" else 2
    state = torch.zeros(rows, *shape, dtype=torch.float64, device=device)
    if reduction == "mixture":
        state[0] = -math.inf
    return state


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
    """Add a chunk of S >= 1 steps of `classes` (None: all) to `count` [K] and `state`, in place."""
    r = _residual(x, model_output, x_t, tables)
    steps = _step_log_likelihood(r, tables, per_location)
    if classes is None:
        classes = torch.arange(count.shape[0], device=count.device)
    add_steps(steps.double(), classes, reduction, count, state)


def add_steps(steps: Tensor, classes: Tensor, reduction: str, count: Tensor, state: Tensor) -> None:
    """Add l [B, K of the chunk, S, *loc] of `classes` to `count` and `state`, in place."""
    if reduction == "mixture":
        center = steps.amax(2)
        w = torch.exp(steps - _finite(center).unsqueeze(2))
        chunk = torch.stack((center, w.sum(2), w.square().sum(2)))
    else:
        center = steps.mean(2)
        chunk = torch.stack((center, (steps - center.unsqueeze(2)).square().sum(2)))
    old_count = count.index_select(0, classes)
    chunk_count = torch.full_like(old_count, steps.shape[2])
    merged = merge_states(old_count, state.index_select(2, classes), chunk_count, chunk, reduction)
    state.index_copy_(2, classes, merged)
    count.index_copy_(0, classes, old_count + chunk_count)


def merge_states(
    count: Tensor, state: Tensor, other_count: Tensor, other_state: Tensor, reduction: str
) -> Tensor:
    """State of the steps of both; counts [K], states as `empty_state`'s. Associative."""
    if reduction == "mixture":
        center, weight, squares = state
        other_center, other_weight, other_squares = other_state
        largest = torch.maximum(center, other_center)
        scale = torch.exp(center - _finite(largest))
        other_scale = torch.exp(other_center - _finite(largest))
        merged_weight = scale * weight + other_scale * other_weight
        merged_squares = scale.square() * squares + other_scale.square() * other_squares
        return torch.stack((largest, merged_weight, merged_squares))
    center, squares = state
    other_center, other_squares = other_state
    weight = _per_class(count, state)
    other_weight = _per_class(other_count, state)
    total = (weight + other_weight).clamp(min=1)
    mean = (weight * center + other_weight * other_center) / total
    between = (other_center - center).square() * weight * other_weight / total
    return torch.stack((mean, squares + other_squares + between))


def state_log_likelihood(count: Tensor, state: Tensor, reduction: str) -> Tensor:
    """L of the steps seen; -inf for a class without any. -> [B, K, *loc] float64"""
    n = _per_class(count, state)
    if reduction == "mixture":
        center, weight, _ = state
        return center + weight.log() - n.clamp(min=1).log()
    center, _ = state
    return torch.where(n == 0, -math.inf, center)


def state_effective_components(count: Tensor, state: Tensor, reduction: str) -> Tensor:
    """Kish's (sum w)^2 / sum w^2, which is S for the equal weights of "mean".

    0 for a class without a component. -> [B, K, *loc] float64
    """
    if reduction == "mean":
        return _per_class(count, state).expand_as(state[0]).clone()
    _, weight, squares = state
    return torch.where(squares == 0, 0, weight.square() / squares)


def state_standard_error(count: Tensor, state: Tensor, reduction: str) -> Tensor:
    """Standard error of L; NaN for S < 2. -> [B, K, *loc] float64

    sqrt(squares / (S (S - 1))) ("mean"), sqrt(max(0, squares / weight^2 - 1 / S)) ("mixture").
    """
    n = _per_class(count, state)
    if reduction == "mean":
        _, squares = state
        variance = squares / (n * (n - 1))
    else:
        _, weight, squares = state
        variance = (squares / weight.square() - 1 / n).clamp(min=0)
    return torch.where(n < 2, math.nan, variance.sqrt())


def empty_pairs(shape: tuple[int, ...], device: torch.device) -> Tensor:
    """Moments of pairs of classes before any step, float64 [B, *loc, K, K]; `shape`: [B, K, *loc].

    Of classes k and l, "mean" keeps the sum over steps of (d - mean of d)^2 with d = l_k - l_l, and
    "mixture" the sum of w_k w_l.
    """
    batch, classes, *locations = shape
    sizes = (batch, *locations, classes, classes)
    return torch.zeros(sizes, dtype=torch.float64, device=device)


def add_to_pairs(
    pairs: Tensor, steps: Tensor, count: Tensor, center: Tensor, new_center: Tensor, reduction: str
) -> Tensor:
    """Moments of pairs of classes with the steps [B, K, S, *loc] added.

    `count` [K] and `center` [B, K, *loc] of the classes' states were those before.
    """
    if reduction == "mixture":
        w = torch.exp(steps - _finite(new_center).unsqueeze(2)).movedim((1, 2), (-2, -1))
        return recentre_pairs(pairs, count, center, new_center, reduction) + w @ w.mT
    moved = _moved_steps(count, center, new_center).unsqueeze(2)
    columns = torch.cat((steps - new_center.unsqueeze(2), moved), 2)
    return pairs + _squared_differences(columns)


def recentre_pairs(
    pairs: Tensor, count: Tensor, center: Tensor, new_center: Tensor, reduction: str
) -> Tensor:
    """Moments of pairs whose classes' centers [B, K, *loc] become those of more steps.

    "mean" adds what the `count` [K] steps of both are off the new means. Moments of the same
    centers add up.
    """
    if reduction == "mixture":
        scale = torch.exp(center - _finite(new_center)).movedim(1, -1)  # [B, *loc, K]
        return pairs * scale.unsqueeze(-1) * scale.unsqueeze(-2)
    moved = _moved_steps(count, center, new_center)
    return pairs + _squared_differences(moved.unsqueeze(2))


def state_paired_standard_error(
    count: Tensor,
    state: Tensor,
    pairs: Tensor,
    joint: Tensor,
    leader: Tensor,
    reduction: str,
) -> Tensor:
    """Standard error of L_k - L_leader; leader [B, *loc]. -> [B, K, *loc] float64

    With S steps, sqrt(sum (d - mean d)^2 / (S (S - 1))) ("mean") or by the delta method
    sqrt(sum_s (p_k - p_leader)^2), p = softmax_s(l) ("mixture"). NaN for S < 2, and where the two
    classes have not had all their steps in common (`joint` [K, K] of `count` [K]).
    """
    own_row = leader[..., None, None].expand(*leader.shape, 1, pairs.shape[-1])
    row = pairs.gather(-2, own_row).squeeze(-2)  # [B, *loc, K]
    n = count.double()
    if reduction == "mean":
        variance = row / (n * (n - 1))
    else:
        weight = state[1].movedim(1, -1)
        of_leader = weight.gather(-1, leader.unsqueeze(-1))
        own = pairs.diagonal(dim1=-2, dim2=-1)
        leading = own.gather(-1, leader.unsqueeze(-1))
        variance = own / weight.square() + leading / of_leader.square()
        variance = (variance - 2 * row / (weight * of_leader)).clamp(min=0)
    together = (joint[leader] == count) & (count == count[leader].unsqueeze(-1))
    return torch.where(together & (n >= 2), variance.sqrt(), math.nan).movedim(-1, 1)


def _moved_steps(count: Tensor, center: Tensor, new_center: Tensor) -> Tensor:
    """How far `count` steps are off a new mean, all together; 0 without steps. -> [B, K, *loc]"""
    n = count.double().reshape(-1, *[1] * (center.ndim - 2))
    return torch.where(n == 0, 0, n.sqrt() * (center - new_center))


def _squared_differences(columns: Tensor) -> Tensor:
    """sum_s (c_ks - c_ls)^2 of [B, K, S, *loc]. -> [B, *loc, K, K]"""
    columns = columns.movedim((1, 2), (-2, -1))
    mode = "donot_use_mm_for_euclid_dist"
    return torch.cdist(columns, columns, compute_mode=mode).square()


def _residual(x: Tensor, model_output: Tensor, x_t: Tensor | None, tables: Tensor) -> Tensor:
    """r = a x + b x_t + c o, over the first C channels of o. -> [B, K, S, C, *spatial]"""
    dtype = accumulation_dtype(x)
    a, b, c = (_per_step(table, dtype, x.ndim) for table in tables[:3])
    r = a * x.to(dtype)[:, None, None] + c * model_output[:, :, :, : x.shape[1]].to(dtype)
    return r if x_t is None else r + b * x_t.to(dtype)


def _step_log_likelihood(r: Tensor, tables: Tensor, per_location: bool) -> Tensor:
    """l = sum(-v r^2 / 2 + n) over C, and over locations that are not kept. -> [B, K, S, *loc]"""
    reduced = r.shape[3:4] if per_location else r.shape[3:]
    squares = r.square().sum(tuple(range(3, 3 + len(reduced))))
    v, n = (_per_step(table, r.dtype, squares.ndim - 2) for table in tables[3:])
    return -0.5 * v * squares + n * reduced.numel()


def _per_step(table: Tensor, dtype: torch.dtype, ndim: int) -> Tensor:
    """[S] -> [S, 1, ...] with `ndim` axes."""
    return table.to(dtype).reshape(-1, *[1] * (ndim - 1))


def _finite(center: Tensor) -> Tensor:
    """Replace -inf by 0: exp(-inf - -inf) would be NaN, exp(-inf - 0) is the 0 that is meant."""
    return center.masked_fill(center == -math.inf, 0)


def _per_class(count: Tensor, state: Tensor) -> Tensor:
    """[K] -> [K, *1], to broadcast with [B, K, *loc]."""
    return count.double().reshape(-1, *[1] * (state.ndim - 3))
