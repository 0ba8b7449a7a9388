"""Scoring operators: log-likelihood of images under every class, posterior, evidence, distillation loss and the streaming update."""

from __future__ import annotations

import contextlib
import math
import numbers
from typing import Any

import torch
from torch import Tensor

from ..backends import define_operator, insisted_backend, use_backend
from ..coefficients import StepCoefficients
from ..reference import scoring as reference

_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_CHUNK = "Tensor x, Tensor model_output, Tensor? x_t, Tensor data, Tensor noisy, Tensor output, Tensor inv_var, Tensor log_norm"


def log_likelihood(
    x: Tensor,
    model_output: Tensor,
    coefficients: StepCoefficients,
    x_t: Tensor | None = None,
    *,
    reduction: str = "mixture",
    per_location: bool = False,
) -> Tensor:
    """Log-likelihood (nats) of every image under every class, from the denoiser's outputs at S scored steps.

    l = sum(-inv_var r^2 / 2 + log_norm) with r = data x + noisy x_t + output o; L = logsumexp_s l - log S, the mixture of a chain's kernels
    (GenRep, ICLR 2026), or the mean of l over the steps (Diffusion Classifier, ICCV 2023). Differentiable in x, model_output and x_t, as
    long as the result is not changed in place.

    Args:
        x: clean images or latents [B, C, *spatial]; float32, bfloat16, float16 or float64.
        model_output: [B, K, S, C', *spatial], 1 allowed for B and K, or [K, S, C', *spatial] shared by the batch; C' >= C, further channels
            (a learned variance) are skipped. float64 if and only if `x` is.
        coefficients: tables of the S steps, on x's device.
        x_t: noisy images, or the training targets where the coefficients say so; like `model_output`, with C channels and 1 allowed on
            every leading axis. None where `coefficients.noisy` is zero.
        reduction: "mixture" or "mean".
        per_location: sum over C alone.

    Returns:
        [B, K], or [B, K, *spatial] with `per_location`; float32 (float64 for float64 inputs). A "mixture" of no steps is -inf.

    Raises:
        TypeError: for other dtypes, or float64 mixed with others.
        ValueError: for shapes that do not fit, mixed devices, a missing `x_t`, a step that cannot be scored, or the "mean" of no steps.
    """
    check_reduction(reduction)
    arguments = chunk_arguments(x, model_output, coefficients, x_t)
    if reduction == "mean" and len(coefficients) == 0:
        raise ValueError('reduction "mean" needs at least one step, got coefficients of 0 steps')
    return _log_likelihood(*arguments, reduction, per_location)[0]


def posterior(log_likelihood: Tensor, *, log_prior: Tensor | None = None, temperature: float = 1.0) -> Tensor:
    """Log-posterior log p(y|x) = log_softmax_y( L / temperature + log p(y) ), differentiable in both tensors.

    Args:
        log_likelihood: L [B, K, *spatial] or [B, K], floating point.
        log_prior: log p(y), [K], or [B, K] with 1 allowed for B, the same at every location; -inf excludes a class; None: uniform.
        temperature: positive number.

    Returns:
        Shape of `log_likelihood`; float32 (float64 for float64). NaN for an image where no class has L / temperature + log p(y) above -inf.

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes, devices, or a temperature that is not a positive number.
    """
    return _posterior(log_likelihood, _check_scores(log_likelihood, log_prior, temperature), float(temperature))


