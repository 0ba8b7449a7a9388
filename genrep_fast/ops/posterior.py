"""Bayes' rule over log-likelihoods: posterior, evidence, temperature, and the distillation loss."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from ..checks import (
    INTEGERS,
    check_choice,
    check_dense,
    check_device,
    check_floating,
    check_positive,
)
from ..dispatch.operators import define_operator, in_function_transform
from ..reference import posterior as reference
from ..reference.scoring import accumulation_dtype


def posterior(
    log_likelihood: Tensor, *, log_prior: Tensor | None = None, temperature: float = 1.0
) -> Tensor:
    """Log-posterior log p(y|x) = log_softmax_y( L / temperature + log p(y) ).

    Differentiable in both tensors.

    Args:
        log_likelihood: L [B, K, *spatial] or [B, K], floating point.
        log_prior: log p(y), [K], or [B, K] with 1 allowed for B, the same at every location; -inf
            excludes a class; None: uniform.
        temperature: positive number.

    Returns:
        Shape of `log_likelihood`; float32 (float64 for float64). NaN for an image where no class
        has L / temperature + log p(y) above -inf.

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes, devices, or a temperature that is not a
            positive number.
    """
    log_prior = _check_scores(log_likelihood, log_prior, temperature)
    return _posterior(log_likelihood, log_prior, float(temperature))


def log_evidence(log_likelihood: Tensor, *, log_prior: Tensor | None = None) -> Tensor:
    """Log-evidence log p(x) = logsumexp_y( L + log p(y) ) in nats, the out-of-distribution score.

    Differentiable in both tensors.

    Args:
        log_likelihood: L [B, K, *spatial] or [B, K], floating point.
        log_prior: normalised log p(y), [K], or [B, K] with 1 allowed for B, the same at every
            location; None: uniform, -log K.

    Returns:
        [B] or [B, *spatial]; float32 (float64 for float64).

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes or devices.
    """
    return reference.log_evidence(log_likelihood, _check_scores(log_likelihood, log_prior))


def distillation_loss(
    student_logits: Tensor,
    log_likelihood: Tensor,
    *,
    log_prior: Tensor | None = None,
    temperature: float = 1.0,
    reduction: str = "batchmean",
) -> Tensor:
    """KL(p || softmax(student_logits)) in nats, p = softmax_y( L / temperature + log p(y) ).

    Differentiable in both logits and L.

    Args:
        student_logits: [B, K] or [B, K, *spatial], floating point.
        log_likelihood: L, the same shape; detach it for a fixed teacher.
        log_prior: log p(y), [K], or [B, K] with 1 allowed for B, the same at every location; None:
            uniform. It carries no gradient.
        temperature: positive number.
        reduction: "batchmean" divides the sum by B, "mean" by B and the number of locations, "none"
            does not reduce. An empty batch has the loss 0.

    Returns:
        A scalar, or [B, *spatial] for "none"; float32 (float64 where either input is).

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes or devices, a temperature that is not a
            positive number, or a `log_prior` that requires a gradient.
    """
    log_prior = _check_scores(log_likelihood, log_prior, temperature)
    check_floating(student_logits, "student_logits")
    if student_logits.shape != log_likelihood.shape:
        raise ValueError(
            f"student_logits must have log_likelihood's shape {tuple(log_likelihood.shape)}, "
            f"got {tuple(student_logits.shape)}"
        )
    check_device(log_likelihood.device, student_logits=student_logits)
    if log_prior is not None and log_prior.requires_grad:
        raise ValueError(
            "log_prior carries no gradient in distillation_loss, but it requires one: detach it"
        )
    check_choice(reduction, "reduction", ("batchmean", "mean", "none"))
    if accumulation_dtype(student_logits, log_likelihood) == torch.float64:
        student_logits = student_logits.double()
        log_likelihood = log_likelihood.double()
    loss = _distillation_loss(student_logits, log_likelihood, log_prior, float(temperature))
    if reduction == "none":
        return loss  # [B, *spatial]
    divisor = max(loss.shape[0] if reduction == "batchmean" else loss.numel(), 1)
    return loss.mean() if divisor == loss.numel() else loss.sum() / divisor


def fit_temperature(
    log_likelihood: Tensor, labels: Tensor, *, log_prior: Tensor | None = None
) -> float:
    """Temperature of `posterior` with the least negative log-likelihood of the labels.

    Guo et al., ICML 2017. It is found in float64. The negative log-likelihood is convex in 1 /
    temperature, so its derivative is bisected. Where every label already has the greatest
    likelihood it only falls towards temperature 0, which would claim certainty: then the largest
    temperature within half a nat (over all labels together) of that limit is returned. Where it
    only falls towards infinity, the temperature is the largest of the search, 1e8 times the mean
    gap between classes; where all classes are tied, 1.

    Args:
        log_likelihood: L [B, K, *spatial] or [B, K], floating point.
        labels: true classes [B, *spatial] or [B], integers.
        log_prior: log p(y), [K], or [B, K] with 1 allowed for B, the same at every location; None:
            uniform.

    Returns:
        The temperature, a Python float (the one place here that waits for the device).

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes or devices, no labels, a label out of range,
            NaN, or a label whose class has likelihood or prior 0.
        RuntimeError: inside a transform of `torch.func`.
    """
    if in_function_transform():
        raise RuntimeError(
            "fit_temperature returns a Python float, which no transform of torch.func sees: "
            "call it outside"
        )
    log_prior = _check_scores(log_likelihood, log_prior)
    # [N, K] each, relative to the label's class.
    scores, prior = _calibration_rows(log_likelihood, labels, log_prior)
    gaps = scores[scores.isfinite()].abs().mean()
    if gaps == 0:
        return 1.0

    def negative_log_likelihood(beta: Tensor) -> Tensor:
        return torch.logsumexp(beta * scores + prior, 1).mean()

    def slope(beta: Tensor) -> Tensor:
        probability = torch.softmax(beta * scores + prior, 1)
        return torch.where(probability == 0, 0, probability * scores).sum(1).mean()

    # Of log beta.
    low = -math.log(1e8) - gaps.log()
    high = math.log(1e8) - gaps.log()
    separable = (scores.masked_fill(prior == -math.inf, -math.inf) <= 0).all()
    limit = negative_log_likelihood(high.exp()) + 0.5 / scores.shape[0]
    for _ in range(64):
        middle = (low + high) / 2
        beta = middle.exp()
        too_small = torch.where(separable, negative_log_likelihood(beta) > limit, slope(beta) < 0)
        low = torch.where(too_small, middle, low)
        high = torch.where(too_small, high, middle)
    return (-high).exp().item()


def _check_scores(
    log_likelihood: Tensor, log_prior: Tensor | None, temperature: float = 1.0
) -> Tensor | None:
    """Check the arguments that Bayes' rule has; return log_prior as [1|B, K, *1]."""
    check_floating(log_likelihood, "log_likelihood")
    shape = log_likelihood.shape
    if len(shape) < 2 or shape[1] == 0:
        raise ValueError(
            f"log_likelihood must be [B, K, *spatial] with at least one class, got {tuple(shape)}"
        )
    check_positive(temperature, "temperature")
    if log_prior is None:
        return None
    check_floating(log_prior, "log_prior")
    fits = log_prior.ndim in (1, 2) and log_prior.shape[-1] == shape[1]
    if not fits or log_prior.shape[:-1] not in ((), (1,), shape[:1]):
        raise ValueError(
            f"log_prior must be [{shape[1]}] or [{shape[0]}, {shape[1]}], "
            f"got {tuple(log_prior.shape)}"
        )
    check_device(log_likelihood.device, log_prior=log_prior)
    log_prior = log_prior.to(accumulation_dtype(log_likelihood))
    return log_prior.reshape(-1, shape[1], *[1] * (len(shape) - 2))


