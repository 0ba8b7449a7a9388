"""What is read from diffusers' schedulers.

Noise levels, pairs of timesteps, and options that no table can express.

Schedulers are recognised by class name, so that importing this module never imports diffusers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import DTYPES, INTEGERS, check_dense

_FAMILIES = {
    "DDPMScheduler": "ddpm",
    "DDIMScheduler": "ddim",
    "FlowMatchEulerDiscreteScheduler": "flow",
}

# What diffusers calls them where it has another name.
_ALIASES = {"flow_prediction": "flow"}

_PARAMETERIZATIONS = {
    "ddpm": ("epsilon", "v_prediction", "sample"),
    "ddim": ("epsilon", "v_prediction", "sample"),
    "flow": ("flow",),
}


def scheduler_family(scheduler: Any) -> str:
    """ "ddpm", "ddim" or "flow", by the name of the class or of an ancestor."""
    for ancestor in type(scheduler).__mro__:
        if ancestor.__name__ in _FAMILIES:
            return _FAMILIES[ancestor.__name__]
    raise TypeError(
        f"scheduler must be one of diffusers' {', '.join(_FAMILIES)}, "
        f"got {type(scheduler).__name__}"
    )


def noise_levels(
    scheduler: Any, name: str, timesteps: list[float], final: float | None = None
) -> Tensor:
    """ᾱ, or the flow's s, of each timestep, float64.

    `final` stands for negative timesteps, which raise without it.
    """
    if scheduler_family(scheduler) == "flow":
        if scheduler.config.get("invert_sigmas", False):
            raise ValueError(
                "scheduler has invert_sigmas=True, which is not supported: set invert_sigmas=False"
            )
        # Read, never recomputed: set_timesteps shifts the levels that the constructor has shifted
        # already.
        levels = dict(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False))
    else:
        levels = dict(enumerate(alphas_cumprod(scheduler).tolist()))
        if not all(isinstance(timestep, int) for timestep in timesteps):
            raise TypeError(
                f"{name} must be integers for {type(scheduler).__name__}, got {timesteps}"
            )
    unknown = [timestep for timestep in timesteps if timestep not in levels]
    if final is not None:
        unknown = [timestep for timestep in unknown if timestep >= 0]
    if unknown:
        raise ValueError(f"{name}: the scheduler does not have {unknown}")
    found = [final if timestep < 0 else levels[timestep] for timestep in timesteps]
    return torch.tensor(found, dtype=torch.float64)


def final_level(scheduler: Any) -> float:
    """The noise level after the last step: ᾱ, or the flow's s."""
    family = scheduler_family(scheduler)
    if family == "flow":
        return 0.0
    if family == "ddim" and not scheduler.config.set_alpha_to_one:
        return alphas_cumprod(scheduler)[0].item()
    return 1.0


def alphas_cumprod(scheduler: Any) -> Tensor:
    """ᾱ [T] in float64; where it is held in half precision, rebuilt from the betas."""
    held = scheduler.alphas_cumprod.detach().cpu()
    if held.dtype in (torch.float32, torch.float64):
        return held.double()
    betas = scheduler.betas.detach().cpu()
    rebuilt = (1 - betas.double()).cumprod(0)
    rounding = torch.finfo(held.dtype)
    smallest = rounding.tiny * rounding.eps
    same = torch.allclose(rebuilt, held.double(), rtol=rounding.eps, atol=smallest)
    if betas.dtype not in (torch.float32, torch.float64) or not same:
        raise ValueError(
            f"scheduler.alphas_cumprod is {held.dtype}, too coarse for coefficients, "
            "and scheduler.betas does not give it in float32: "
            "keep the scheduler's tables in float32"
        )
    return rebuilt


