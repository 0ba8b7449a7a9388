"""Scoring operators: log-likelihood of images under every class, and the streaming update."""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from .._moved import forward
from ..checks import check_choice, check_device, check_flag, check_float64_like, check_floating
from ..coefficients.tables import StepCoefficients
from ..dispatch.operators import define_operator
from ..dispatch.selection import insisted_backend, use_backend
from ..reference import scoring as reference

REDUCTIONS = ("mixture", "mean")
_CHUNK = "Tensor x, Tensor model_output, Tensor? x_t, Tensor tables"


def log_likelihood(
    x: Tensor,
    model_output: Tensor,
    coefficients: StepCoefficients,
    x_t: Tensor | None = None,
    *,
    reduction: str = "mixture",
    per_location: bool = False,
) -> Tensor:
    """Log-likelihood (nats) of every image under every class, from outputs at S scored steps.

    l = sum(-inv_var r^2 / 2 + log_norm) with r = data x + noisy x_t + output o; L = logsumexp_s l -
    log S, the mixture of a chain's kernels (GenRep, ICLR 2026), or the mean of l over the steps
    (Diffusion Classifier, ICCV 2023). Differentiable in x, model_output and x_t, as long as the
    result is not changed in place.

    Args:
        x: clean images or latents [B, C, *spatial]; float32, bfloat16, float16 or float64.
        model_output: [B, K, S, C', *spatial], 1 allowed for B and K, or [K, S, C', *spatial] shared
            by the batch; C' >= C, further channels (a learned variance) are skipped. float64 if and
            only if `x` is.
        coefficients: tables of the S steps, on x's device.
        x_t: noisy images, or the training targets where the coefficients say so; like
            `model_output`, with C channels and 1 allowed on every leading axis. None where
            `coefficients.noisy` is zero.
        reduction: "mixture" or "mean".
        per_location: sum over C alone.

    Returns:
        [B, K], or [B, K, *spatial] with `per_location`; float32 (float64 for float64 inputs). A
        "mixture" of no steps is -inf.

    Raises:
        TypeError: for other dtypes, or float64 mixed with others.
        ValueError: for shapes that do not fit, mixed devices, a missing `x_t`, a step that cannot
            be scored, or the "mean" of no steps.
    """
    check_choice(reduction, "reduction", REDUCTIONS)
    check_flag(per_location, "per_location")
    arguments = chunk_arguments(x, model_output, coefficients, x_t)
    if reduction == "mean" and len(coefficients) == 0:
        raise ValueError('reduction "mean" needs at least one step, got coefficients of 0 steps')
    return _log_likelihood(*arguments, reduction, per_location)[0]


def step_log_likelihoods(
    x: Tensor, model_output: Tensor, x_t: Tensor | None, tables: Tensor, per_location: bool
) -> Tensor:
    """l of every step of `chunk_arguments`, [B, K, S, *loc]; a step at a time."""
    steps = []
    for s in range(tables.shape[1]):
        noisy = x_t
        if x_t is not None and x_t.shape[2] > 1:
            noisy = x_t[:, :, s : s + 1]
        step = (model_output[:, :, s : s + 1], noisy, tables[:, s : s + 1])
        steps.append(_log_likelihood(x, *step, "mean", per_location)[0])
    return torch.stack(steps, 2)