def _calibration_rows(
    log_likelihood: Tensor, labels: Tensor, log_prior: Tensor | None
) -> tuple[Tensor, Tensor]:
    """L and log p(y) relative to the label's class, float64 [N, K] each, N = B times locations."""
    shape = log_likelihood.shape
    check_dense(labels, "labels")
    if labels.dtype not in INTEGERS:
        raise TypeError(f"labels must be a tensor of integers, got {labels.dtype}")
    if labels.shape != (shape[0], *shape[2:]):
        raise ValueError(
            f"labels must be {(shape[0], *shape[2:])} for a log_likelihood of {tuple(shape)}, "
            f"got {tuple(labels.shape)}"
        )
    if labels.numel() == 0:
        raise ValueError("labels must hold at least one label, got none")
    check_device(log_likelihood.device, labels=labels)
    if log_likelihood.is_meta:
        raise ValueError("log_likelihood must have values, got a tensor on the device meta")
    if labels.min() < 0 or labels.max() >= shape[1]:
        raise ValueError(
            f"labels must lie in 0...{shape[1] - 1}, "
            f"got {labels.min().item()}...{labels.max().item()}"
        )
    if log_prior is None:
        log_prior = log_likelihood.new_zeros(shape[:2] + (1,) * (len(shape) - 2))

    def relative(values: Tensor, name: str) -> Tensor:
        rows = values.detach().double().expand(shape).movedim(1, -1).reshape(-1, shape[1])
        if rows.isnan().any():
            raise ValueError(f"{name} must not be NaN")
        own = rows.gather(1, labels.reshape(-1, 1).long())
        if not own.isfinite().all():
            raise ValueError(
                f"{name} must be finite at the labels' classes, "
                f"got {own[~own.isfinite()][0].item()}"
            )
        return rows - own

    return relative(log_likelihood, "log_likelihood"), relative(log_prior, "log_prior")


