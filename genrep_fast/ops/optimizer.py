"""Fused optimizer step: combined gradients, AdamW, and the moving average of the parameters."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from ..checks import (
    check_ema_decay,
    check_hyperparameters,
    check_learning_rate,
    check_length,
    check_scalar,
    check_tensor,
    check_writable,
)
from ..dispatch.operators import define_operator
from ..memory_overlap import check_no_overlap
from ..reference import optimizer as reference
from .alignment import GradientLayout, Gradients, check_coefficients, check_gradients, numbered

adamw_step_operator = define_operator(
    "adamw_step(Tensor(a!)[] params, Tensor(b!)[] exp_avgs, Tensor(c!)[] exp_avg_sqs, "
    "Tensor(d!)[] emas, Tensor?[] gradients, Tensor coefficients, int[] groups, "
    "float[] weights, Tensor[] steps, Tensor lr, float beta1, float beta2, float eps, "
    "float weight_decay, float ema_decay, Tensor? found_inf) -> ()",
    reference=reference.adamw_step,
    fake=lambda *arguments: None,
    dtype_from=(0, 1, 2, 3, 4),
    vmap=False,
)


@torch.no_grad()
def adamw_step(
    params: Sequence[Tensor],
    gradients: Sequence[Gradients],
    coefficients: Tensor,
    groups: Sequence[int | None] | None = None,
    *,
    weights: Sequence[float] | None = None,
    exp_avgs: Sequence[Tensor],
    exp_avg_sqs: Sequence[Tensor],
    steps: Sequence[Tensor],
    lr: float | Tensor,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 1e-2,
    emas: Sequence[Tensor] | None = None,
    ema_decay: float = 0.999,
    found_inf: Tensor | None = None,
) -> None:
    """Combine the gradients of n losses, take one AdamW step, and move an average, all in place.

    The step goes along the combined gradient; the average is an exponential one of the parameters.

    Equals `genrep_fast.combine`, `torch.optim.AdamW` (Loshchilov and Hutter, ICLR 2019) and
    ``ema.lerp_(param, 1 - ema_decay)`` one after the other, without writing the combined gradient.
    A parameter that no loss reaches is left as it is, with its state and its average.

    Args:
        params: T dense tensors (float32, bfloat16, float16 or float64), updated.
        gradients, coefficients, groups, weights: as in `genrep_fast.combine`; gradients have the
            shapes of `params`.
        exp_avgs, exp_avg_sqs: T tensors each, running means of the gradient and of its square,
            shapes as `params`, updated.
        steps: T tensors without axes on the CPU or the parameters' device: the number of this
            update, 1 for the first; not updated.
        lr: learning rate, a number or a tensor without axes on the CPU or the parameters' device.
        betas, eps, weight_decay: as in `torch.optim.AdamW`.
        emas: T tensors that follow the parameters, shapes as `params`, updated; None for no
            average.
        ema_decay: share of the old average that is kept, 0 to 1.
        found_inf: floating-point tensor of one element on the parameters' device; where it is not
            0, nothing is changed (decided on the device, as in `torch.amp.GradScaler`). None:
            always update.

    Raises:
        TypeError: for an argument of a wrong type, or a tensor of a wrong dtype.
        ValueError: for a wrong length, shape, device, layout, group index or hyperparameter, and
            for a tensor that is updated and overlaps itself or any other tensor of the arguments;
            nothing is changed then.
    """
    names = numbered(gradients)
    layout = check_gradients(gradients, names, groups)
    coefficients, weights = check_coefficients(coefficients, weights, len(gradients), layout)
    check_learning_rate(lr, layout.device)
    check_hyperparameters(betas, eps, weight_decay)
    check_ema_decay(ema_decay)
    _check_found_inf(found_inf, layout.device)
    written = {"params": params, "exp_avgs": exp_avgs, "exp_avg_sqs": exp_avg_sqs}
    if emas is not None:
        written["emas"] = emas
    _check_state(written, steps, layout)
    reached = layout.reached
    lists: dict[str, Gradients] = dict(zip(names, gradients, strict=True))
    read: dict[str, Tensor | Gradients] = dict(_only({**lists, "steps": steps}, reached))
    for name, value in (("coefficients", coefficients), ("lr", lr), ("found_inf", found_inf)):
        if isinstance(value, Tensor):
            read[name] = value
    check_no_overlap(_only(written, reached), read)
    if not reached:
        return
    lr = lr.reshape(()) if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)
    adamw_step_operator(
        [params[t] for t in reached],
        [exp_avgs[t] for t in reached],
        [exp_avg_sqs[t] for t in reached],
        [emas[t] for t in reached] if emas is not None else [],
        [loss_gradients[t] for loss_gradients in gradients for t in reached],
        coefficients,
        [layout.groups[t] for t in reached],
        weights,
        [steps[t] for t in reached],
        lr,
        *map(float, betas),
        eps,
        weight_decay,
        ema_decay,
        found_inf,
    )


def _only(
    lists: Mapping[str, Sequence[Tensor | None]], indices: Sequence[int]
) -> dict[str, Sequence[Tensor | None]]:
    """`lists` with None at all but `indices`."""
    if all(len(tensors) == len(indices) for tensors in lists.values()):
        return dict(lists)
    kept = set(indices)
    result: dict[str, Sequence[Tensor | None]] = {}
    for name, tensors in lists.items():
        result[name] = [tensor if t in kept else None for t, tensor in enumerate(tensors)]
    return result


def _check_state(
    written: Mapping[str, Sequence[Tensor]], steps: Sequence[Tensor], layout: GradientLayout
) -> None:
    """Check what a step updates, and its numbers, of the tensors that some loss reaches."""
    for name, tensors in (*written.items(), ("steps", steps)):
        check_length(tensors, name, len(layout.samples))
    for t, sample in enumerate(layout.samples):
        if sample is None:
            continue
        for name, tensors in written.items():
            check_writable(tensors[t], f"{name}[{t}]", sample.shape, layout.device)
        check_scalar(steps[t], f"steps[{t}]", layout.device)


def _check_found_inf(found_inf: Tensor | None, device: torch.device) -> None:
    if found_inf is None:
        return
    check_tensor(found_inf, "found_inf", None, device)
    if found_inf.numel() != 1:
        raise ValueError(f"found_inf must have one element, got shape {tuple(found_inf.shape)}")
