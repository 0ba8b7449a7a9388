"""Monte Carlo estimators of log p(x|y) for every class, from a class-conditional denoiser.

Each has `log_likelihood(x) -> [B, K]` and counts its network evaluations (one an image, class and
step). `ChainBank` is the third of them.
"""

from __future__ import annotations

from typing import Any

import torch

from ..coefficients.forward_process import forward_process, stratified_process
from ..coefficients.tables import StepCoefficients, elbo_tables
from ..reference.reverse_step import chain_noise
from .chains import (
    Denoiser,
    Prediction,
    ReverseChain,
    check_denoiser,
    inference_scheduler,
    initial_noise,
    network_output,
)
from .scorer import PosteriorScorer


class ElboEstimator:
    """Weighted denoising error over stratified timesteps (Diffusion Classifier, Li et al. 2023).

    The noise of a step is drawn from the seed alone, the same for every class and image: an image's
    score does not depend on its batch.

    Args:
        denoiser: ``denoiser(x_t, timesteps, labels) -> model output``: [N, C, ...], [N], int64 [N]
            -> [N, C', ...], or an output of diffusers' models, as in `ChainBank.build`. x_t is
            scaled as the scheduler's ``scale_model_input`` does; timesteps are int64, or float32
            where the scheduler's are continuous.
        scheduler: any of diffusers' schedulers that has noise levels; what ``set_timesteps`` left
            in it does not matter.
        num_classes: K.
        num_steps: S, the midpoints of as many equal parts of the training timesteps.
        seed: of the noise.

    Raises:
        TypeError: for a scheduler without noise levels, or a denoiser that cannot be called.
        ValueError: for num_steps out of range.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        num_classes: int,
        *,
        num_steps: int = 16,
        seed: int = 0,
    ) -> None:
        check_denoiser(denoiser)
        self.process = stratified_process(scheduler, num_steps)
        self.denoiser = denoiser
        self.scheduler = scheduler
        self.num_classes = num_classes
        self.seed = seed
        self.timesteps = self.process.timesteps
        self.coefficients = [
            StepCoefficients(**elbo_tables(self.process[row])).to(dtype=torch.float32)
            for row in range(num_steps)
        ]
        self.evaluations = 0

    @torch.no_grad()
    def log_likelihood(self, x: torch.Tensor) -> torch.Tensor:
        """−(1/S) Σ_s ‖target_s − o_s‖² [B, K] for clean latents x [B, C, ...].

        Up to a constant that all classes share.
        """
        self.coefficients = [tables.to(x.device) for tables in self.coefficients]
        scorer = PosteriorScorer(self.num_classes, reduction="mean")
        chain_id = torch.zeros(1, dtype=torch.int64, device=x.device)
        for row, timestep in enumerate(self.timesteps):
            noise = chain_noise(self.seed, chain_id, row, x.shape[1:]).to(x.dtype).expand_as(x)
            x_t, target = self._noisy_input_and_target(row, x, noise)
            output = denoise_classes(self.denoiser, x_t[:, None], timestep, self.num_classes)
            self.evaluations += output.shape[0] * output.shape[1]
            scorer.update(x, output[:, :, None], self.coefficients[row], target[:, None, None])
        return scorer.log_likelihood()

    def _noisy_input_and_target(
        self, row: int, x: torch.Tensor, noise: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        if not _adds_noise_by_timestep(self.scheduler):
            process = self.process[row]
            return process.noisy_input(x, noise), process.target(x, noise)
        steps = self.timesteps[row].to(x.device).expand(len(x))
        x_t = self.scheduler.add_noise(x, noise, steps)
        return x_t, training_target(self.scheduler, x, noise, steps)


class ImageChainEstimator:
    """One reverse chain an image and class, from the image noised to `start` (GenRep).

    The kept steps of a chain are a mixture.

    Args:
        denoiser, scheduler, num_classes, seed: as of `ElboEstimator`.
        num_inference_steps: of the whole chain, of which the part below `start` is run.
        start: noise level at which the image enters the chain, as a fraction of the training
            timesteps.
        burn_in, thin: positions dropped at the beginning, and the distance of those kept.
        center, sigma_floor: of the scoring kernels, see `StepCoefficients.chain`.
        variance: of all kernels, likewise; a scheduler with learned_range needs one of the fixed
            ones.

    Raises:
        TypeError: for a scheduler without `alphas_cumprod`.
        ValueError: where no step is kept, and as `StepCoefficients.chain`.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        num_classes: int,
        *,
        num_inference_steps: int = 20,
        start: float = 0.5,
        burn_in: int = 0,
        thin: int = 1,
        center: str = "mean",
        sigma_floor: float = 0.0,
        variance: str | None = None,
        seed: int = 0,
    ) -> None:
        check_denoiser(denoiser)
        _require_noise_levels(scheduler)
        self.scheduler = inference_scheduler(scheduler, num_inference_steps)
        highest = start * scheduler.config.num_train_timesteps
        timesteps = self.scheduler.timesteps[self.scheduler.timesteps < highest]
        self.kept = range(len(timesteps))[burn_in::thin]
        if len(self.kept) == 0:
            steps = f"the {len(timesteps)} steps below start = {start}"
            raise ValueError(f"burn_in must be less than {steps}, got {burn_in}")
        coefficients = StepCoefficients.chain(self.scheduler, timesteps, variance=variance)
        self.chain = ReverseChain(timesteps, coefficients)
        self.scores = {
            row: StepCoefficients.chain(
                self.scheduler,
                timesteps[row : row + 1],
                center=center,
                sigma_floor=sigma_floor,
                variance=variance,
            )
            for row in self.kept
        }
        self.denoiser, self.num_classes, self.seed = denoiser, num_classes, seed
        self.evaluations = 0

    @torch.no_grad()
    def log_likelihood(self, x: torch.Tensor) -> torch.Tensor:
        """Log of the mixture of the kept steps [B, K] for clean latents x [B, C, ...].

        The noise of an image depends on its place in the batch.
        """
        batch, classes = len(x), self.num_classes
        chain_ids = torch.arange(batch * classes, device=x.device)
        noise = initial_noise(self.seed, chain_ids, x.shape[1:]).to(x.dtype)
        images = x.repeat_interleave(classes, 0)
        first = self.chain.timesteps[0].to(x.device).expand(len(images))
        noised = self.scheduler.add_noise(images, noise, first)  # [B · K, C, ...]
        scorer = PosteriorScorer(classes, reduction="mixture")
        self.chain = self.chain.to(x.device)
        self.scores = {row: tables.to(x.device) for row, tables in self.scores.items()}

        def predict(row: int, timestep: torch.Tensor, x_t: torch.Tensor) -> Prediction:
            noisy = x_t.unflatten(0, (batch, classes))  # [B, K, C, ...]
            output = denoise_classes(self.denoiser, noisy, timestep, classes)
            self.evaluations += batch * classes
            if row in self.kept:
                scorer.update(x, output[:, :, None], self.scores[row], noisy[:, :, None])
            return Prediction(output.flatten(0, 1))

        self.chain.run(noised, predict, seed=self.seed, chain_ids=chain_ids)
        return scorer.log_likelihood()