def _setup_posterior(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, log_prior, ctx.temperature = inputs
    ctx.save_for_backward(output, log_prior)
    ctx.dtype = inputs[0].dtype


def _differentiate_posterior(ctx: Any, grad: Tensor) -> tuple:
    output, log_prior = ctx.saved_tensors
    grad_scores = grad - output.exp() * grad.sum(1, keepdim=True)
    needs_likelihood, needs_prior, _ = ctx.needs_input_grad
    grad_likelihood = grad_prior = None
    if needs_likelihood:
        grad_likelihood = (grad_scores / ctx.temperature).to(ctx.dtype)
    if needs_prior:
        grad_prior = grad_scores.sum_to_size(log_prior.shape).to(log_prior.dtype)
    return grad_likelihood, grad_prior, None


def _setup_distillation(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_distillation(ctx: Any, grad: Tensor) -> tuple:
    mask = list(ctx.needs_input_grad[:2])
    backward = _distillation_loss_backward
    # Gradients of gradients come from the reference.
    if torch.is_grad_enabled():
        backward = reference.distillation_loss_backward
    gradients = backward(grad, *ctx.saved_tensors, ctx.temperature, mask)
    pairs = zip(gradients, mask, strict=True)
    return *(gradient if needed else None for gradient, needed in pairs), None, None


def _distillation_loss_backward_fake(
    grad: Tensor,
    student_logits: Tensor,
    log_likelihood: Tensor,
    log_prior: Tensor | None,
    temperature: float,
    mask: list[bool],
) -> tuple[Tensor, Tensor]:
    def gradient_of(tensor: Tensor, needed: bool) -> Tensor:
        if not needed:
            return grad.new_empty(0)
        return torch.empty(tensor.shape, dtype=tensor.dtype, device=grad.device)

    needs_logits, needs_likelihood = mask
    return gradient_of(student_logits, needs_logits), gradient_of(log_likelihood, needs_likelihood)


_posterior = define_operator(
    "posterior(Tensor log_likelihood, Tensor? log_prior, float temperature) -> Tensor",
    reference=reference.posterior,
    fake=lambda scores, log_prior, temperature: torch.empty(
        scores.shape, dtype=accumulation_dtype(scores), device=scores.device
    ),
    backward=_differentiate_posterior,
    setup_context=_setup_posterior,
)
_distillation_loss_backward = define_operator(
    "distillation_loss_backward(Tensor grad, Tensor student_logits, Tensor log_likelihood, "
    "Tensor? log_prior, float temperature, bool[2] output_mask) -> (Tensor, Tensor)",
    reference=reference.distillation_loss_backward,
    fake=_distillation_loss_backward_fake,
)
_distillation_loss = define_operator(
    "distillation_loss(Tensor student_logits, Tensor log_likelihood, Tensor? log_prior, "
    "float temperature) -> Tensor",
    reference=reference.distillation_loss,
    fake=lambda logits, scores, log_prior, temperature: scores.new_empty(
        (scores.shape[0], *scores.shape[2:]), dtype=accumulation_dtype(scores)
    ),
    backward=_differentiate_distillation,
    setup_context=_setup_distillation,
)