def log_evidence(log_likelihood: Tensor, *, log_prior: Tensor | None = None) -> Tensor:
    """Log-evidence log p(x) = logsumexp_y( L + log p(y) ) in nats, the out-of-distribution score; differentiable in both tensors.

    Args:
        log_likelihood: L [B, K, *spatial] or [B, K], floating point.
        log_prior: normalised log p(y), [K], or [B, K] with 1 allowed for B, the same at every location; None: uniform, -log K.

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
    """KL(p || softmax(student_logits)) in nats, p = softmax_y( L / temperature + log p(y) ); differentiable in both logits and L.

    Args:
        student_logits: [B, K] or [B, K, *spatial], floating point.
        log_likelihood: L, the same shape; detach it for a fixed teacher.
        log_prior: log p(y), [K], or [B, K] with 1 allowed for B, the same at every location; None: uniform. It carries no gradient.
        temperature: positive number.
        reduction: "batchmean" divides the sum by B, "mean" by B and the number of locations, "none" does not reduce. An
            empty batch has the loss 0.

    Returns:
        A scalar, or [B, *spatial] for "none"; float32 (float64 where either input is).

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes or devices, a temperature that is not a positive number, or a `log_prior` that
            requires a gradient.
    """
    log_prior = _check_scores(log_likelihood, log_prior, temperature)
    _check_floating(student_logits, "student_logits")
    if student_logits.shape != log_likelihood.shape:
        raise ValueError(
            f"student_logits must have log_likelihood's shape {tuple(log_likelihood.shape)}, got {tuple(student_logits.shape)}"
        )
    _check_device(log_likelihood.device, student_logits=student_logits)
    if log_prior is not None and log_prior.requires_grad:
        raise ValueError("log_prior carries no gradient in distillation_loss, but it requires one: detach it")
    if reduction not in ("batchmean", "mean", "none"):
        raise ValueError(f'reduction must be "batchmean", "mean" or "none", got {reduction!r}')
    if reference.accumulation_dtype(student_logits, log_likelihood) == torch.float64:
        student_logits, log_likelihood = student_logits.double(), log_likelihood.double()
    loss = _distillation_loss(student_logits, log_likelihood, log_prior, float(temperature))  # [B, *spatial]
    if reduction == "none":
        return loss
    divisor = max(loss.shape[0] if reduction == "batchmean" else loss.numel(), 1)
    return loss.mean() if divisor == loss.numel() else loss.sum() / divisor


def fit_temperature(log_likelihood: Tensor, labels: Tensor, *, log_prior: Tensor | None = None) -> float:
    """Temperature of `posterior` with the least negative log-likelihood of the labels (Guo et al., ICML 2017), found in float64.

    The negative log-likelihood is convex in 1 / temperature, so its derivative is bisected. Where every label already has the greatest
    likelihood it only falls towards temperature 0, which would claim certainty: then the largest temperature within half a nat (over all
    labels together) of that limit is returned. Where it only falls towards infinity, the temperature is the largest of the search, 1e8
    times the mean gap between classes; where all classes are tied, 1.

    Args:
        log_likelihood: L [B, K, *spatial] or [B, K], floating point.
        labels: true classes [B, *spatial] or [B], integers.
        log_prior: log p(y), [K], or [B, K] with 1 allowed for B, the same at every location; None: uniform.

    Returns:
        The temperature, a Python float (the one place here that waits for the device).

    Raises:
        TypeError, ValueError: for wrong dtypes, shapes or devices, no labels, a label out of range, NaN, or a label whose class has
            likelihood or prior 0.
    """
    log_prior = _check_scores(log_likelihood, log_prior)
    scores, prior = _calibration_rows(log_likelihood, labels, log_prior)  # [N, K] relative to the label's class
    gaps = scores[scores.isfinite()].abs().mean()
    if gaps == 0:
        return 1.0

    def negative_log_likelihood(beta: Tensor) -> Tensor:
        return torch.logsumexp(beta * scores + prior, 1).mean()

    def slope(beta: Tensor) -> Tensor:
        probability = torch.softmax(beta * scores + prior, 1)
        return torch.where(probability == 0, 0, probability * scores).sum(1).mean()

    low, high = (-math.log(1e8) - gaps.log()), (math.log(1e8) - gaps.log())
    separable = (scores.masked_fill(prior == -math.inf, -math.inf) <= 0).all()
    limit = negative_log_likelihood(high.exp()) + 0.5 / scores.shape[0]
    for _ in range(64):
        middle = (low + high) / 2
        beta = middle.exp()
        too_small = torch.where(separable, negative_log_likelihood(beta) > limit, slope(beta) < 0)
        low, high = torch.where(too_small, middle, low), torch.where(too_small, high, middle)
    return (-high).exp().item()


def chunk_arguments(
    x: Tensor, model_output: Tensor, coefficients: StepCoefficients, x_t: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Check the inputs of `log_likelihood` and bring model_output and x_t to x.ndim + 2 axes: the operators' leading arguments."""
    if not isinstance(coefficients, StepCoefficients):
        raise TypeError(f"coefficients must be StepCoefficients, got {type(coefficients).__name__}")
    _check_floating(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x must be [B, C, *spatial], got {tuple(x.shape)}")
    model_output = _leading_axes(model_output, "model_output", x)
    if x_t is not None:
        x_t = _leading_axes(x_t, "x_t", x)
    coefficients.require_scorable()
    steps, channels = len(coefficients), x.shape[1]
    if model_output.shape[2] != steps:
        raise ValueError(f"model_output must have the coefficients' {steps} steps, got {model_output.shape[2]}")
    if model_output.shape[3] < channels:
        raise ValueError(f"model_output must have at least x's {channels} channels, got {model_output.shape[3]}")
    if x_t is None:
        if coefficients.needs_noisy:
            raise ValueError("x_t must be given: the coefficients' noisy is not zero")
    else:
        if x_t.shape[2] not in (1, steps):
            raise ValueError(f"x_t must have 1 step or the coefficients' {steps}, got {x_t.shape[2]}")
        if x_t.shape[3] != channels:
            raise ValueError(f"x_t must have x's {channels} channels, got {x_t.shape[3]}")
        if x_t.shape[1] != model_output.shape[1] and 1 not in (x_t.shape[1], model_output.shape[1]):
            raise ValueError(f"x_t must have model_output's {model_output.shape[1]} classes or 1, got {x_t.shape[1]}")
    _check_device(x.device, model_output=model_output, x_t=x_t, coefficients=coefficients.data)
    return x, model_output, x_t, *coefficients.scoring_tables(reference.accumulation_dtype(x))


def result_shape(x: Tensor, model_output: Tensor, x_t: Tensor | None, per_location: bool) -> tuple[int, ...]:
    """[B, K, *loc] of the likelihoods of `chunk_arguments`."""
    classes = model_output.shape[1]
    if x_t is not None and classes == 1:
        classes = x_t.shape[1]
    return (x.shape[0], classes, *(x.shape[2:] if per_location else ()))


def check_reduction(reduction: str) -> None:
    """Raise ValueError for a reduction that does not exist."""
    if reduction not in ("mixture", "mean"):
        raise ValueError(f'reduction must be "mixture" or "mean", got {reduction!r}')


def require(condition: Tensor, message: str, got: Tensor | None = None) -> None:
    """Raise ValueError where `condition` (a boolean scalar) on the CPU is False; elsewhere, and when compiled, assert without waiting."""
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        torch._assert_async(condition, message)
    elif not condition:
        raise ValueError(message if got is None else f"{message}, got {got.tolist()}")


def _leading_axes(tensor: Tensor, name: str, x: Tensor) -> Tensor:
    """[K, S, ...] -> [1, K, S, ...]; the checks that model_output and x_t have in common."""
    _check_floating(tensor, name)
    if (tensor.dtype == torch.float64) != (x.dtype == torch.float64):
        raise TypeError(f"{name} must be float64 if and only if x is, got {tensor.dtype} and x of {x.dtype}")
    if tensor.ndim == x.ndim + 1:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim != x.ndim + 2:
        raise ValueError(f"{name} must have x's {x.ndim} axes and 2 more, or 1 more where shared by the batch, got {tuple(tensor.shape)}")
    if tensor.shape[0] not in (1, x.shape[0]):
        raise ValueError(f"{name} must have x's batch size {x.shape[0]} or 1, got {tensor.shape[0]}")
    if tensor.shape[4:] != x.shape[2:]:
        raise ValueError(f"{name} must have x's spatial shape {tuple(x.shape[2:])}, got {tuple(tensor.shape[4:])}")
    return tensor


def _check_floating(tensor: Tensor, name: str) -> None:
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    if tensor.dtype not in _DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def _check_device(device: torch.device, **tensors: Tensor | None) -> None:
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(f"{name} must be on {device} like the other tensors, got {tensor.device}")


def _check_scores(log_likelihood: Tensor, log_prior: Tensor | None, temperature: float = 1.0) -> Tensor | None:
    """Check the arguments that Bayes' rule has; return log_prior as [1|B, K, *1]."""
    _check_floating(log_likelihood, "log_likelihood")
    shape = log_likelihood.shape
    if len(shape) < 2 or shape[1] == 0:
        raise ValueError(f"log_likelihood must be [B, K, *spatial] with at least one class, got {tuple(shape)}")
    if not isinstance(temperature, numbers.Real):
        raise TypeError(f"temperature must be a number, got {type(temperature).__name__}")
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature must be positive and finite, got {temperature}")
    if log_prior is None:
        return None
    _check_floating(log_prior, "log_prior")
    if log_prior.ndim not in (1, 2) or log_prior.shape[-1] != shape[1] or log_prior.shape[:-1] not in ((), (1,), shape[:1]):
        raise ValueError(f"log_prior must be [{shape[1]}] or [{shape[0]}, {shape[1]}], got {tuple(log_prior.shape)}")
    _check_device(log_likelihood.device, log_prior=log_prior)
    log_prior = log_prior.to(reference.accumulation_dtype(log_likelihood))
    return log_prior.reshape(-1, shape[1], *[1] * (len(shape) - 2))


def _calibration_rows(log_likelihood: Tensor, labels: Tensor, log_prior: Tensor | None) -> tuple[Tensor, Tensor]:
    """L and log p(y) relative to the label's class, float64 [N, K] each, N = B times locations"""
    shape = log_likelihood.shape
    if not isinstance(labels, Tensor) or labels.dtype not in (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8):
        raise TypeError(f"labels must be a tensor of integers, got {getattr(labels, 'dtype', type(labels).__name__)}")
    if labels.shape != (shape[0], *shape[2:]):
        raise ValueError(f"labels must be {(shape[0], *shape[2:])} for a log_likelihood of {tuple(shape)}, got {tuple(labels.shape)}")
    if labels.numel() == 0:
        raise ValueError("labels must hold at least one label, got none")
    _check_device(log_likelihood.device, labels=labels)
    if labels.min() < 0 or labels.max() >= shape[1]:
        raise ValueError(f"labels must lie in 0...{shape[1] - 1}, got {labels.min().item()}...{labels.max().item()}")
    prior = log_likelihood.new_zeros(shape[:2] + (1,) * (len(shape) - 2)) if log_prior is None else log_prior

    def relative(values: Tensor, name: str) -> Tensor:
        rows = values.detach().double().expand(shape).movedim(1, -1).reshape(-1, shape[1])
        if rows.isnan().any():
            raise ValueError(f"{name} must not be NaN")
        own = rows.gather(1, labels.reshape(-1, 1).long())
        if not own.isfinite().all():
            raise ValueError(f"{name} must be finite at the labels' classes, got {own[~own.isfinite()][0].item()}")
        return rows - own

    return relative(log_likelihood, "log_likelihood"), relative(prior, "log_prior")


def _log_likelihood_fake(x, model_output, x_t, *tables_and_options):
    *_, reduction, per_location = tables_and_options
    result = x.new_empty(result_shape(x, model_output, x_t, per_location), dtype=reference.accumulation_dtype(x))
    return result, torch.empty_like(result) if reduction == "mixture" else result.new_empty(0)


def _log_likelihood_backward_fake(grad, log_likelihood, remainder, x, model_output, x_t, *tables_and_options):
    mask = tables_and_options[-1]
    return tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device) if needed else x.new_empty(0)
        for tensor, needed in zip((x, model_output, x_t), mask, strict=True)
    )


