"""The noise levels of diffusers' schedulers, family by family.

Sampling needs a scheduler's step, scoring by forward noise only its noise levels: α, σ, and what
the denoiser predicts from x_s = α·x + σ·ε. `noise_schedule` finds them for every scheduler that has
them, and says for the others what to use instead.

Schedulers are recognised by class name, so that importing this module never imports diffusers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .schedulers import alphas_cumprod


class Prediction(NamedTuple):
    """What a denoiser predicts: a parameterization of the tables, or with −1 its negative."""

    parameterization: str
    sign: float = 1.0


class Scales(NamedTuple):
    """α and σ of x_s, and x_s over what the scheduler's ``add_noise`` gives; each [S] float64.

    α is that of data of unit variance, see `NoiseSchedule.data_scale`.
    """

    alpha: Tensor
    sigma: Tensor
    input_scale: Tensor


# By the names that schedulers give them.
_DENOISER = {
    "epsilon": Prediction("epsilon"),
    "v_prediction": Prediction("v_prediction"),
    "sample": Prediction("sample"),
}
_FLOW = {"flow": Prediction("flow"), "flow_prediction": Prediction("flow")}
# How many training timesteps a scheduler has that does not say.
_TRAINING_TIMESTEPS = 1000


class NoiseSchedule(NamedTuple):
    """The noise levels of a scheduler, and what they mean.

    Attributes:
        domain: the timesteps that it has, in words.
        held: the levels that the scheduler holds, by timestep.
        level_at: the level of any other timestep, None where it is none.
        scales: what levels [S] mean for x_s.
        training: the training timesteps [T] and their levels [T], from little noise to much.
        predictions: what a denoiser may predict, by the scheduler's name for it; the first is meant
            where the scheduler's configuration does not say.
        integer: whether timesteps must be integers.
        data_scale: what makes the data of unit variance in x_s = α·(data_scale·x) + σ·ε.
    """

    domain: str
    held: dict[float, float]
    level_at: Callable[[float], float | None]
    scales: Callable[[Tensor], Scales]
    training: Callable[[], tuple[Tensor, Tensor]]
    predictions: dict[str, Prediction] = _DENOISER
    integer: bool = False
    data_scale: float = 1.0


def noise_schedule(scheduler: Any) -> NoiseSchedule:
    """The noise levels of a scheduler, by the name of its class or of an ancestor.

    Raises:
        TypeError: for a scheduler without noise levels, or an unknown one.
        ValueError: for a configuration whose noise levels cannot be told.
    """
    for ancestor in type(scheduler).__mro__:
        if ancestor.__name__ in FAMILIES:
            return FAMILIES[ancestor.__name__](scheduler)
        if ancestor.__name__ in REFUSED:
            raise TypeError(f"scheduler: {type(scheduler).__name__} {REFUSED[ancestor.__name__]}")
    raise TypeError(
        "scheduler must be one of diffusers' schedulers that have noise levels, "
        f"got {type(scheduler).__name__}: build StepCoefficients from tables of your own"
    )


# Families whose timesteps count the steps of training


def _variance_preserving(scheduler: Any) -> NoiseSchedule:
    """ᾱ of every integer timestep, as DDPM has it."""
    levels = alphas_cumprod(scheduler)
    return NoiseSchedule(
        domain=f"0 to {len(levels) - 1}",
        held=dict(enumerate(levels.tolist())),
        level_at=lambda timestep: None,
        scales=_scales_of_alphas_cumprod,
        training=lambda: (torch.arange(len(levels)), levels),
        integer=True,
    )


def _scaled_sigmas(scheduler: Any) -> NoiseSchedule:
    """σ/α: ``add_noise`` gives x + (σ/α)·ε, of which ``scale_model_input`` makes α·x + σ·ε."""
    schedule = _ratios(scheduler, _held(scheduler, "sigmas"))

    def scales(ratio: Tensor) -> Scales:
        alpha, sigma, _ = _scales_of_ratios(ratio)
        return Scales(alpha, sigma, alpha)

    return schedule._replace(scales=scales)


def _euler(scheduler: Any) -> NoiseSchedule:
    """As `_scaled_sigmas`, or by timesteps ¼·log(σ/α)."""
    config = scheduler.config
    discrete = _scaled_sigmas(scheduler)
    predictions = {**_DENOISER, "original_sample": _DENOISER["sample"]}
    if config.timestep_type != "continuous" or config.prediction_type != "v_prediction":
        return discrete._replace(predictions=predictions)
    ratios = discrete.training()[1]
    lowest = ratios[0].item() if config.sigma_min is None else config.sigma_min
    highest = ratios[-1].item() if config.sigma_max is None else config.sigma_max
    return _log_sigmas(scheduler, (lowest, highest), discrete.scales)


def _multistep(scheduler: Any) -> NoiseSchedule:
    """σ/α, or the flow's s where the configuration says ``use_flow_sigmas``."""
    # Before set_timesteps the sigmas run against the timesteps, and are never those of a flow.
    is_set = scheduler.num_inference_steps is not None
    held = _held(scheduler, "sigmas") if is_set else {}
    if not scheduler.config.get("use_flow_sigmas", False):
        return _ratios(scheduler, held)
    schedule = _flow(scheduler, held, scheduler.config.get("flow_shift", 1.0))
    # No velocity: diffusers reads x̂0 = α·x_s − σ·o from it, which holds for α² + σ² = 1 alone.
    noise_or_sample = {name: _DENOISER[name] for name in ("epsilon", "sample")}
    return schedule._replace(predictions={**_FLOW, **noise_or_sample})


