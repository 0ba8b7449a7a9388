"""The forward process of a scheduler at chosen timesteps: noisy inputs and training targets."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_floating
from .noise_schedules import NoiseSchedule, noise_schedule
from .schedulers import as_list


@dataclasses.dataclass(frozen=True, eq=False)
class ForwardProcess:
    """x_s = alpha·x + sigma·ε at S timesteps, as the denoiser takes it, and what it predicts of it.

    Made by `forward_process`.

    Attributes:
        timesteps: [S], as the denoiser takes them.
        alpha, sigma: [S] float64 on the CPU.
        input_scale: [S] float64, x_s over what the scheduler's ``add_noise`` gives: what its
            ``scale_model_input`` multiplies by, and 1 where it changes nothing.
        parameterization: what the denoiser predicts, as of `StepCoefficients`.
        data_scale: 1, or for a preconditioned denoiser (EDM) what makes the data of unit variance:
            its parameterization is that of x·data_scale.
        target_sign: 1, or −1 where the denoiser predicts the negative.
    """

    timesteps: Tensor
    alpha: Tensor
    sigma: Tensor
    input_scale: Tensor
    parameterization: str
    data_scale: float = 1.0
    target_sign: float = 1.0

    def __len__(self) -> int:
        return len(self.alpha)

    def __getitem__(self, rows: int | slice) -> ForwardProcess:
        """The process at one of the timesteps, or at some."""
        if not isinstance(rows, slice):
            row = range(len(self))[rows]
            rows = slice(row, row + 1)
        return dataclasses.replace(
            self,
            timesteps=self.timesteps[rows],
            alpha=self.alpha[rows],
            sigma=self.sigma[rows],
            input_scale=self.input_scale[rows],
        )

    def noisy_input(self, x: Tensor, noise: Tensor) -> Tensor:
        """x_s of the shape and dtype of x, what the denoiser takes.

        Equal to the scheduler's ``scale_model_input`` of its ``add_noise``.

        Args:
            x, noise: clean images or latents and standard normal noise, [S, ...], or [B, ...] where
                S is 1.
        """
        alpha, sigma = self._along_images(x, self.alpha, self.sigma)
        return (alpha * x + sigma * noise).to(x.dtype)

    def target(self, x: Tensor, noise: Tensor) -> Tensor:
        """What the denoiser learns to predict, of the shape and dtype of x.

        Args:
            x, noise: as of `noisy_input`.
        """
        if self.parameterization == "epsilon":
            return noise
        if self.parameterization == "sample":
            return x
        if self.parameterization == "flow":
            return self.target_sign * (noise - x)
        # Of x·data_scale, which has unit variance.
        alpha, sigma = self._along_images(
            x, self.alpha / self.data_scale, self.sigma * self.data_scale
        )
        return (self.target_sign * (alpha * noise - sigma * x)).to(x.dtype)

    def _along_images(self, x: Tensor, *scales: Tensor) -> list[Tensor]:
        """Scales [S] for images [S or B, ...], in float32, or in float64 where x is."""
        check_floating(x, "x")
        if len(self) not in (1, len(x)):
            raise ValueError(f"x must have {len(self)} images, one a timestep, got {len(x)}")
        dtype = torch.promote_types(x.dtype, torch.float32)
        return [scale.to(x.device, dtype).view(-1, *[1] * (x.ndim - 1)) for scale in scales]


def forward_process(
    scheduler: Any,
    timesteps: Tensor | Sequence[float],
    *,
    parameterization: str | None = None,
) -> ForwardProcess:
    """The noise levels of any diffusers scheduler that has them, whatever it does to sample.

    A timestep of ``scheduler.timesteps`` has the level that the scheduler holds for it, which
    ``set_timesteps`` may have changed; any other has that of training.

    Args:
        scheduler: it is only read, and a chain that it has begun does not matter.
        timesteps: [S], as the denoiser takes them.
        parameterization: what the denoiser predicts, by the scheduler's name for it; None reads the
            scheduler's prediction type.

    Raises:
        TypeError: for a scheduler without noise levels, with what to use instead, and for timesteps
            that are not numbers of the right kind.
        ValueError: for timesteps that the scheduler does not have or that have no noise, and for a
            parameterization that it does not know.
    """
    schedule = noise_schedule(scheduler)
    listed = as_list("timesteps", timesteps)
    levels = _levels(scheduler, schedule, listed)
    kept = torch.as_tensor(timesteps).detach().cpu()
    return _process(scheduler, schedule, kept, levels, parameterization)


def stratified_process(
    scheduler: Any, num_steps: int, *, parameterization: str | None = None
) -> ForwardProcess:
    """The forward process of training, at the midpoints of equal parts of its timesteps.

    What ``set_timesteps`` left in the scheduler does not matter.

    Args:
        num_steps: S, from 1 to the number of training timesteps.
        parameterization: as of `forward_process`.

    Raises:
        TypeError, ValueError: as `forward_process`, and for num_steps out of range.
    """
    schedule = noise_schedule(scheduler)
    timesteps, levels = schedule.training()
    total = len(timesteps)
    if not 1 <= num_steps <= total:
        raise ValueError(f"num_steps must be between 1 and {total}, got {num_steps}")
    rows = ((torch.arange(num_steps) + 0.5) * (total / num_steps)).long()
    return _process(scheduler, schedule, timesteps[rows], levels[rows], parameterization)


def _process(
    scheduler: Any,
    schedule: NoiseSchedule,
    timesteps: Tensor,
    levels: Tensor,
    parameterization: str | None,
) -> ForwardProcess:
    given = parameterization
    if given is None:
        given = scheduler.config.get("prediction_type") or next(iter(schedule.predictions))
    if not isinstance(given, str) or given not in schedule.predictions:
        is_unset_flow = given == "flow_prediction" and "use_flow_sigmas" in scheduler.config
        raise ValueError(
            f"parameterization of {type(scheduler).__name__} must be one of "
            f"{', '.join(schedule.predictions)}, got {given!r}"
            + ("; a flow needs use_flow_sigmas=True" if is_unset_flow else "")
        )
    prediction = schedule.predictions[given]
    alpha, sigma, input_scale = schedule.scales(levels)
    if (sigma == 0).any():
        raise ValueError("timesteps: a step without noise (sigma = 0) has no coefficients")
    return ForwardProcess(
        timesteps,
        alpha * schedule.data_scale,
        sigma,
        input_scale,
        prediction.parameterization,
        schedule.data_scale,
        prediction.sign,
    )


def _levels(scheduler: Any, schedule: NoiseSchedule, timesteps: list[float]) -> Tensor:
    name = type(scheduler).__name__
    if schedule.integer and not all(isinstance(timestep, int) for timestep in timesteps):
        raise TypeError(f"timesteps must be integers for {name}, got {timesteps}")
    levels = [
        schedule.held[timestep] if timestep in schedule.held else schedule.level_at(timestep)
        for timestep in timesteps
    ]
    unknown = [timestep for timestep, level in zip(timesteps, levels, strict=True) if level is None]
    if unknown:
        raise ValueError(
            f"timesteps: the scheduler does not have {unknown}, {name} has {schedule.domain}"
        )
    return torch.tensor(levels, dtype=torch.float64)
