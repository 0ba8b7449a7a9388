"""The reverse-step operator: one step of a chain, its noise, and the score of the same step.

The noise is counter-based; inputs are read once.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ..checks import (
    check_dense,
    check_device,
    check_float64_like,
    check_floating,
    check_in_range,
    require,
)
from ..coefficients.tables import StepCoefficients
from ..dispatch.operators import define_operator, in_function_transform, requires_grad
from ..reference import reverse_step as reference
from ..reference.scoring import accumulation_dtype


def reverse_step(
    x_t: Tensor,
    model_output: Tensor,
    coefficients: StepCoefficients,
    step: int,
    *,
    seed: int,
    chain_ids: Tensor,
    x: Tensor | None = None,
    std_scale: Tensor | None = None,
) -> tuple[Tensor, Tensor | None]:
    """One step x′ = mean + std·z of B chains, and the log-likelihood of `x` under its kernel.

    No gradient. The mean and std are the scheduler's own (``mean_noisy``, ``mean_output``,
    ``std``); the score follows the five scoring tables. z is Philox 4×32-10 noise (Salmon et al.,
    SC 2011) that depends on seed, chain id, step and element alone: any batch size and order draws
    the same bits, any backend the same numbers to 10⁻⁶.

    Args:
        x_t: noisy samples [B, C, *spatial]; float32, bfloat16, float16 or float64.
        model_output: [B, C', *spatial], C' ≥ C; channels after the first C (a learned variance) are
            skipped. float64 if and only if x_t is.
        coefficients: tables from `StepCoefficients.chain`, on x_t's device.
        step: row of the tables.
        seed: in [0, 2⁶⁴).
        chain_ids: int64 [B] in [0, 2³²), one number for each chain of the whole run, whatever its
            place in the batch.
        x: clean samples to score, of x_t's shape, or None.
        std_scale: positive, broadcastable to x_t; multiplies the std of the step and of the score.
            None: 1.

    Returns:
        x_prev of x_t's shape and dtype, and the score [B] in nats, float32 (float64 for float64),
        or None without x.

    Raises:
        TypeError: for wrong dtypes.
        ValueError: for shapes that do not fit, mixed devices, tables without a step of their own,
            an index out of range, and for `x` where the row's standard deviation is too small to
            score.
    """
    check_floating(x_t, "x_t")
    if x_t.ndim < 2:
        raise ValueError(f"x_t must be [B, C, *spatial], got {tuple(x_t.shape)}")
    _check_model_output(model_output, x_t)
    _check_coefficients(coefficients, step, x_t)
    check_in_range(seed, "seed", 2**64, "2**64")
    _check_chain_ids(chain_ids, x_t)
    if x is not None:
        _check_sample("x", x, x_t)
        if x.shape != x_t.shape:
            raise ValueError(f"x must have x_t's shape {tuple(x_t.shape)}, got {tuple(x.shape)}")
        coefficients.require_scorable(step)
    if std_scale is not None:
        _check_std_scale(std_scale, x_t)
        std_scale = std_scale.expand(x_t.shape)
    # The schema's integers are signed: the upper half of the seeds is their two's complement.
    signed_seed = int(seed)
    if signed_seed >= 2**63:
        signed_seed -= 2**64
    tables = coefficients.tables
    dtype = accumulation_dtype(x_t)
    if tables.dtype != dtype:
        tables = tables.to(dtype)
    arguments = (x_t, model_output, tables, int(step), signed_seed, chain_ids, x, std_scale)
    # Switching gradients off takes a third as long as a small step.
    samples = (x_t, model_output, tables, x, std_scale)
    if torch.is_grad_enabled() and any(map(requires_grad, samples)):
        with torch.no_grad():
            x_prev, score = _reverse_step(*arguments)
    else:
        x_prev, score = _reverse_step(*arguments)
    return x_prev, None if x is None else score


def _check_model_output(model_output: Tensor, x_t: Tensor) -> None:
    _check_sample("model_output", model_output, x_t)
    if model_output.shape == x_t.shape:
        return
    fits = model_output.ndim == x_t.ndim and model_output.shape[0] == x_t.shape[0]
    if not fits or model_output.shape[2:] != x_t.shape[2:]:
        raise ValueError(
            f"model_output must be {tuple(x_t.shape)} up to further channels, "
            f"got {tuple(model_output.shape)}"
        )
    if model_output.shape[1] < x_t.shape[1]:
        raise ValueError(
            f"model_output must have at least x_t's {x_t.shape[1]} channels, "
            f"got {model_output.shape[1]}"
        )


def _check_std_scale(std_scale: Tensor, x_t: Tensor) -> None:
    _check_sample("std_scale", std_scale, x_t)
    sizes = zip(std_scale.shape[::-1], x_t.shape[::-1], strict=False)
    if std_scale.ndim > x_t.ndim or any(own not in (1, full) for own, full in sizes):
        raise ValueError(
            f"std_scale must broadcast to x_t's shape {tuple(x_t.shape)}, "
            f"got {tuple(std_scale.shape)}"
        )
    require((std_scale > 0).all(), "std_scale must be positive")


def _check_sample(name: str, tensor: Tensor, x_t: Tensor) -> None:
    check_float64_like(tensor, name, x_t, "x_t")
    if tensor.device != x_t.device:
        check_device(x_t.device, **{name: tensor})


def _check_coefficients(coefficients: StepCoefficients, step: int, x_t: Tensor) -> None:
    if not isinstance(coefficients, StepCoefficients):
        raise TypeError(f"coefficients must be StepCoefficients, got {type(coefficients).__name__}")
    coefficients.require_step()
    check_device(x_t.device, coefficients=coefficients.data)
    check_in_range(step, "step", len(coefficients))


def _check_chain_ids(chain_ids: Tensor, x_t: Tensor) -> None:
    check_dense(chain_ids, "chain_ids")
    if chain_ids.dtype != torch.int64:
        raise TypeError(f"chain_ids must be an int64 tensor, got {chain_ids.dtype}")
    if chain_ids.shape != x_t.shape[:1]:
        raise ValueError(
            f"chain_ids must be [{x_t.shape[0]}], one a chain, got {tuple(chain_ids.shape)}"
        )
    check_device(x_t.device, chain_ids=chain_ids)
    # Reading the smallest and the largest one takes half as long as the operations below.
    on_cpu = type(chain_ids) is Tensor and chain_ids.device.type == "cpu" and len(chain_ids) > 0
    if on_cpu and not torch.compiler.is_compiling() and not in_function_transform():
        low, high = torch.aminmax(chain_ids)
        if low.item() >= 0 and high.item() < 2**32:
            return
    # Of a number in [0, 2³²) the upper half of the bits is 0, and of no other one.
    require(((chain_ids >> 32) == 0).all(), "chain_ids must lie in [0, 2**32)")


def _reverse_step_fake(x_t: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
    *_, x, _ = arguments
    scored = 0 if x is None else x_t.shape[0]
    return x_t.new_empty(x_t.shape), x_t.new_empty(scored, dtype=accumulation_dtype(x_t))


_reverse_step = define_operator(
    "reverse_step(Tensor x_t, Tensor model_output, Tensor tables, SymInt step, SymInt seed, "
    "Tensor chain_ids, Tensor? x, Tensor? std_scale) -> (Tensor, Tensor)",
    reference=reference.reverse_step,
    fake=_reverse_step_fake,
)