def _sa_solver(scheduler: Any) -> NoiseSchedule:
    """As `_multistep`, but with DDPM's ``add_noise``."""
    if scheduler.config.get("use_flow_sigmas", False):
        return _multistep(scheduler)
    return _variance_preserving(scheduler)


# Flows


def _flow_match(scheduler: Any) -> NoiseSchedule:
    """The flow's s, by timesteps s·T."""
    if scheduler.config.get("invert_sigmas", False):
        raise ValueError(
            "scheduler has invert_sigmas=True, which is not supported: set invert_sigmas=False"
        )
    return _flow(scheduler, _held(scheduler, "sigmas"), scheduler.config.get("shift", 1.0))


def _helios(scheduler: Any) -> NoiseSchedule:
    """As `_flow_match`, where there is one stage."""
    stages = scheduler.config.stages
    if stages != 1:
        raise ValueError(
            f"scheduler: {type(scheduler).__name__} has stages={stages}, whose noise levels no "
            "timestep tells apart: set stages=1, or use FlowMatchEulerDiscreteScheduler"
        )
    return _flow_match(scheduler)


def _data_ward_flow(scheduler: Any) -> NoiseSchedule:
    """The flow's s by timesteps 1 − s, and a velocity from noise to data."""

    def training() -> tuple[Tensor, Tensor]:
        timesteps = 1 - _shifted(_TRAINING_TIMESTEPS, scheduler.config.get("shift", 1.0))
        return timesteps, 1 - timesteps.double()

    return NoiseSchedule(
        domain="0 to below 1",
        held={},
        level_at=lambda timestep: 1 - timestep if 0 <= timestep < 1 else None,
        scales=_scales_of_flow,
        training=training,
        predictions={name: Prediction("flow", -1.0) for name in _FLOW},
    )


# Families with continuous timesteps


def _edm(scheduler: Any) -> NoiseSchedule:
    """σ of x + σ·ε by timesteps ¼·log σ, and the preconditioning of Karras et al. 2022."""
    limits = (scheduler.config.sigma_min, scheduler.config.sigma_max)
    schedule = _log_sigmas(scheduler, limits, _preconditioning(scheduler))
    return _preconditioned(scheduler, schedule)


def _cosine_edm(scheduler: Any) -> NoiseSchedule:
    """As `_edm`, by timesteps atan(σ)·2/π."""
    limits = (scheduler.config.sigma_min, scheduler.config.sigma_max)
    schedule = _sigmas(
        scheduler,
        limits,
        _preconditioning(scheduler),
        timestep_of=lambda sigma: math.atan(sigma) * 2 / math.pi,
        sigma_of=lambda timestep: math.tan(timestep * math.pi / 2),
    )
    return _preconditioned(scheduler, schedule)


