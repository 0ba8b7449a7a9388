"""Step coefficients: the five tables that turn a denoiser's raw output into a log-likelihood, read once from a diffusers scheduler.

For a scored step s the residual is r = data·x + noisy·x_s + output·o and its log-likelihood Σ(−½·inv_var·r² + log_norm). Everything is
computed in float64 and rounded once. Schedulers are recognised by class name, so that importing this module never imports diffusers.
"""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

# A smaller standard deviation cannot be scored: 1/σ² leaves float32's useful range and one component outweighs all others.
SMALLEST_STD = 1e-6

_TABLES = ("data", "noisy", "output", "inv_var", "log_norm")
_MEAN_TABLES = ("mean_noisy", "mean_output", "std")
_FAMILIES = {"DDPMScheduler": "ddpm", "DDIMScheduler": "ddim", "FlowMatchEulerDiscreteScheduler": "flow"}
_PARAMETERIZATIONS = {
    "ddpm": ("epsilon", "v_prediction", "sample"),
    "ddim": ("epsilon", "v_prediction", "sample"),
    "flow": ("flow",),
}


@dataclasses.dataclass(frozen=True, eq=False)
class StepCoefficients:
    """Tables of S scored steps, each [S], of one dtype (float32 or float64) and on one device.

    Args:
        data, noisy, output: the residual r = data·x + noisy·x_s + output·o; finite.
        inv_var: v ≥ 0 of −½·v·r². Infinity marks a step that can be run but not scored.
        log_norm: the normalisation per element, −½ log 2πσ² for a chain, 0 for an evidence lower bound.
        mean_noisy, mean_output, std: a chain's own step x′ = mean_noisy·x_s + mean_output·o + std·z; all three or none. std may be 0.

    Attributes:
        unscorable: rows whose standard deviation is too small to score.
        needs_noisy: whether any residual contains x_s.

    Raises:
        TypeError: for anything but floating-point tensors of one dtype.
        ValueError: for tables that differ in length or device, or hold values outside their range; the message names the table.
    """

    data: Tensor
    noisy: Tensor
    output: Tensor
    inv_var: Tensor
    log_norm: Tensor
    mean_noisy: Tensor | None = None
    mean_output: Tensor | None = None
    std: Tensor | None = None
    unscorable: tuple[int, ...] = dataclasses.field(init=False)
    needs_noisy: bool = dataclasses.field(init=False)

    def __post_init__(self) -> None:
        given = [name for name in _MEAN_TABLES if getattr(self, name) is not None]
        if given and len(given) < len(_MEAN_TABLES):
            raise ValueError(f"{', '.join(_MEAN_TABLES)} must be given together, got only {', '.join(given)}")
        for name in (*_TABLES, *given):
            _check_table(name, getattr(self, name), like=self.data)
        for name in ("data", "noisy", "output", *given):
            if not getattr(self, name).isfinite().all():
                raise ValueError(f"{name} must be finite, got {getattr(self, name).tolist()}")
        if not (self.inv_var >= 0).all():
            raise ValueError(f"inv_var must not be negative or NaN, got {self.inv_var.tolist()}")
        finite = self.inv_var.isfinite()
        if not self.log_norm[finite].isfinite().all():
            raise ValueError(f"log_norm must be finite, got {self.log_norm.tolist()}")
        if given and not (self.std >= 0).all():
            raise ValueError(f"std must not be negative, got {self.std.tolist()}")
        # Kept in Python, so that no call has to ask the device.
        object.__setattr__(self, "unscorable", tuple((~finite).nonzero().flatten().tolist()))
        object.__setattr__(self, "needs_noisy", bool((self.noisy != 0).any()))

    def __len__(self) -> int:
        return self.data.shape[0]

    def to(self, device: torch.device | str | None = None, dtype: torch.dtype | None = None) -> StepCoefficients:
        """The same tables on another device or in another dtype (float32 or float64); itself where nothing changes."""
        if self.data.to(device, dtype) is self.data:
            return self
        tables = {name: getattr(self, name) for name in (*_TABLES, *_MEAN_TABLES)}
        tables = {name: table if table is None else table.to(device, dtype) for name, table in tables.items()}
        if dtype not in (None, self.data.dtype):
            return StepCoefficients(**tables)
        # Values that were checked once are not read again: on a device that would wait for it a dozen times.
        moved = copy.copy(self)
        vars(moved).update(tables)
        return moved

    def scoring_tables(self, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The five tables that score, in the order of the operators' arguments; themselves where they have that dtype already."""
        tables = (self.data, self.noisy, self.output, self.inv_var, self.log_norm)
        return tables if self.data.dtype == dtype else tuple(table.to(dtype) for table in tables)

    def require_scorable(self, step: int | None = None) -> None:
        """Raise ValueError where the row `step` (None: any row) has too small a standard deviation; reads nothing from the device."""
        refused = [row for row in self.unscorable if step is None or row == step]
        if refused:
            raise ValueError(
                f"coefficients: rows {refused} have a standard deviation of at most {SMALLEST_STD} and cannot be scored; "
                "pass a sigma_floor, or leave these steps out"
            )

    @classmethod
    def chain(
        cls,
        scheduler: Any,
        timesteps: Tensor | Sequence[float],
        previous_timesteps: Tensor | Sequence[float] | None = None,
        *,
        parameterization: str | None = None,
        variance: str | None = None,
        eta: float = 0.0,
        center: str = "mean",
        sigma_floor: float = 0.0,
        dtype: torch.dtype = torch.float32,
    ) -> StepCoefficients:
        """Tables that run a reverse chain and score an image under its Gaussian kernels N(mean, σ² I), as a "mixture" (`log_likelihood`).

        Args:
            scheduler: diffusers' DDPMScheduler, DDIMScheduler or FlowMatchEulerDiscreteScheduler; it is only read.
            timesteps: [S] scored timesteps; the tables lie on their device where this is a tensor, else on the CPU.
            previous_timesteps: [S] where each step leads; negative is the scheduler's final noise level. None: the successors in
                ``scheduler.timesteps``.
            parameterization: what the denoiser's output is; None reads the scheduler's prediction type. "mean": it already is the mean.
            variance: "fixed_small" or "fixed_large" (DDPM alone); None reads the scheduler's variance type. Needed where that is learned.
            eta: DDIM's noise, 0 to 1.
            center: what an image is compared with: the kernel's "mean", or the predicted clean "sample". Never changes how the chain moves.
            sigma_floor: smallest standard deviation that scores, 0 for none. Never changes how the chain moves.
            dtype: float32 or float64.

        Raises:
            TypeError: for another scheduler, or timesteps that are not numbers of the right kind.
            ValueError: for a combination that the scheduler does not support, for clipping schedulers unless `parameterization` is "mean",
                and for timesteps that the scheduler does not have.

        Ho et al. 2020 (DDPM), Song et al. 2021 (DDIM), Lipman et al. 2023 (flow matching).
        """
        if center not in ("mean", "sample"):
            raise ValueError(f'center must be "mean" or "sample", got {center!r}')
        check_sigma_floor(sigma_floor)
        if parameterization != "mean":
            _refuse_clipping(scheduler)
        elif center != "mean":
            raise ValueError('center must be "mean" where parameterization is "mean": the clean sample is not known')
        step = reverse_kernel(scheduler, timesteps, previous_timesteps, parameterization=parameterization, variance=variance, eta=eta)
        mean_noisy = step.mean_noisy + step.mean_sample * step.sample_noisy
        mean_output = step.mean_output + step.mean_sample * step.sample_output
        scored = (mean_noisy, mean_output) if center == "mean" else (step.sample_noisy, step.sample_output)
        inv_var, log_norm = normal_tables(step.score_std.clamp(min=sigma_floor))
        tables = {
            "data": torch.ones_like(step.std),
            "noisy": -scored[0],
            "output": -scored[1],
            "inv_var": inv_var,
            "log_norm": log_norm,
            "mean_noisy": mean_noisy,
            "mean_output": mean_output,
            "std": step.std,
        }
        return cls(**_rounded(tables, timesteps, dtype))

    @classmethod
    def elbo(
        cls,
        scheduler: Any,
        timesteps: Tensor | Sequence[float],
        *,
        parameterization: str | None = None,
        input: str = "target",
        space: str = "native",
        weight: str | Tensor | Sequence[float] = "uniform",
        dtype: torch.dtype = torch.float32,
    ) -> StepCoefficients:
        """Tables of the evidence lower bound −(1/S) Σ_s w_s‖target − o‖² of a diffusion classifier.

        It holds up to a constant that all classes share. Score it with ``reduction="mean"`` (`log_likelihood`, `PosteriorScorer`), which is
        not the default.

        Args:
            scheduler, timesteps, dtype: as in `chain`; ``clip_sample`` does not matter here.
            parameterization: what the denoiser predicts, hence what the target is; None reads the scheduler's prediction type.
            input: "target" where the training target (noise, velocity, flow) takes the place of x_s; "noisy" where x_s itself is given.
            space: "native" measures the error of what the denoiser predicts, "epsilon" that of the noise it implies.
            weight: "uniform" (w ≡ 1), or [S] weights w_s ≥ 0.

        Raises:
            TypeError, ValueError: as in `chain`.

        Li et al., ICCV 2023 (Diffusion Classifier).
        """
        if input not in ("target", "noisy"):
            raise ValueError(f'input must be "target" or "noisy", got {input!r}')
        if space not in ("native", "epsilon"):
            raise ValueError(f'space must be "native" or "epsilon", got {space!r}')
        parameterization = _require_parameterization(scheduler, parameterization)
        alpha, sigma = _alpha_sigma(scheduler, _noise_levels(scheduler, "timesteps", _as_list("timesteps", timesteps)))
        zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
        to_epsilon = {"epsilon": one, "sample": -alpha / sigma, "v_prediction": alpha, "flow": alpha}[parameterization]
        factor = to_epsilon if space == "epsilon" else one
        inv_var = 2 * _require_weights(weight, len(alpha))
        if parameterization == "sample":
            data, noisy, output = one, zero, -one
        elif input == "target":
            data, noisy, output = zero, one, -one
        else:
            data = {"epsilon": -alpha, "v_prediction": -one, "flow": -one}[parameterization] / sigma
            noisy = {"epsilon": one, "v_prediction": alpha, "flow": one}[parameterization] / sigma
            output = -one
        if input == "target":
            inv_var = inv_var * factor**2
        else:
            data, noisy, output = factor * data, factor * noisy, factor * output
        tables = {"data": data, "noisy": noisy, "output": output, "inv_var": inv_var, "log_norm": zero}
        return cls(**_rounded(tables, timesteps, dtype))


class ReverseKernel(NamedTuple):
    """One reverse step, each table [S] float64 on the CPU, before any clipping.

    The clean sample is x̂0 = sample_noisy·x_s + sample_output·o (0 where parameterization is "mean"), the mean is
    mean_sample·x̂0 + mean_noisy·x_s + mean_output·o. std moves the chain, score_std scores it.
    """

    sample_noisy: Tensor
    sample_output: Tensor
    mean_sample: Tensor
    mean_noisy: Tensor
    mean_output: Tensor
    std: Tensor
    score_std: Tensor


def reverse_kernel(
    scheduler: Any,
    timesteps: Tensor | Sequence[float],
    previous_timesteps: Tensor | Sequence[float] | None = None,
    *,
    parameterization: str | None = None,
    variance: str | None = None,
    eta: float = 0.0,
) -> ReverseKernel:
    """The scheduler's reverse step as tables; arguments and errors as in `StepCoefficients.chain`."""
    family = _family(scheduler)
    timesteps, previous = _step_pairs(scheduler, timesteps, previous_timesteps)
    level = _noise_levels(scheduler, "timesteps", timesteps)
    previous_level = _noise_levels(scheduler, "previous_timesteps", previous, final=_final_level(scheduler))
    mean_sample, mean_noisy, mean_epsilon, std, score_std = {"ddpm": _ddpm_step, "ddim": _ddim_step, "flow": _flow_step}[family](
        scheduler, level, previous_level, variance, eta
    )
    if parameterization == "mean":
        zero = torch.zeros_like(level)
        return ReverseKernel(zero, zero, zero, zero, torch.ones_like(level), std, score_std)
    parameterization = _require_parameterization(scheduler, parameterization)
    alpha, sigma = _alpha_sigma(scheduler, level)
    if parameterization == "epsilon" and (alpha == 0).any():
        raise ValueError("timesteps: at zero terminal SNR an epsilon prediction implies no clean sample; use v_prediction or sample")
    (sample_noisy, sample_output), (epsilon_noisy, epsilon_output) = _predictions(parameterization, alpha, sigma)
    return ReverseKernel(
        sample_noisy,
        sample_output,
        mean_sample,
        mean_noisy + mean_epsilon * epsilon_noisy,
        mean_epsilon * epsilon_output,
        std,
        score_std,
    )


def check_sigma_floor(sigma_floor: float) -> None:
    """Raise where it is no smallest standard deviation: TypeError for no number, ValueError for one out of range."""
    if isinstance(sigma_floor, (bool, str)) or not hasattr(sigma_floor, "__float__"):
        raise TypeError(f"sigma_floor must be a number, got {sigma_floor!r}")
    if sigma_floor != 0 and not SMALLEST_STD < sigma_floor <= torch.finfo(torch.float32).max:
        raise ValueError(f"sigma_floor must be 0 or a number above {SMALLEST_STD}, got {sigma_floor!r}")


def normal_tables(std: Tensor) -> tuple[Tensor, Tensor]:
    """inv_var 1/σ² and log_norm −½ log 2πσ² of standard deviations of any shape; both infinite where σ is too small to score."""
    inv_var = torch.where(std > SMALLEST_STD, std**-2, torch.inf)
    return inv_var, 0.5 * (inv_var / (2 * math.pi)).log()


def _ddpm_step(scheduler: Any, level: Tensor, previous: Tensor, variance: str | None, eta: float) -> tuple[Tensor, ...]:
    _require_unset(scheduler, eta=eta)
    beta = 1 - level / previous
    mean_sample = previous.sqrt() * beta / (1 - level)
    mean_noisy = (level / previous).sqrt() * (1 - previous) / (1 - level)
    score_std = beta.sqrt() if _require_variance(scheduler, variance) == "fixed_large" else _posterior_std(level, previous)
    # The step that ends at the clean image adds no noise, whatever the variance type.
    std = torch.where(previous == 1, 0.0, score_std)
    return mean_sample, mean_noisy, torch.zeros_like(level), std, score_std


def _ddim_step(scheduler: Any, level: Tensor, previous: Tensor, variance: str | None, eta: float) -> tuple[Tensor, ...]:
    _require_unset(scheduler, variance=variance)
    if not 0 <= eta <= 1:
        raise ValueError(f"eta must be from 0 to 1, got {eta!r}")
    std = eta * _posterior_std(level, previous)
    mean_epsilon = (1 - previous - std**2).clamp(min=0).sqrt()
    return previous.sqrt(), torch.zeros_like(level), mean_epsilon, std, std


def _flow_step(scheduler: Any, level: Tensor, previous: Tensor, variance: str | None, eta: float) -> tuple[Tensor, ...]:
    _require_unset(scheduler, variance=variance, eta=eta)
    if scheduler.config.get("stochastic_sampling", False):
        raise ValueError("scheduler has stochastic_sampling=True: only the Euler step is supported, set stochastic_sampling=False")
    step = previous - level  # the velocity is ε̂ − x̂0
    zero = torch.zeros_like(level)
    return -step, torch.ones_like(level), step, zero, zero


def _posterior_std(level: Tensor, previous: Tensor) -> Tensor:
    return ((1 - level / previous) * (1 - previous) / (1 - level)).sqrt()


def _predictions(parameterization: str, alpha: Tensor, sigma: Tensor) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Weights of (x_s, o) in the clean sample, and in the noise, that the denoiser's output implies."""
    zero, one = torch.zeros_like(alpha), torch.ones_like(alpha)
    if parameterization == "epsilon":
        return (1 / alpha, -sigma / alpha), (zero, one)
    if parameterization == "sample":
        return (zero, one), (1 / sigma, -alpha / sigma)
    if parameterization == "v_prediction":
        return (alpha, -sigma), (sigma, alpha)
    return (one, -sigma), (one, alpha)  # flow


def _family(scheduler: Any) -> str:
    for ancestor in type(scheduler).__mro__:
        if ancestor.__name__ in _FAMILIES:
            return _FAMILIES[ancestor.__name__]
    raise TypeError(f"scheduler must be one of diffusers' {', '.join(_FAMILIES)}, got {type(scheduler).__name__}")


def _noise_levels(scheduler: Any, name: str, timesteps: list[float], final: float | None = None) -> Tensor:
    """ᾱ, or the flow's s, of each timestep, float64; `final` stands for negative ones, which raise without it."""
    if _family(scheduler) == "flow":
        if scheduler.config.get("invert_sigmas", False):
            raise ValueError("scheduler has invert_sigmas=True, which is not supported: set invert_sigmas=False")
        # Read, never recomputed: set_timesteps shifts the levels that the constructor has shifted already.
        levels = dict(zip(scheduler.timesteps.tolist(), scheduler.sigmas.tolist(), strict=False))
    else:
        levels = dict(enumerate(_alphas_cumprod(scheduler).tolist()))
        if not all(isinstance(timestep, int) for timestep in timesteps):
            raise TypeError(f"{name} must be integers for {type(scheduler).__name__}, got {timesteps}")
    unknown = [timestep for timestep in timesteps if timestep not in levels and (timestep >= 0 or final is None)]
    if unknown:
        raise ValueError(f"{name}: the scheduler does not have {unknown}")
    return torch.tensor([final if timestep < 0 else levels[timestep] for timestep in timesteps], dtype=torch.float64)


def _final_level(scheduler: Any) -> float:
    """The noise level after the last step: ᾱ, or the flow's s."""
    family = _family(scheduler)
    if family == "flow":
        return 0.0
    if family == "ddim" and not scheduler.config.set_alpha_to_one:
        return _alphas_cumprod(scheduler)[0].item()
    return 1.0


def _alphas_cumprod(scheduler: Any) -> Tensor:
    """ᾱ [T] in float64; where it is held in half precision, rebuilt from the betas."""
    held = scheduler.alphas_cumprod.detach().cpu()
    if held.dtype in (torch.float32, torch.float64):
        return held.double()
    betas = scheduler.betas.detach().cpu()
    rebuilt = (1 - betas.double()).cumprod(0)
    rounding = torch.finfo(held.dtype)
    same = torch.allclose(rebuilt, held.double(), rtol=rounding.eps, atol=rounding.tiny * rounding.eps)
    if betas.dtype not in (torch.float32, torch.float64) or not same:
        raise ValueError(
            f"scheduler.alphas_cumprod is {held.dtype}, too coarse for coefficients, and scheduler.betas does not give it in float32: "
            "keep the scheduler's tables in float32"
        )
    return rebuilt


def _alpha_sigma(scheduler: Any, level: Tensor) -> tuple[Tensor, Tensor]:
    """α and σ of x_s = α·x + σ·ε."""
    alpha, sigma = (1 - level, level) if _family(scheduler) == "flow" else (level.sqrt(), (1 - level).sqrt())
    if (sigma == 0).any():
        raise ValueError("timesteps: a step without noise (sigma = 0) has no coefficients")
    return alpha, sigma


def _step_pairs(
    scheduler: Any, timesteps: Tensor | Sequence[float], previous_timesteps: Tensor | Sequence[float] | None
) -> tuple[list[float], list[float]]:
    timesteps = _as_list("timesteps", timesteps)
    if previous_timesteps is None:
        run = scheduler.timesteps.tolist()
        successors = dict(zip(run, [*run[1:], -1], strict=True))
        unknown = [timestep for timestep in timesteps if timestep not in successors]
        if unknown:
            raise ValueError(f"timesteps {unknown} are not in scheduler.timesteps: pass previous_timesteps, or call set_timesteps first")
        return timesteps, [successors[timestep] for timestep in timesteps]
    previous = _as_list("previous_timesteps", previous_timesteps)
    if len(previous) != len(timesteps):
        raise ValueError(f"previous_timesteps must have as many entries as timesteps, got {len(previous)} and {len(timesteps)}")
    backwards = [pair for pair in zip(timesteps, previous, strict=True) if pair[1] >= pair[0]]
    if backwards:
        raise ValueError(f"previous_timesteps must lie below timesteps, got (timestep, previous) {backwards}")
    return timesteps, previous


def _as_list(name: str, values: Tensor | Sequence[float]) -> list[float]:
    values = torch.as_tensor(values)
    if values.ndim != 1 or values.dtype == torch.bool or values.is_complex():
        raise TypeError(f"{name} must be a one-dimensional sequence of numbers, got {values.dtype} of shape {tuple(values.shape)}")
    return values.tolist()


def _require_parameterization(scheduler: Any, parameterization: str | None) -> str:
    supported = _PARAMETERIZATIONS[_family(scheduler)]
    given = parameterization if parameterization is not None else scheduler.config.get("prediction_type", "flow")
    if given not in supported:
        raise ValueError(f"parameterization of {type(scheduler).__name__} must be one of {', '.join(supported)}, got {given!r}")
    return given


def _require_variance(scheduler: Any, variance: str | None) -> str:
    given = variance if variance is not None else scheduler.config.variance_type
    if variance is None and given == "fixed_small_log":
        return "fixed_small"
    if given not in ("fixed_small", "fixed_large"):
        raise ValueError(
            f'variance must be "fixed_small" or "fixed_large", got {given!r}: a learned variance fits no table, choose the one that scores'
        )
    return given


def _require_unset(scheduler: Any, **options: Any) -> None:
    for name, value in options.items():
        if value:
            raise ValueError(f"{name} does not exist for {type(scheduler).__name__}, got {value!r}")


def _require_weights(weight: str | Tensor | Sequence[float], length: int) -> Tensor:
    if isinstance(weight, str):
        if weight != "uniform":
            raise ValueError(f'weight must be "uniform" or a weight for each step, got {weight!r}')
        return torch.ones(length, dtype=torch.float64)
    weight = torch.as_tensor(weight, dtype=torch.float64, device="cpu")
    if weight.shape != (length,) or not ((weight >= 0) & weight.isfinite()).all():
        raise ValueError(f"weight must hold {length} finite numbers that are not negative, got {weight.tolist()}")
    return weight


def _refuse_clipping(scheduler: Any) -> None:
    for option in ("clip_sample", "thresholding"):
        if scheduler.config.get(option, False):
            raise ValueError(
                f"scheduler has {option}=True, which no table can express: set {option}=False, "
                'or compute the clipped means yourself and pass parameterization="mean"'
            )


def _rounded(tables: dict[str, Tensor], timesteps: Any, dtype: torch.dtype) -> dict[str, Tensor]:
    device = timesteps.device if isinstance(timesteps, Tensor) else "cpu"
    return {name: table.to(device, dtype) for name, table in tables.items()}


def _check_table(name: str, table: Any, like: Tensor) -> None:
    if not isinstance(table, Tensor) or table.dtype not in (torch.float32, torch.float64):
        raise TypeError(
            f"{name} must be a float32 or float64 tensor, got {table.dtype if isinstance(table, Tensor) else type(table).__name__}"
        )
    if table.dtype != like.dtype:
        raise TypeError(f"{name} must have the dtype of data, {like.dtype}, got {table.dtype}")
    if table.ndim != 1 or table.shape != like.shape:
        raise ValueError(f"{name} must have one dimension and the length of data, {tuple(like.shape)}, got shape {tuple(table.shape)}")
    if table.device != like.device:
        raise ValueError(f"{name} must lie where data does, on {like.device}, got {table.device}")


def learned_log_variance_ratio(scheduler: Any, timesteps: Tensor) -> Tensor | None:
    """log β̃/β of each step [S] float64, with diffusers' lower limit of 1e-20 on β̃; None where the variance is not learned.

    Raises:
        ValueError: for variance_type "learned", the predecessor of "learned_range".
    """
    variance_type = scheduler.config.get("variance_type")
    if variance_type == "learned":
        raise ValueError('scheduler has variance_type="learned", which is not supported: "learned_range" is')
    if variance_type != "learned_range":
        return None
    small, large = (reverse_kernel(scheduler, timesteps, variance=variance).score_std for variance in ("fixed_small", "fixed_large"))
    return 2 * (small.clamp(min=1e-10) / large).log()


def learned_std_scale(model_output: Tensor, channels: int, log_variance_ratio: Tensor) -> Tensor:
    """The standard deviation that a "learned_range" network predicts, over √β.

    log σ² = f·log β + (1 − f)·log β̃ with f = (v + 1)/2, v the second `channels` channels of the output (Nichol & Dhariwal 2021, eq. 15).

    Args:
        model_output: [N, C', *spatial] with C' ≥ 2·channels.
        channels: C of the sample.
        log_variance_ratio: 0-dimensional, of the step (`learned_log_variance_ratio`).

    Returns:
        [N, channels, *spatial].
    """
    fraction = (model_output[:, channels : 2 * channels] + 1) / 2
    return (0.5 * (1 - fraction) * log_variance_ratio).exp()
