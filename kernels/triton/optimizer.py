"""Optimizer step fused with the combination of gradients and the moving average of the parameters.

With h = sum_i c_i g_i, see `genrep_fast.reference.optimizer`:

    m <- m + (1 - beta1) (h - m),    v <- beta2 v + (1 - beta2) h^2
    param <- (1 - lr weight_decay) param
             - lr / (1 - beta1^step) m / (sqrt(v / (1 - beta2^step)) + eps)
    ema <- ema + (1 - ema_decay) (param - ema)

For n gradients of N elements: reads n + 4 and writes 4 elements for each of N (n + 3 and 3 without
the average), 2n + 16 FLOPs: bound by memory. What depends on the step's number alone is worked out
in float64 before, the rest in float32.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .alignment import combined, weights_of_group
from .multi_tensor import CHUNK, by_loss, chunk_pointers, locate, plan, upload


def adamw_step(
    params: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    emas: list[Tensor],
    gradients: list[Tensor | None],
    coefficients: Tensor,
    groups: list[int],
    weights: list[float],
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    eps: float,
    weight_decay: float,
    ema_decay: float,
    found_inf: Tensor | None,
) -> None:
    """Update `params`, `exp_avgs`, `exp_avg_sqs`, `emas` (empty: none) in place; see the reference.

    Of `steps` and `lr` on the CPU, a CUDA graph keeps the values at its capture.
    """
    by_list = by_loss(gradients, len(groups))
    lists = [*by_list, params, exp_avgs, exp_avg_sqs, emas or [None] * len(params)]
    device = coefficients.device
    with torch.cuda.device_of(coefficients):
        tables = plan(lists, groups, len(coefficients), device)
        coefficients = coefficients.contiguous()
        # There are none where no tensor needs them.
        weights = tuple(weights) or (0.0,) * len(by_list)
        factors = _step_factors(steps, lr, beta1, beta2, weight_decay, device)
        for chunks, dtypes, aligned in tables.launches:
            adamw_step_kernel[(len(chunks),)](
                chunks,
                tables.rows,
                coefficients,
                weights,
                factors,
                1 - beta1,
                beta2,
                1 - beta2,
                eps,
                1 - ema_decay,
                found_inf,
                dtypes,
                aligned,
                CHUNK,
                BLOCK=1024,
                num_warps=8,
            )


def _step_factors(
    steps: list[Tensor],
    lr: Tensor,
    beta1: float,
    beta2: float,
    weight_decay: float,
    device: torch.device,
) -> Tensor:
    """float32 [T, 3]: 1 - lr weight_decay, lr / (1 - beta1^step), sqrt(1 - beta2^step).

    Worked out in float64 where the scalars lie.
    """
    if any(scalar.device.type != "cpu" for scalar in (lr, *steps)):
        steps = [upload(step, device) for step in steps]
        lr = upload(lr, device)
    steps = torch.stack(steps).double()
    lr = lr.double()
    columns = [
        (1 - lr * weight_decay).expand_as(steps),
        lr / (1 - beta1**steps),
        (1 - beta2**steps).sqrt(),
    ]
    return upload(torch.stack(columns, dim=1).float(), device)


@triton.jit
def _lerp(start, end, weight):
    """start + weight (end - start), exactly `end` for weight 1."""
    difference = end - start
    return tl.where(weight < 0.5, start + weight * difference, end - (1 - weight) * difference)


@triton.jit(
    do_not_specialize_on_alignment=[
        "chunks_ptr",
        "rows_ptr",
        "coefficients_ptr",
        "factors_ptr",
        "found_inf_ptr",
    ]
)
def adamw_step_kernel(
    chunks_ptr,
    rows_ptr,
    coefficients_ptr,
    weights,
    factors_ptr,
    first_weight,
    second_decay,
    second_weight,
    eps,
    ema_weight,
    found_inf_ptr,
    DTYPES: tl.constexpr,
    ALIGNED: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One chunk of a parameter, its state and its average, the last four of the lists."""
    N: tl.constexpr = len(DTYPES) - 4
    if found_inf_ptr is not None and tl.load(found_inf_ptr) != 0:
        return
    row_ptr, row, chunk = locate(chunks_ptr, rows_ptr, N + 4, CHUNK)
    pointers, count = chunk_pointers(row_ptr, chunk * CHUNK, DTYPES, ALIGNED)
    row_weights = weights_of_group(tl.load(row_ptr + N + 5), coefficients_ptr, weights, N)
    decay = tl.load(factors_ptr + 3 * row)
    step_size = tl.load(factors_ptr + 3 * row + 1)
    root_correction = tl.load(factors_ptr + 3 * row + 2)
    for offset in range(0, CHUNK, BLOCK):
        offsets = offset + tl.arange(0, BLOCK)
        mask = offsets < count
        param = tl.load(pointers[N] + offsets, mask=mask).to(tl.float32)
        exp_avg = tl.load(pointers[N + 1] + offsets, mask=mask).to(tl.float32)
        exp_avg_sq = tl.load(pointers[N + 2] + offsets, mask=mask).to(tl.float32)
        gradient = combined(pointers, offsets, mask, row_weights, N, DTYPES)
        exp_avg = _lerp(exp_avg, gradient, first_weight)
        exp_avg_sq = second_decay * exp_avg_sq + second_weight * gradient * gradient
        update = tl.div_rn(exp_avg, tl.div_rn(tl.sqrt_rn(exp_avg_sq), root_correction) + eps)
        param = (decay * param - step_size * update).to(DTYPES[N])
        tl.store(pointers[N] + offsets, param, mask=mask)
        tl.store(pointers[N + 1] + offsets, exp_avg.to(DTYPES[N + 1]), mask=mask)
        tl.store(pointers[N + 2] + offsets, exp_avg_sq.to(DTYPES[N + 2]), mask=mask)
        if DTYPES[N + 3] is not None:
            ema = tl.load(pointers[N + 3] + offsets, mask=mask).to(tl.float32)
            ema = _lerp(ema, param.to(tl.float32), ema_weight)
            tl.store(pointers[N + 3] + offsets, ema.to(DTYPES[N + 3]), mask=mask)
