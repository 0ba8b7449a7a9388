"""The race as a distillation teacher: what a denoiser says of the training images of a step."""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any

import torch
from torch import Tensor

from ..reporting.terminal import wall_clock
from ..scoring.chains import Denoiser
from ..scoring.classifier.calibration import Calibration, SameOutputs
from ..scoring.classifier.diffusion_classifier import DiffusionClassifier
from .batches import seed_of
from .config import TrainingConfig

# Rows that go through the network at once.
_ROWS = 256
# Calibration images; a race that knows fewer is too careful, and more tell it little.
_FEWEST_IMAGES, _MOST_IMAGES = 50, 200
# What follows from a seed and the index of a micro-batch begins at 0.
_CALIBRATION, _TRIAL = -1, -2


@dataclasses.dataclass
class RaceCost:
    """What was spent.

    Attributes:
        calibration_images: that took the full budget.
        calibration_seconds: of the full budget, all of these images together.
        taught_images, taught_evaluations: of the training steps: images, and their evaluations.
    """

    calibration_images: int = 0
    calibration_seconds: float = 0.0
    taught_images: int = 0
    taught_evaluations: int = 0


class RacedElbo:
    """log p(y|x) by `DiffusionClassifier`'s race, calibrated once.

    The denoiser that is calibrated may give the same output under every class, as an untrained one
    does. Its posterior is uniform, and is not evaluated.

    Args:
        denoiser, scheduler: as of `DiffusionClassifier`.
        num_classes: K.
        config: of the run; its teacher_steps are the timesteps of the full budget and of the
            calibration, its seed that of the noise.
        calibration: of this denoiser, or None before `calibrate`.

    Attributes:
        classifier: that races.
        evaluations: images that went through the network, once a class and step.
        cost: of the calibration and of the training steps.
    """

    def __init__(
        self,
        denoiser: Denoiser,
        scheduler: Any,
        num_classes: int,
        config: TrainingConfig,
        calibration: Calibration | None = None,
    ) -> None:
        self.config = config
        # No more than all classes of a micro-batch.
        rows = min(_ROWS, config.batch_size * num_classes)
        self.classifier = DiffusionClassifier(denoiser, scheduler, num_classes, batch_size=rows)
        self.classifier.calibration = calibration
        self.evaluations = 0
        self.cost = RaceCost()

    def __str__(self) -> str:
        if self.classifier.calibration is None:
            return "uniform posterior, not evaluated"
        expected = self.classifier.estimate().evaluations
        return (
            f"about {expected:.1f} evaluations an image in place of {self.full_budget}, "
            f"calibrated on {self.cost.calibration_images} images"
        )

    @property
    def full_budget(self) -> int:
        """Evaluations of every class at every timestep of an image."""
        return self.classifier.num_classes * self.config.teacher_steps

    def calibrate(self, x: Tensor, labels: Tensor) -> tuple[Tensor, float]:
        """Calibrate the race, then run it once over the same images with other noise.

        Args:
            x: clean latents [N, C, H, W] with N ≥ 2, of images that serve nothing else.
            labels: int64 [N].

        Returns:
            The evidence of the second run [N, K], and the temperature of its posterior.
        """
        started = wall_clock(x.device)
        try:
            self.classifier.calibrate(
                x,
                labels,
                steps=self.config.teacher_steps,
                seed=seed_of(self.config.seed, _CALIBRATION),
                progress=False,
            )
        except SameOutputs:
            warnings.warn(
                "teacher: the denoiser gives the same output under every class, so its posterior "
                "is uniform and teaches nothing; train it longer (diffusion_steps), or give a "
                "backbone that depends on its labels",
                stacklevel=2,
            )
        self.cost.calibration_seconds = wall_clock(x.device) - started
        self.cost.calibration_images = len(x)
        self.evaluations += len(x) * self.full_budget
        return self._race(x, _TRIAL)[:2]

    def evidence(self, x: Tensor, micro_batch: int) -> Tensor:
        """What the posterior is made of [B, K], of clean latents [B, C, H, W].

        Args:
            micro_batch: its index, from which the noise follows, with the seed of the run.
        """
        evidence, _, evaluations = self._race(x, micro_batch)
        self.cost.taught_images += len(x)
        self.cost.taught_evaluations += evaluations
        return evidence

    def _race(self, x: Tensor, index: int) -> tuple[Tensor, float, int]:
        """Evidence [B, K], temperature and evaluations."""
        if self.classifier.calibration is None:
            return torch.zeros(len(x), self.classifier.num_classes, device=x.device), 1.0, 0
        seed = seed_of(self.config.seed, index)
        result = self.classifier(x, seed=seed, progress=False)
        evaluations = int(result.evaluations.sum())
        self.evaluations += evaluations
        return result.evidence, result.temperature, evaluations


def calibration_images(config: TrainingConfig, available: int) -> Tensor | None:
    """Which images of the calibration split a teacher is calibrated on, int64 [N]; None: all.

    N calibration images cost the full budget of S timesteps each, and a race that knows them up to
    60 · K / N evaluations an image more than one that knows many (15 to 20 on digits and strings of
    them). Over M taught images both together cost least at N = √(60 · M / S).
    """
    if config.teacher != "elbo":
        return None
    steps = sum(config.stage_steps[1:]) * config.gradient_accumulation_steps
    best = round(math.sqrt(60 * steps * config.batch_size / config.teacher_steps))
    number = min(max(best, _FEWEST_IMAGES), _MOST_IMAGES)
    if number >= available:
        return None
    generator = torch.Generator().manual_seed(seed_of(config.seed, _CALIBRATION))
    return torch.randperm(available, generator=generator)[:number]