def _setup_log_likelihood(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reduction, ctx.per_location = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.backend = insisted_backend()


def _differentiate_log_likelihood(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    mask = list(ctx.needs_input_grad[:3])
    # Gradients of gradients (create_graph=True) come from the reference, whose operations autograd knows.
    backward = reference.log_likelihood_backward if torch.is_grad_enabled() else _log_likelihood_backward
    with use_backend(ctx.backend) if ctx.backend else contextlib.nullcontext():  # whose bits of l forward had
        gradients = backward(grad, *ctx.saved_tensors, ctx.reduction, ctx.per_location, mask)
    return *(gradient if needed else None for gradient, needed in zip(gradients, mask, strict=True)), *[None] * 7


def _setup_posterior(ctx: Any, inputs: tuple, output: Tensor) -> None:
    _, log_prior, ctx.temperature = inputs
    ctx.save_for_backward(output, log_prior)
    ctx.dtype = inputs[0].dtype


def _differentiate_posterior(ctx: Any, grad: Tensor) -> tuple:
    output, log_prior = ctx.saved_tensors
    grad_scores = grad - output.exp() * grad.sum(1, keepdim=True)
    needs_likelihood, needs_prior, _ = ctx.needs_input_grad
    return (
        (grad_scores / ctx.temperature).to(ctx.dtype) if needs_likelihood else None,
        grad_scores.sum_to_size(log_prior.shape).to(log_prior.dtype) if needs_prior else None,
        None,
    )


def _setup_distillation(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.temperature = inputs
    ctx.save_for_backward(*tensors)


def _differentiate_distillation(ctx: Any, grad: Tensor) -> tuple:
    mask = list(ctx.needs_input_grad[:2])
    backward = reference.distillation_loss_backward if torch.is_grad_enabled() else _distillation_loss_backward
    gradients = backward(grad, *ctx.saved_tensors, ctx.temperature, mask)
    return *(gradient if needed else None for gradient, needed in zip(gradients, mask, strict=True)), None, None


def _distillation_loss_backward_fake(grad, student_logits, log_likelihood, log_prior, temperature, mask):
    return tuple(
        torch.empty(tensor.shape, dtype=tensor.dtype, device=grad.device) if needed else grad.new_empty(0)
        for tensor, needed in zip((student_logits, log_likelihood), mask, strict=True)
    )


_log_likelihood_backward = define_operator(
    f"log_likelihood_backward(Tensor grad, Tensor log_likelihood, Tensor remainder, {_CHUNK}, str reduction, bool per_location, "
    "bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
    reference=reference.log_likelihood_backward,
    fake=_log_likelihood_backward_fake,
)
_log_likelihood = define_operator(
    f"log_likelihood({_CHUNK}, str reduction, bool per_location) -> (Tensor, Tensor)",
    reference=reference.log_likelihood,
    fake=_log_likelihood_fake,
    backward=_differentiate_log_likelihood,
    setup_context=_setup_log_likelihood,
)
_posterior = define_operator(
    "posterior(Tensor log_likelihood, Tensor? log_prior, float temperature) -> Tensor",
    reference=reference.posterior,
    fake=lambda scores, log_prior, temperature: torch.empty(scores.shape, dtype=reference.accumulation_dtype(scores), device=scores.device),
    backward=_differentiate_posterior,
    setup_context=_setup_posterior,
)
_distillation_loss_backward = define_operator(
    "distillation_loss_backward(Tensor grad, Tensor student_logits, Tensor log_likelihood, Tensor? log_prior, float temperature, "
    "bool[2] output_mask) -> (Tensor, Tensor)",
    reference=reference.distillation_loss_backward,
    fake=_distillation_loss_backward_fake,
)
_distillation_loss = define_operator(
    "distillation_loss(Tensor student_logits, Tensor log_likelihood, Tensor? log_prior, float temperature) -> Tensor",
    reference=reference.distillation_loss,
    fake=lambda logits, scores, log_prior, temperature: scores.new_empty(
        (scores.shape[0], *scores.shape[2:]), dtype=reference.accumulation_dtype(scores)
    ),
    backward=_differentiate_distillation,
    setup_context=_setup_distillation,
)
score_update = define_operator(
    f"score_update({_CHUNK}, Tensor? classes, str reduction, bool per_location, Tensor(a!) count, Tensor(b!) state) -> ()",
    reference=reference.score_update,
    fake=lambda *arguments: None,
)
