"""Reverse chains: a scheduler's steps one after the other, with counter-based noise.

`ChainBank` keeps steps of them, `ImageChainEstimator` scores them, `GenRepPipeline` keeps the end.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_floating
from ..coefficients.tables import StepCoefficients
from ..coefficients.transitions import learned_log_variance_ratio, learned_std_scale
from ..ops.reverse_step import reverse_step
from ..reference.reverse_step import INITIAL_ROW, chain_noise

# ``denoiser(x_t, timesteps, labels) -> model output``: [N, C, *spatial], [N], int64 [N] ->
# [N, C', *spatial] with C' ≥ C, or what diffusers' models return: see `network_output`.
Denoiser = Callable[[Tensor, Tensor, Tensor], Any]


class Prediction(NamedTuple):
    """What a network says of one step of N chains.

    Attributes:
        output: [N, C', *spatial], the network's; a learned variance lies in its further channels.
        mean: [N, C, *spatial] that moves the chains in the place of `output`, where the
            coefficients' parameterization is "mean".
        std_scale: as of `reverse_step`, beside a learned variance.
    """

    output: Tensor
    mean: Tensor | None = None
    std_scale: Tensor | None = None


@dataclasses.dataclass(frozen=True)
class ReverseChain:
    """The steps of a reverse chain, through which any number of chains are run.

    Attributes:
        timesteps: [S], from the noisiest on.
        coefficients: of these steps, as of `StepCoefficients.chain`.
        log_variance_ratio: [S] where the network learns the variance, see
            `learned_log_variance_ratio`; the coefficients then hold the "fixed_large" one.
    """

    timesteps: Tensor
    coefficients: StepCoefficients
    log_variance_ratio: Tensor | None = None

    @classmethod
    def from_scheduler(
        cls, scheduler: Any, timesteps: Tensor, *, variance: str | None = None, **options: Any
    ) -> ReverseChain:
        """The chain that the scheduler itself runs, with the variance that a network learns.

        Args:
            scheduler, timesteps, variance, options: of `StepCoefficients.chain`; a learned variance
                takes the place of `variance`.

        Raises:
            TypeError, ValueError: as `StepCoefficients.chain` and `learned_log_variance_ratio`.
        """
        log_variance_ratio = learned_log_variance_ratio(scheduler, timesteps)
        if log_variance_ratio is not None:
            # The learned standard deviation is a multiple of this one, which is zero nowhere but in
            # the step that adds no noise.
            variance = "fixed_large"
        coefficients = StepCoefficients.chain(scheduler, timesteps, variance=variance, **options)
        return cls(timesteps, coefficients, log_variance_ratio)

    def __len__(self) -> int:
        return len(self.timesteps)

    def to(self, device: torch.device | str) -> ReverseChain:
        """The same chain with its coefficients on another device."""
        return dataclasses.replace(self, coefficients=self.coefficients.to(device))

    def run(
        self,
        x_t: Tensor,
        predict: Callable[[int, Tensor, Tensor], Prediction],
        *,
        seed: int,
        chain_ids: Tensor,
        progress: Callable[[Tensor], Iterable[Tensor]] | None = None,
    ) -> Tensor:
        """Run N chains through every step.

        Args:
            x_t: where they start [N, C, *spatial], see `initial_noise`.
            predict: ``predict(row, timestep, x_t)``, called before each step with its row of the
                tables, its 0-dimensional timestep and the samples that enter it.
            seed, chain_ids: of the noise, as of `reverse_step`.
            progress: iterates over the timesteps and shows how far it is.

        Returns:
            Where they end [N, C, *spatial].
        """
        timesteps = self.timesteps if progress is None else progress(self.timesteps)
        for row, timestep in enumerate(timesteps):
            prediction = predict(row, timestep, x_t)
            output = prediction.output if prediction.mean is None else prediction.mean
            std_scale = self._std_scale(row, prediction, channels=x_t.shape[1])
            x_t, _ = reverse_step(
                x_t,
                output,
                self.coefficients,
                row,
                seed=seed,
                chain_ids=chain_ids,
                std_scale=std_scale,
            )
        return x_t

    def _std_scale(self, row: int, prediction: Prediction, channels: int) -> Tensor | None:
        if self.log_variance_ratio is None:
            return prediction.std_scale
        learned = learned_std_scale(prediction.output, channels, self.log_variance_ratio[row])
        if prediction.std_scale is None:
            return learned
        return prediction.std_scale * learned


def check_denoiser(denoiser: Denoiser) -> None:
    """Check that `denoiser` can be called."""
    if not callable(denoiser):
        raise TypeError(f"denoiser must be callable, got {type(denoiser).__name__}")


def network_output(denoiser: Denoiser, x_t: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
    """What a denoiser predicts [N, C', *spatial] of x_t [N, C, *spatial].

    Of an output of diffusers' models it is the ``sample``, of a tuple, as they return with
    ``return_dict=False``, the first entry.

    Raises:
        TypeError: where the denoiser returns anything else.
        ValueError: for another shape.
    """
    returned = denoiser(x_t, timesteps, labels)
    output = returned
    if isinstance(returned, (tuple, list)) and returned:
        output = returned[0]
    elif not isinstance(returned, Tensor):
        output = getattr(returned, "sample", None)
    if not isinstance(output, Tensor):
        raise TypeError(
            "denoiser must return a tensor, an output with a tensor sample, or a tuple that begins "
            f"with a tensor, got {type(returned).__name__}"
        )
    check_floating(output, "denoiser's output")
    channels = x_t.shape[1]
    if output.ndim != x_t.ndim or output[:, :channels].shape != x_t.shape:
        wanted = f"{tuple(x_t.shape)} up to further channels"
        raise ValueError(f"denoiser must return {wanted}, got {tuple(output.shape)}")
    return output


def initial_noise(seed: int, chain_ids: Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise from which chains start, float64 [N, *shape]."""
    return chain_noise(seed, chain_ids, INITIAL_ROW, shape)


def inference_scheduler(scheduler: Any, num_inference_steps: int) -> Any:
    """A copy of the scheduler that is set to as many steps; its own stays as it is."""
    scheduler = copy.deepcopy(scheduler)
    scheduler.set_timesteps(num_inference_steps)
    return scheduler
