"""The definition of the optimizer step.

It is fused with the combination of gradients and the moving average of the parameters.

With the combined gradient h = sum_i c_i g_i (see `genrep_fast.reference.alignment`), AdamW
(Loshchilov and Hutter, ICLR 2019) and an exponential moving average of the parameters:

    m <- m + (1 - beta1) (h - m)
    v <- beta2 v + (1 - beta2) h^2
    update = m / (1 - beta1^step) / (sqrt(v / (1 - beta2^step)) + eps)
    param <- (1 - lr weight_decay) param - lr update
    ema <- ema + (1 - ema_decay) (param - ema)
"""

from __future__ import annotations

import torch
from torch import Tensor

from .alignment import weighted_sum


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
    """Update `params`, `exp_avgs`, `exp_avg_sqs` and `emas` (empty: none) in place.

    `gradients`, `coefficients`, `groups` and `weights` are those of `combine`. `steps` (this
    update's number, from 1) and `lr` are 0-dim tensors, and enter in float64: 1 - 0.999 has four
    digits in float32. The rest is computed in float32, or in float64 where a gradient or the
    parameter is, and rounded where it is stored; the moving average follows the parameter as
    stored. Where `found_inf` is not 0, every tensor keeps its values.
    """

    def store(target: Tensor, value: Tensor) -> None:
        if found_inf is not None:
            value = torch.where(found_inf.reshape(()) != 0, target, value.to(target.dtype))
        target.copy_(value)

    lr = lr.double()
    tensors = zip(params, exp_avgs, exp_avg_sqs, steps, groups, strict=True)
    for t, (param, exp_avg, exp_avg_sq, step, group) in enumerate(tensors):
        row = weights if group < 0 else coefficients[group]
        gradient = weighted_sum(gradients[t :: len(groups)], row)
        dtype = torch.promote_types(gradient.dtype, param.dtype)
        gradient = gradient.to(dtype)
        step = step.double()
        first = torch.lerp(exp_avg.to(dtype), gradient, 1 - beta1)
        second = beta2 * exp_avg_sq.to(dtype) + (1 - beta2) * gradient * gradient
        update = first / (second.sqrt() / (1 - beta2**step).sqrt() + eps)
        store(exp_avg, first)
        store(exp_avg_sq, second)
        store(param, (1 - lr * weight_decay) * param.to(dtype) - lr / (1 - beta1**step) * update)
        if emas:
            store(emas[t], torch.lerp(emas[t].to(dtype), param.to(dtype), 1 - ema_decay))