def denoise_classes(
    denoiser: Denoiser, x_t: torch.Tensor, timestep: torch.Tensor, num_classes: int
) -> torch.Tensor:
    """Model output [B, K, C', ...] of x_t [B, 1 or K, C, ...] under every class at one timestep."""
    x_t = x_t.expand(-1, num_classes, *x_t.shape[2:])
    labels = torch.arange(num_classes, device=x_t.device).expand(len(x_t), -1).flatten()
    timesteps = timestep.to(x_t.device).expand(len(labels))
    output = network_output(denoiser, x_t.flatten(0, 1), timesteps, labels)
    return output.unflatten(0, x_t.shape[:2])


def training_target(
    scheduler: Any, x: torch.Tensor, noise: torch.Tensor, timesteps: torch.Tensor
) -> torch.Tensor:
    """What a denoiser of the scheduler's prediction type learns to predict, of the shape of x.

    Reads the timesteps [B] from their device, unless the scheduler is DDPM's or DDIM's.

    Raises:
        TypeError: for a scheduler without noise levels.
        ValueError: for a prediction type that the scheduler does not know.
    """
    if not _adds_noise_by_timestep(scheduler):
        return forward_process(scheduler, timesteps).target(x, noise)
    prediction_type = scheduler.config.prediction_type
    if prediction_type == "epsilon":
        return noise
    if prediction_type == "sample":
        return x
    if prediction_type == "v_prediction":
        return scheduler.get_velocity(x, noise, timesteps)
    raise ValueError(
        f"prediction_type must be 'epsilon', 'v_prediction' or 'sample', got {prediction_type!r}"
    )


def _adds_noise_by_timestep(scheduler: Any) -> bool:
    """Whether the scheduler's noise depends on the timestep alone, and waits for no device.

    That of others depends on what set_timesteps and step left in them.
    """
    names = {ancestor.__name__ for ancestor in type(scheduler).__mro__}
    return not names.isdisjoint(("DDPMScheduler", "DDIMScheduler"))


def _require_noise_levels(scheduler: Any) -> None:
    if not hasattr(scheduler, "alphas_cumprod"):
        wanted = "alphas_cumprod, as DDPMScheduler and DDIMScheduler have"
        raise TypeError(f"scheduler must have {wanted}, got {type(scheduler).__name__}")