def _ipndm(scheduler: Any) -> NoiseSchedule:
    """σ = sin(t·π/2), which the scheduler calls betas, and α = cos(t·π/2)."""

    def sigma_of(timestep: float) -> float:
        return math.sin(timestep * math.pi / 2)

    return NoiseSchedule(
        domain="above 0 to 1",
        held=_held(scheduler, "betas"),
        level_at=lambda timestep: sigma_of(timestep) if 0 < timestep <= 1 else None,
        scales=lambda sigma: Scales((1 - sigma**2).sqrt(), sigma, torch.ones_like(sigma)),
        training=lambda: _midpoints(sigma_of),
        predictions={"v_prediction": Prediction("v_prediction")},
    )


def _wuerstchen(scheduler: Any) -> NoiseSchedule:
    """ᾱ as a function of timesteps from 0 to 1."""

    def level_of(timestep: float) -> float:
        return scheduler._alpha_cumprod(torch.tensor([timestep], dtype=torch.float64), "cpu").item()

    return NoiseSchedule(
        domain="0 to 1",
        held={},
        level_at=lambda timestep: level_of(timestep) if 0 <= timestep <= 1 else None,
        scales=_scales_of_alphas_cumprod,
        training=lambda: _midpoints(level_of),
        predictions={"epsilon": Prediction("epsilon")},
    )


# What they share


def _ratios(scheduler: Any, held: dict[float, float]) -> NoiseSchedule:
    """σ/α, which is interpolated between two training timesteps as set_timesteps does."""
    levels = alphas_cumprod(scheduler)
    ratios = ((1 - levels) / levels).sqrt()
    table = ratios.tolist()
    last = len(table) - 1

    def level_at(timestep: float) -> float | None:
        if not 0 <= timestep <= last:
            return None
        below = math.floor(timestep)
        fraction = timestep - below
        if fraction == 0:
            return table[below]
        return (1 - fraction) * table[below] + fraction * table[below + 1]

    return NoiseSchedule(
        domain=f"0 to {last} and scheduler.timesteps",
        held=held,
        level_at=level_at,
        scales=_scales_of_ratios,
        training=lambda: (torch.arange(len(table)), ratios),
    )


def _flow(scheduler: Any, held: dict[float, float], shift: float) -> NoiseSchedule:
    """The flow's s: as the scheduler holds it, else timestep / T."""
    config = scheduler.config
    total = config.num_train_timesteps
    # Timesteps may be cut to integers. A scheduler that was given timesteps and sigmas apart does
    # not say what lies between them.
    is_scaled = all(abs(timestep - level * total) <= 1 for timestep, level in held.items())

    def training() -> tuple[Tensor, Tensor]:
        levels = _shifted(total, 1.0 if config.get("use_dynamic_shifting", False) else shift)
        return levels * total, levels.double()

    def level_at(timestep: float) -> float | None:
        return timestep / total if is_scaled and 0 < timestep <= total else None

    return NoiseSchedule(
        domain=f"above 0 to {total}" if is_scaled else "scheduler.timesteps alone",
        held=held,
        level_at=level_at,
        scales=_scales_of_flow,
        training=training,
        predictions=_FLOW,
    )


def _log_sigmas(
    scheduler: Any, limits: tuple[float, float], scales: Callable[[Tensor], Scales]
) -> NoiseSchedule:
    return _sigmas(
        scheduler,
        limits,
        scales,
        timestep_of=lambda sigma: 0.25 * math.log(sigma),
        sigma_of=lambda timestep: math.exp(4 * timestep),
    )


