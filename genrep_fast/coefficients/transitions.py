"""The reverse steps of diffusers' schedulers as affine maps, and the learned variance of DDPM."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedulers import (
    alpha_sigma,
    final_level,
    noise_levels,
    require_parameterization,
    require_unset,
    require_variance,
    scheduler_family,
    step_pairs,
)

# A smaller standard deviation cannot be scored: 1/σ² leaves float32's useful range and one
# component outweighs all others.
SMALLEST_STD = 1e-6
# e⁸⁰ and e⁻⁸⁰ are numbers of float32.
_LARGEST_LOG_SCALE = 80.0


class ReverseTransition(NamedTuple):
    """Reverse steps, each table [S] float64 on the CPU, before any clipping.

    The clean sample is x̂0 = sample_noisy·x_s + sample_output·o (0 where parameterization is
    "mean"), the mean is mean_sample·x̂0 + mean_noisy·x_s + mean_output·o. std moves the chain,
    score_std scores it.
    """

    sample_noisy: Tensor
    sample_output: Tensor
    mean_sample: Tensor
    mean_noisy: Tensor
    mean_output: Tensor
    std: Tensor
    score_std: Tensor


def reverse_transition(
    scheduler: Any,
    timesteps: Tensor | Sequence[float],
    *,
    parameterization: str | None = None,
    variance: str | None = None,
    eta: float = 0.0,
    previous_timesteps: Tensor | Sequence[float] | None = None,
) -> ReverseTransition:
    """The scheduler's reverse step as tables; see `StepCoefficients.chain` for the arguments.

    What raises is described there, too.
    """
    family = scheduler_family(scheduler)
    timesteps, previous = step_pairs(scheduler, timesteps, previous_timesteps)
    level = noise_levels(scheduler, "timesteps", timesteps)
    previous_level = noise_levels(
        scheduler, "previous_timesteps", previous, final=final_level(scheduler)
    )
    step_of = {"ddpm": _ddpm_step, "ddim": _ddim_step, "flow": _flow_step}[family]
    step = step_of(scheduler, level, previous_level, variance, eta)
    mean_sample, mean_noisy, mean_epsilon, std, score_std = step
    if parameterization == "mean":
        zero = torch.zeros_like(level)
        return ReverseTransition(zero, zero, zero, zero, torch.ones_like(level), std, score_std)
    parameterization = require_parameterization(scheduler, parameterization)
    alpha, sigma = alpha_sigma(scheduler, level)
    if parameterization == "epsilon" and (alpha == 0).any():
        raise ValueError(
            "timesteps: at zero terminal SNR an epsilon prediction implies no clean sample; "
            "use v_prediction or sample"
        )
    of_sample, of_epsilon = _predictions(parameterization, alpha, sigma)
    sample_noisy, sample_output = of_sample
    epsilon_noisy, epsilon_output = of_epsilon
    return ReverseTransition(
        sample_noisy,
        sample_output,
        mean_sample,
        mean_noisy + mean_epsilon * epsilon_noisy,
        mean_epsilon * epsilon_output,
        std,
        score_std,
    )


def check_sigma_floor(sigma_floor: float) -> None:
    """Check a smallest standard deviation.

    Raises TypeError for no number, and ValueError for one out of range.
    """
    if isinstance(sigma_floor, (bool, str)) or not hasattr(sigma_floor, "__float__"):
        raise TypeError(f"sigma_floor must be a number, got {sigma_floor!r}")
    if sigma_floor != 0 and not SMALLEST_STD < sigma_floor <= torch.finfo(torch.float32).max:
        raise ValueError(
            f"sigma_floor must be 0 or a number above {SMALLEST_STD}, got {sigma_floor!r}"
        )


def normal_tables(std: Tensor) -> tuple[Tensor, Tensor]:
    """inv_var 1/σ² and log_norm −½ log 2πσ² of standard deviations of any shape.

    Both are infinite where σ is too small to score.
    """
    inv_var = torch.where(std > SMALLEST_STD, std**-2, torch.inf)
    return inv_var, 0.5 * (inv_var / (2 * math.pi)).log()


def _ddpm_step(
    scheduler: Any, level: Tensor, previous: Tensor, variance: str | None, eta: float
) -> tuple[Tensor, ...]:
    require_unset(scheduler, eta=eta)
    beta = 1 - level / previous
    mean_sample = previous.sqrt() * beta / (1 - level)
    mean_noisy = (level / previous).sqrt() * (1 - previous) / (1 - level)
    if require_variance(scheduler, variance) == "fixed_large":
        score_std = beta.sqrt()
    else:
        score_std = _posterior_std(level, previous)
    # The step that ends at the clean image adds no noise, whatever the variance type.
    std = torch.where(previous == 1, 0.0, score_std)
    return mean_sample, mean_noisy, torch.zeros_like(level), std, score_std


def _ddim_step(
    scheduler: Any, level: Tensor, previous: Tensor, variance: str | None, eta: float
) -> tuple[Tensor, ...]:
    require_unset(scheduler, variance=variance)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta!r}")
    std = eta * _posterior_std(level, previous)
    mean_epsilon = (1 - previous - std**2).clamp(min=0).sqrt()
    return previous.sqrt(), torch.zeros_like(level), mean_epsilon, std, std


def _flow_step(
    scheduler: Any, level: Tensor, previous: Tensor, variance: str | None, eta: float
) -> tuple[Tensor, ...]:
    require_unset(scheduler, variance=variance, eta=eta)
    if scheduler.config.get("stochastic_sampling", False):
        raise ValueError(
            "scheduler has stochastic_sampling=True: only the Euler step is supported, "
            "set stochastic_sampling=False"
        )
    # The velocity is ε̂ − x̂0.
    step = previous - level
    zero = torch.zeros_like(level)
    return -step, torch.ones_like(level), step, zero, zero


def _posterior_std(level: Tensor, previous: Tensor) -> Tensor:
    return ((1 - level / previous) * (1 - previous) / (1 - level)).sqrt()


def _predictions(
    parameterization: str, alpha: Tensor, sigma: Tensor
) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weights of (x_s, o) in the clean sample, and in the noise, that the output implies."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if parameterization == "epsilon":
        return (1 / alpha, -sigma / alpha), (zero, one)
    if parameterization == "sample":
        return (zero, one), (1 / sigma, -alpha / sigma)
    if parameterization == "v_prediction":
        return (alpha, -sigma), (sigma, alpha)
    # Flow.
    return (one, -sigma), (one, alpha)


def learned_log_variance_ratio(scheduler: Any, timesteps: Tensor) -> Tensor | None:
    """log β̃/β of each step [S] float64; None where the variance is not learned.

    β̃ has diffusers' lower limit of 1e-20.

    Raises:
        ValueError: for variance_type "learned", the predecessor of "learned_range".
    """
    variance_type = scheduler.config.get("variance_type")
    if variance_type == "learned":
        raise ValueError(
            'scheduler has variance_type="learned", which is not supported: "learned_range" is'
        )
    if variance_type != "learned_range":
        return None
    small = reverse_transition(scheduler, timesteps, variance="fixed_small").score_std
    large = reverse_transition(scheduler, timesteps, variance="fixed_large").score_std
    return 2 * (small.clamp(min=1e-10) / large).log()


def learned_std_scale(model_output: Tensor, channels: int, log_variance_ratio: Tensor) -> Tensor:
    """The standard deviation that a "learned_range" network predicts, over √β.

    log σ² = f·log β + (1 − f)·log β̃ with f = (v + 1)/2, v the second `channels` channels of the
    output (Nichol & Dhariwal 2021, eq. 15).

    Args:
        model_output: [N, C', *spatial] with C' ≥ 2·channels.
        channels: C of the sample.
        log_variance_ratio: 0-dimensional, of the step (`learned_log_variance_ratio`).

    Returns:
        [N, channels, *spatial], float32 (float64 for float64): e⁻¹⁸, which the last steps have,
        is 0 in half precision.

    Raises:
        ValueError: for a model output without a learned variance.
    """
    if model_output.shape[1] < 2 * channels:
        raise ValueError(
            f"model_output must have {2 * channels} channels where the scheduler has "
            f"variance_type='learned_range', got {model_output.shape[1]}"
        )
    learned = model_output[:, channels : 2 * channels]
    fraction = (learned.to(torch.promote_types(learned.dtype, torch.float32)) + 1) / 2
    log_scale = 0.5 * (1 - fraction) * log_variance_ratio
    # An untrained network says anything; what it says of a step without noise must not be infinite.
    return log_scale.clamp(-_LARGEST_LOG_SCALE, _LARGEST_LOG_SCALE).exp()