def alpha_sigma(scheduler: Any, level: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ of x_s = α·x + σ·ε."""
    if scheduler_family(scheduler) == "flow":
        alpha = 1 - level
        sigma = level
    else:
        alpha = level.sqrt()
        sigma = (1 - level).sqrt()
    if (sigma == 0).any():
        raise ValueError("timesteps: a step without noise (sigma = 0) has no coefficients")
    return alpha, sigma


def step_pairs(
    scheduler: Any,
    timesteps: Tensor | Sequence[float],
    previous_timesteps: Tensor | Sequence[float] | None,
) -> tuple[list[float], list[float]]:
    """Timesteps, and where each of their steps leads; -1 is the final noise level."""
    timesteps = as_list("timesteps", timesteps)
    if previous_timesteps is None:
        chain = scheduler.timesteps.tolist()
        successors = dict(zip(chain, [*chain[1:], -1], strict=True))
        unknown = [timestep for timestep in timesteps if timestep not in successors]
        if unknown:
            raise ValueError(
                f"timesteps {unknown} are not in scheduler.timesteps: pass previous_timesteps, "
                "or call set_timesteps first"
            )
        return timesteps, [successors[timestep] for timestep in timesteps]
    previous = as_list("previous_timesteps", previous_timesteps)
    if len(previous) != len(timesteps):
        raise ValueError(
            "previous_timesteps must have as many entries as timesteps, "
            f"got {len(previous)} and {len(timesteps)}"
        )
    backwards = [pair for pair in zip(timesteps, previous, strict=True) if pair[1] >= pair[0]]
    if backwards:
        raise ValueError(
            f"previous_timesteps must lie below timesteps, got (timestep, previous) {backwards}"
        )
    return timesteps, previous


def as_list(name: str, values: Tensor | Sequence[float]) -> list[float]:
    """Check that `values` are numbers in one dimension; return them as a list."""
    try:
        values = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be numbers in one dimension, got {values!r}") from error
    check_dense(values, name)
    if values.requires_grad:
        raise ValueError(f"{name} must not require a gradient, which tables lack: detach it")
    if values.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on the device meta")
    if values.ndim != 1 or values.dtype not in (*DTYPES, *INTEGERS):
        raise TypeError(
            f"{name} must be a one-dimensional sequence of numbers, "
            f"got {values.dtype} of shape {tuple(values.shape)}"
        )
    return values.tolist()


def require_parameterization(scheduler: Any, parameterization: str | None) -> str:
    """What the denoiser predicts: `parameterization`, else the scheduler's type.

    Diffusers' "flow_prediction" is "flow".
    """
    family = scheduler_family(scheduler)
    supported = _PARAMETERIZATIONS[family]
    given = parameterization
    if given is None:
        # Flow schedulers have no prediction type.
        given = scheduler.config.get("prediction_type", "flow" if family == "flow" else None)
    if isinstance(given, str):
        given = _ALIASES.get(given, given)
    if given not in supported:
        raise ValueError(
            f"parameterization of {type(scheduler).__name__} must be one of "
            f"{', '.join(supported)}, got {given!r}"
        )
    return given


def require_variance(scheduler: Any, variance: str | None) -> str:
    """ "fixed_small" or "fixed_large": `variance`, else the scheduler's type."""
    given = variance if variance is not None else scheduler.config.variance_type
    if variance is None and given == "fixed_small_log":
        return "fixed_small"
    if given not in ("fixed_small", "fixed_large"):
        raise ValueError(
            f'variance must be "fixed_small" or "fixed_large", got {given!r}: '
            "a learned variance fits no table, choose the one that scores"
        )
    return given


def require_unset(scheduler: Any, **options: Any) -> None:
    """Raise ValueError for an option that this scheduler does not have."""
    for name, value in options.items():
        if value:
            raise ValueError(f"{name} does not exist for {type(scheduler).__name__}, got {value!r}")


def refuse_clipping(scheduler: Any) -> None:
    """Raise ValueError for a scheduler that clips, which no table can express."""
    for option in ("clip_sample", "thresholding"):
        if scheduler.config.get(option, False):
            raise ValueError(
                f"scheduler has {option}=True, which no table can express: set {option}=False, "
                'or compute the clipped means yourself and pass parameterization="mean"'
            )