def _sigmas(
    scheduler: Any,
    limits: tuple[float, float],
    scales: Callable[[Tensor], Scales],
    timestep_of: Callable[[float], float],
    sigma_of: Callable[[float], float],
) -> NoiseSchedule:
    """Sigmas within limits, by timesteps that are a function of them."""
    # Timesteps are float32.
    smallest, largest = (timestep_of(limits[0]) - 1e-6, timestep_of(limits[1]) + 1e-6)

    def training() -> tuple[Tensor, Tensor]:
        fresh = type(scheduler).from_config(scheduler.config)
        levels = fresh.sigmas[: len(fresh.timesteps)].double()
        return fresh.timesteps.flip(0), levels.flip(0)

    return NoiseSchedule(
        domain=f"{smallest:.4f} to {largest:.4f} and scheduler.timesteps",
        held=_held(scheduler, "sigmas"),
        level_at=lambda timestep: sigma_of(timestep) if smallest <= timestep <= largest else None,
        scales=scales,
        training=training,
        predictions={"v_prediction": Prediction("v_prediction")},
    )


def _preconditioning(scheduler: Any) -> Callable[[Tensor], Scales]:
    data = scheduler.config.sigma_data

    def scales(sigma: Tensor) -> Scales:
        input_scale = (sigma**2 + data**2).rsqrt()
        return Scales(data * input_scale, sigma * input_scale, input_scale)

    return scales


def _preconditioned(scheduler: Any, schedule: NoiseSchedule) -> NoiseSchedule:
    """The output F = (x − c_skip·(x + σ·ε))/c_out is the velocity of x/σ_data, or its negative."""
    predictions = {
        "epsilon": Prediction("v_prediction", -1.0),
        "v_prediction": Prediction("v_prediction"),
    }
    return schedule._replace(predictions=predictions, data_scale=1 / scheduler.config.sigma_data)


def _held(scheduler: Any, name: str) -> dict[float, float]:
    """The level of each of scheduler.timesteps; a repeated one has its second, as in ``add_noise``.

    `name` is the attribute that has the levels; None, as before set_timesteps, has none.
    """
    levels = getattr(scheduler, name)
    if levels is None:
        return {}
    if levels.dtype not in (torch.float32, torch.float64):
        raise ValueError(
            f"scheduler.{name} is {levels.dtype}, too coarse for coefficients: "
            "keep the scheduler's tables in float32"
        )
    held: dict[float, float] = {}
    occurrences: dict[float, int] = {}
    for timestep, level in zip(scheduler.timesteps.tolist(), levels.tolist(), strict=False):
        occurrences[timestep] = occurrences.get(timestep, 0) + 1
        if occurrences[timestep] <= 2:
            held[timestep] = level
    return held


def _shifted(total: int, shift: float) -> Tensor:
    """The levels 1/T to 1 of a flow, shifted, in the arithmetic of diffusers: float32."""
    levels = torch.arange(1, total + 1, dtype=torch.float32) / total
    return shift * levels / (1 + (shift - 1) * levels)


def _midpoints(level_of: Callable[[float], float]) -> tuple[Tensor, Tensor]:
    """Timesteps that divide 0 to 1 evenly, and their levels."""
    timesteps = (torch.arange(_TRAINING_TIMESTEPS) + 0.5) / _TRAINING_TIMESTEPS
    levels = [level_of(timestep) for timestep in timesteps.tolist()]
    return timesteps, torch.tensor(levels, dtype=torch.float64)


def _scales_of_alphas_cumprod(level: Tensor) -> Scales:
    return Scales(level.sqrt(), (1 - level).sqrt(), torch.ones_like(level))


def _scales_of_ratios(ratio: Tensor) -> Scales:
    return Scales((1 + ratio**2).rsqrt(), (1 + ratio**-2).rsqrt(), torch.ones_like(ratio))


def _scales_of_flow(level: Tensor) -> Scales:
    if (level > 1).any():
        raise ValueError(
            f"scheduler holds sigmas above 1, up to {level.max().item():.4g}, which are no flow's: "
            "unset use_karras_sigmas, use_exponential_sigmas, use_beta_sigmas and use_lu_lambdas, "
            "which it does not convert for use_flow_sigmas"
        )
    return Scales(1 - level, level, torch.ones_like(level))