def chunk_arguments(
    x: Tensor, model_output: Tensor, coefficients: StepCoefficients, x_t: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Check the inputs of `log_likelihood` and make the operators' leading arguments of them.

    model_output and x_t get x.ndim + 2 axes.
    """
    if not isinstance(coefficients, StepCoefficients):
        raise TypeError(f"coefficients must be StepCoefficients, got {type(coefficients).__name__}")
    check_floating(x, "x")
    if x.ndim < 2:
        raise ValueError(f"x must be [B, C, *spatial], got {tuple(x.shape)}")
    model_output = _leading_axes(model_output, "model_output", x)
    if x_t is not None:
        x_t = _leading_axes(x_t, "x_t", x)
    coefficients.require_scorable()
    steps, channels = len(coefficients), x.shape[1]
    if model_output.shape[2] != steps:
        raise ValueError(
            f"model_output must have the coefficients' {steps} steps, got {model_output.shape[2]}"
        )
    if model_output.shape[3] < channels:
        raise ValueError(
            f"model_output must have at least x's {channels} channels, got {model_output.shape[3]}"
        )
    if x_t is not None:
        _check_noisy(x_t, model_output.shape[1], steps, channels)
    elif coefficients.needs_noisy:
        raise ValueError("x_t must be given: the coefficients' noisy is not zero")
    check_device(x.device, model_output=model_output, x_t=x_t, coefficients=coefficients.data)
    return x, model_output, x_t, coefficients.scoring_tables(reference.accumulation_dtype(x))


def result_shape(
    x: Tensor, model_output: Tensor, x_t: Tensor | None, per_location: bool
) -> tuple[int, ...]:
    """[B, K, *loc] of the likelihoods of `chunk_arguments`."""
    classes = model_output.shape[1]
    if x_t is not None and classes == 1:
        classes = x_t.shape[1]
    return (x.shape[0], classes, *(x.shape[2:] if per_location else ()))


def _leading_axes(tensor: Tensor, name: str, x: Tensor) -> Tensor:
    """[K, S, ...] -> [1, K, S, ...]; the checks that model_output and x_t have in common."""
    check_float64_like(tensor, name, x, "x")
    if tensor.ndim == x.ndim + 1:
        tensor = tensor.unsqueeze(0)
    if tensor.ndim != x.ndim + 2:
        raise ValueError(
            f"{name} must have x's {x.ndim} axes and 2 more, or 1 more where shared by the batch, "
            f"got {tuple(tensor.shape)}"
        )
    if tensor.shape[0] not in (1, x.shape[0]):
        raise ValueError(
            f"{name} must have x's batch size {x.shape[0]} or 1, got {tensor.shape[0]}"
        )
    if tensor.shape[4:] != x.shape[2:]:
        raise ValueError(
            f"{name} must have x's spatial shape {tuple(x.shape[2:])}, "
            f"got {tuple(tensor.shape[4:])}"
        )
    return tensor


def _check_noisy(x_t: Tensor, classes: int, steps: int, channels: int) -> None:
    """Check the axes of x_t [1|B, 1|K, 1|S, C, *spatial] against those of model_output and x."""
    if x_t.shape[2] not in (1, steps):
        raise ValueError(f"x_t must have 1 step or the coefficients' {steps}, got {x_t.shape[2]}")
    if x_t.shape[3] != channels:
        raise ValueError(f"x_t must have x's {channels} channels, got {x_t.shape[3]}")
    if x_t.shape[1] != classes and 1 not in (x_t.shape[1], classes):
        raise ValueError(f"x_t must have model_output's {classes} classes or 1, got {x_t.shape[1]}")


def _log_likelihood_fake(
    x: Tensor, model_output: Tensor, x_t: Tensor | None, tables: Tensor, *options: Any
) -> tuple[Tensor, Tensor]:
    reduction, per_location = options
    shape = result_shape(x, model_output, x_t, per_location)
    result = x.new_empty(shape, dtype=reference.accumulation_dtype(x))
    return result, torch.empty_like(result) if reduction == "mixture" else result.new_empty(0)


def _log_likelihood_backward_fake(*arguments: Any) -> tuple[Tensor, ...]:
    x, model_output, x_t, *_, output_mask = arguments[3:]
    gradients = []
    for tensor, needed in zip((x, model_output, x_t), output_mask, strict=True):
        if needed:
            gradients.append(torch.empty(tensor.shape, dtype=tensor.dtype, device=x.device))
        else:
            gradients.append(x.new_empty(0))
    return tuple(gradients)


def _setup_log_likelihood(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.reduction, ctx.per_location = inputs
    ctx.save_for_backward(*output, *tensors)
    ctx.backend = insisted_backend()


def _differentiate_log_likelihood(ctx: Any, grad: Tensor, _: Tensor) -> tuple:
    mask = list(ctx.needs_input_grad[:3])
    # Gradients of gradients (create_graph=True) come from the reference, whose operations autograd
    # knows.
    backward = _log_likelihood_backward
    if torch.is_grad_enabled():
        backward = reference.log_likelihood_backward
    # The backend of forward, which returns the bits of l that forward computed.
    with use_backend(ctx.backend) if ctx.backend else contextlib.nullcontext():
        gradients = backward(grad, *ctx.saved_tensors, ctx.reduction, ctx.per_location, mask)
    pairs = zip(gradients, mask, strict=True)
    return *(gradient if needed else None for gradient, needed in pairs), None, None, None


_log_likelihood_backward = define_operator(
    f"log_likelihood_backward(Tensor grad, Tensor log_likelihood, Tensor remainder, {_CHUNK}, "
    "str reduction, bool per_location, bool[3] output_mask) -> (Tensor, Tensor, Tensor)",
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
score_update = define_operator(
    f"score_update({_CHUNK}, Tensor? classes, str reduction, bool per_location, "
    "Tensor(a!) count, Tensor(b!) state) -> ()",
    reference=reference.score_update,
    fake=lambda *arguments: None,
    vmap=False,
)


__getattr__ = forward(__name__, ("ops.posterior",))
