"""Noisy inputs of a diffusion classifier; the one place where it reads a scheduler."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ...coefficients.forward_process import stratified_process
from ...coefficients.noise_schedules import noise_schedule
from ...reference.reverse_step import chain_noise

_TABLES = ("timesteps", "_alpha", "_sigma", "_of_data", "_of_noise")


class ForwardNoise:
    """x_t = α·x + σ·ε at S timesteps, and what the denoiser was trained to predict there.

    Args:
        scheduler: of diffusers, with noise levels; it is only read.
        steps: S; the timesteps are the midpoints of S equal parts of those that the scheduler has.
        parameterization: what the denoiser predicts; None reads the scheduler's prediction type.

    Attributes:
        timesteps: [S], as the denoiser takes them.

    Raises:
        TypeError, ValueError: for another scheduler, more steps than it has timesteps, and a step
            that a classifier cannot use.
    """

    def __init__(self, scheduler: Any, steps: int, parameterization: str | None = None) -> None:
        most = self.most_steps(scheduler)
        if not 1 <= steps <= most:
            raise ValueError(
                f"steps must lie between 1 and {most}, the scheduler's timesteps, got {steps}"
            )
        process = stratified_process(scheduler, steps, parameterization=parameterization)
        silent = process.timesteps[process.alpha == 0].tolist()
        if silent and process.parameterization == "epsilon":
            raise ValueError(
                f"scheduler: timesteps {silent} have no signal (zero terminal SNR), where a "
                "prediction of the noise says nothing of the image: use fewer steps, or a model "
                "that predicts the velocity"
            )
        self.timesteps = process.timesteps
        self._alpha, self._sigma = process.alpha, process.sigma
        # The target is linear in the image and the noise.
        zero, one = torch.zeros(steps, 1, dtype=torch.float64), torch.ones(steps, 1).double()
        self._of_data = process.target(one, zero)[:, 0]
        self._of_noise = process.target(zero, one)[:, 0]

    @staticmethod
    def most_steps(scheduler: Any) -> int:
        """Timesteps of training that the scheduler has."""
        return len(noise_schedule(scheduler).training()[0])

    def __len__(self) -> int:
        return len(self.timesteps)

    def agrees_with(self, other: ForwardNoise) -> bool:
        """Whether noisy inputs and targets of the other are the same, up to rounding."""
        pairs = ((getattr(self, name), getattr(other, name)) for name in _TABLES)
        return all(torch.allclose(mine.double(), its.double(), rtol=1e-4) for mine, its in pairs)

    def to(self, device: torch.device | str) -> ForwardNoise:
        """Move the tables to `device`, in place."""
        for name in _TABLES:
            setattr(self, name, getattr(self, name).to(device))
        return self

    def draw(
        self, x: Tensor, rows: Tensor, image_ids: Tensor, seed: int, dtype: torch.dtype
    ) -> tuple[Tensor, Tensor]:
        """Noisy inputs and training targets, both [N, *shape] in `dtype`.

        The noise follows from the seed, the image's id and the step's row, whatever the batch.

        Args:
            x: clean images or latents [N, *shape].
            rows: int64 [N], the steps.
            image_ids: int64 [N] in [0, 2³²).
            seed: in [0, 2⁶⁴).
            dtype: float32 or float64.
        """
        noise = chain_noise(seed, image_ids, rows, x.shape[1:])
        clean = x.double()

        def combined(of_data: Tensor, of_noise: Tensor) -> Tensor:
            sizes = (-1, *[1] * (x.ndim - 1))
            data, noisy = of_data[rows].view(sizes), of_noise[rows].view(sizes)
            return (data * clean + noisy * noise).to(dtype)

        return combined(self._alpha, self._sigma), combined(self._of_data, self._of_noise)