# What each class of diffusers has.
FAMILIES: dict[str, Callable[[Any], NoiseSchedule]] = {
    "CogVideoXDDIMScheduler": _variance_preserving,
    "CogVideoXDPMScheduler": _variance_preserving,
    "CosineDPMSolverMultistepScheduler": _cosine_edm,
    "DDIMInverseScheduler": _variance_preserving,
    "DDIMParallelScheduler": _variance_preserving,
    "DDIMScheduler": _variance_preserving,
    "DDPMParallelScheduler": _variance_preserving,
    "DDPMScheduler": _variance_preserving,
    "DDPMWuerstchenScheduler": _wuerstchen,
    "DEISMultistepScheduler": _multistep,
    "DPMSolverMultistepInverseScheduler": _multistep,
    "DPMSolverMultistepScheduler": _multistep,
    "DPMSolverSDEScheduler": _scaled_sigmas,
    "DPMSolverSinglestepScheduler": _multistep,
    "EDMDPMSolverMultistepScheduler": _edm,
    "EDMEulerScheduler": _edm,
    "EulerAncestralDiscreteScheduler": _scaled_sigmas,
    "EulerDiscreteScheduler": _euler,
    "FlowMapEulerDiscreteScheduler": _flow_match,
    "FlowMatchEulerDiscreteScheduler": _flow_match,
    "FlowMatchHeunDiscreteScheduler": _flow_match,
    "FlowMatchLCMScheduler": _flow_match,
    "HeliosDMDScheduler": _helios,
    "HeliosScheduler": _helios,
    "HeunDiscreteScheduler": _scaled_sigmas,
    "IPNDMScheduler": _ipndm,
    "KDPM2AncestralDiscreteScheduler": _scaled_sigmas,
    "KDPM2DiscreteScheduler": _scaled_sigmas,
    "LCMScheduler": _variance_preserving,
    "LMSDiscreteScheduler": _scaled_sigmas,
    "LTXEulerAncestralRFScheduler": _flow_match,
    "MiniMaxH3Scheduler": _data_ward_flow,
    "PNDMScheduler": _variance_preserving,
    "RFD4ProteinaScheduler": _data_ward_flow,
    "RePaintScheduler": _variance_preserving,
    "SASolverScheduler": _sa_solver,
    "TCDScheduler": _variance_preserving,
    "UnCLIPScheduler": _variance_preserving,
    "UniPCMultistepScheduler": _multistep,
}

_TOKENS = (
    "corrupts discrete tokens, not a continuous x, so there is no α and σ: "
    "score the tokens themselves and hand their log-likelihoods to posterior"
)
_CONSISTENCY = (
    "belongs to consistency models, which predict where a trajectory ends, not the mean of the "
    "clean images, so that their error bounds no likelihood: "
    "use the model that was distilled, with its scheduler"
)
_SCORE = (
    "predicts the score −ε/σ of networks that take σ in place of a timestep: "
    "build StepCoefficients from tables of your own, or use "
)

# Why each other class has none, and what to use instead.
REFUSED = {
    "AmusedScheduler": _TOKENS,
    "BlockRefinementScheduler": _TOKENS,
    "CMStochasticIterativeScheduler": _CONSISTENCY,
    "ConsistencyDecoderScheduler": _CONSISTENCY,
    "DiscreteDDIMScheduler": _TOKENS,
    "EntropyBoundScheduler": _TOKENS,
    "KarrasVeScheduler": "is deprecated and cannot add noise: use EDMEulerScheduler",
    "PiflowScheduler": (
        "belongs to networks that predict several velocities at once, for a policy to follow: "
        "use the model that was distilled, with FlowMatchEulerDiscreteScheduler"
    ),
    "SCMScheduler": _CONSISTENCY,
    "ScoreSdeVeScheduler": f"{_SCORE}EulerDiscreteScheduler for a denoiser of noise",
    "ScoreSdeVpScheduler": f"{_SCORE}DDPMScheduler for a denoiser of noise",
    "VQDiffusionScheduler": _TOKENS,
}
