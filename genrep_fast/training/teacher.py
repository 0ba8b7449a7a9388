"""The distillation teacher: a frozen denoiser and an estimator of log p(x|y) over it.

It knows the temperature of its posterior, and its cost.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, fields
from typing import Any, TypeAlias

import torch

from ..data import DataSplits
from ..models import GenRep
from ..ops.posterior import distillation_loss, fit_temperature
from ..reporting.terminal import Stopwatch, console
from ..scoring.chain_bank import ChainBank
from ..scoring.classifier.calibration import Calibration
from ..scoring.classifier.file import restored_calibration
from ..scoring.estimators import ImageChainEstimator
from .checkpoints import Checkpoint
from .config import TrainingConfig
from .race import RaceCost, RacedElbo

# Chosen by negative log-likelihood on the calibration split of the digits: many short chains beat
# few long ones at the same cost.
_CENTER = "sample"
_SIGMA_FLOOR = 0.2
# A fifth of the steps is dropped, and every fourth of the rest is kept.
_BURN_IN = 0.2
_THIN = 4
# Each refresh renews one chain in four.
_REFRESH = 4
# Images that are scored at once in the calibration.
BATCH = 256

_Estimator: TypeAlias = RacedElbo | ImageChainEstimator | ChainBank


def planned_evaluations(config: TrainingConfig, num_classes: int) -> int:
    """Network evaluations of the teacher of a whole run, those of its calibration not counted.

    Of an elbo teacher the most that its races can take; how few do, its calibration tells.
    """
    if config.teacher == "none":
        return 0
    steps = sum(config.stage_steps[1:])
    if config.teacher == "bank":
        bank = scaled_chains(config) * num_classes * config.teacher_steps
        refreshes = steps // config.teacher_refresh if config.teacher_refresh else 0
        return bank + refreshes * bank // _REFRESH
    images = steps * config.gradient_accumulation_steps * config.batch_size
    return images * num_classes * config.teacher_steps


def planned_bank_bytes(
    config: TrainingConfig, num_classes: int, sample_shape: tuple[int, int, int]
) -> int:
    """What the bank's centres take in float32; 0 for a teacher without one."""
    if config.teacher != "bank":
        return 0
    kept = len(range(int(config.teacher_steps * _BURN_IN), config.teacher_steps, _THIN))
    return 4 * num_classes * scaled_chains(config) * kept * math.prod(sample_shape)


def scaled_chains(config: TrainingConfig) -> int:
    """Chains a class of the bank, fewer in a short run."""
    return max(2, round(config.teacher_chains * config.scale))


class Teacher:
    """Scores images with the estimator that `config.teacher` names, over the frozen `model`.

    Args:
        config: of the run; its teacher is not "none".
        model: frozen.
        scheduler: that `model` was trained with.
        bank: which `check_bank` accepted; one is built where it is needed and not given.
        calibration: of an elbo teacher, which `check_calibration` gave; None before `prepare`.

    Attributes:
        temperature: τ of the posterior, calibrated by `prepare`.
        accuracy: top-1 of the posterior on the calibration images, also of `prepare`.
        evaluations: images that went through the network, once a class and step.
        in_steps: stopwatch of the training steps: the scores of their images and the distillation
            loss (its forward pass).
        apart: stopwatch of everything else, the bank's chains and the calibration.
    """

    def __init__(
        self,
        config: TrainingConfig,
        model: GenRep,
        scheduler: Any,
        bank: ChainBank | None = None,
        calibration: Calibration | None = None,
    ) -> None:
        self.config = config
        self.model = model
        self.scheduler = scheduler
        self.temperature = 1.0
        self.accuracy = 0.0
        self.in_steps = Stopwatch(model.device)
        self.apart = Stopwatch(model.device)
        with self.apart:
            self.estimator = self._build_estimator(calibration) if bank is None else bank

    @property
    def evaluations(self) -> int:
        return self.estimator.evaluations

    @property
    def bank(self) -> ChainBank | None:
        """The bank of a teacher that has one; `state_dict` holds the rest."""
        return self.estimator if isinstance(self.estimator, ChainBank) else None

    @property
    def race(self) -> RacedElbo | None:
        """Of an elbo teacher."""
        return self.estimator if isinstance(self.estimator, RacedElbo) else None

    @property
    def calibration(self) -> Calibration | None:
        """Of an elbo teacher; `state_dict` holds the rest."""
        return None if self.race is None else self.race.classifier.calibration

    def prepare(self, batches: Iterable[tuple[torch.Tensor, torch.Tensor]]) -> None:
        """Calibrate the temperature, and the race of an elbo teacher.

        Args:
            batches: latents [B, C, H, W] of images that serve nothing else, and labels [B].
        """
        estimator = self.estimator
        with self.apart:
            if isinstance(estimator, RacedElbo):
                x, labels = (torch.cat(parts) for parts in zip(*batches, strict=True))
                scores, self.temperature = estimator.calibrate(x, labels)
            else:
                scored = [(estimator.log_likelihood(x), labels) for x, labels in batches]
                scores, labels = (torch.cat(parts) for parts in zip(*scored, strict=True))
                self.temperature = fit_temperature(scores, labels)
            self.accuracy = (scores.argmax(1) == labels).float().mean().item()
        if isinstance(estimator, RacedElbo):
            console.print(f"teacher    {estimator}", soft_wrap=True)

    def distillation_loss(
        self, logits: torch.Tensor, x: torch.Tensor, micro_batch: int
    ) -> torch.Tensor:
        """L_distil = KL(p ‖ softmax(logits)) in nats, with the teacher's posterior p.

        Args:
            logits: [B, K].
            x: clean latents [B, C, H, W].
            micro_batch: index of these images in the run, from which follows the noise of a race.
        """
        with self.in_steps:
            if isinstance(self.estimator, RacedElbo):
                scores = self.estimator.evidence(x, micro_batch)
            else:
                scores = self.estimator.log_likelihood(x)
            return distillation_loss(logits, scores, temperature=self.temperature)

    def refresh(self) -> None:
        """Renew a part of the bank's chains; the other estimators keep nothing that could age."""
        bank = self.bank
        if bank is not None:
            chains = max(1, scaled_chains(self.config) // _REFRESH)
            with self.apart:
                bank.refresh(self._denoise, chains=chains)

    def state_dict(self) -> dict[str, Any]:
        race = {} if self.race is None else asdict(self.race.cost)
        return {
            "model": self.model.trained_state(),
            "temperature": self.temperature,
            "accuracy": self.accuracy,
            "seconds_in_steps": self.in_steps.seconds,
            "seconds_apart": self.apart.seconds,
            "evaluations": self.evaluations,
            **race,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.model.load_state_dict(self.model.state_dict() | state["model"])
        self.temperature = state["temperature"]
        self.accuracy = state["accuracy"]
        self.in_steps.seconds = state["seconds_in_steps"]
        self.apart.seconds = state["seconds_apart"]
        # A bank keeps its own count.
        if not isinstance(self.estimator, ChainBank):
            self.estimator.evaluations = state["evaluations"]
        if self.race is not None:
            names = [field.name for field in fields(RaceCost)]
            self.race.cost = RaceCost(**{name: state[name] for name in names})

    def _build_estimator(self, calibration: Calibration | None) -> _Estimator:
        arguments = (self._denoise, self.scheduler, self.model.config.num_classes)
        steps = self.config.teacher_steps
        if self.config.teacher == "elbo":
            return RacedElbo(*arguments, self.config, calibration)
        if self.config.teacher == "image_chain":
            options = self._chain_options()
            return ImageChainEstimator(*arguments, num_inference_steps=steps, **options)
        return ChainBank.build(
            *arguments,
            self.model.sample_shape,
            num_inference_steps=steps,
            chains=scaled_chains(self.config),
            burn_in=int(steps * _BURN_IN),
            thin=_THIN,
            device=self.model.device,
            **self._chain_options(),
        )

    def _chain_options(self) -> dict[str, Any]:
        # A learned variance fits no table: the larger of its two bounds scores in its place.
        variance = "fixed_large" if self.scheduler.config.variance_type == "learned_range" else None
        return {
            "center": _CENTER,
            "sigma_floor": _SIGMA_FLOOR,
            "variance": variance,
            "seed": self.config.seed,
        }

    def _denoise(
        self, x_t: torch.Tensor, timesteps: torch.Tensor, labels: torch.Tensor
    ) -> torch.Tensor:
        return self.model(x_t, timesteps, labels, modulate=False).sample


def check_teacher(config: TrainingConfig, scheduler: Any, splits: DataSplits) -> None:
    """Raise ValueError where no teacher of `config` can score these images, before they are used.

    Args:
        scheduler: of the run.
        splits: whose calibration images calibrate it.
    """
    most = scheduler.config.num_train_timesteps
    if config.teacher != "none" and config.teacher_steps > most:
        wanted = f"at most {most}, the steps of the scheduler"
        raise ValueError(f"teacher_steps must be {wanted}, got {config.teacher_steps}")
    if config.teacher != "elbo":
        return
    found = (splits.num_classes, len(splits.calibration))
    if min(found) < 2:
        wanted = "an elbo teacher wants two classes and two calibration images at least"
        raise ValueError(f"splits: {wanted}, got {found[0]} and {found[1]}")


def check_bank(bank: ChainBank | None, config: TrainingConfig, model: GenRep) -> None:
    """Raise ValueError where `bank` is not one that `Teacher` builds with these arguments.

    A teacher of another kind than "bank" has none.
    """
    if (bank is not None) != (config.teacher == "bank"):
        fault = "no" if bank is None else "a"
        raise ValueError(f"a teacher of the kind {config.teacher} got {fault} bank")
    if bank is None:
        return
    found = (len(bank.centers), bank.settings.chains, *bank.centers.shape[2:])
    expected = (model.config.num_classes, scaled_chains(config), *model.sample_shape)
    if found != expected:
        sizes = "classes, chains and sample shape"
        raise ValueError(f"the bank has {sizes} {found}, its teacher {expected}")


def check_calibration(
    checkpoint: Checkpoint, config: TrainingConfig, model: GenRep, scheduler: Any
) -> Calibration | None:
    """The calibration of an elbo teacher in a checkpoint; None of another kind of teacher.

    None as well of a denoiser that gives the same output under every class, which cannot be
    calibrated.

    Raises:
        ValueError: where it is not one that `Teacher.prepare` makes with these arguments.
    """
    tensors = checkpoint.tensors.get("calibration")
    state = checkpoint.state["teacher"]
    if config.teacher != "elbo":
        if tensors is not None:
            raise ValueError(f"a teacher of the kind {config.teacher} got a calibration")
        return None
    if "calibration_images" not in state:
        raise ValueError(
            "its elbo teacher has no calibration: it is of an earlier genrep_fast, in which every "
            "class took every timestep; go on with that version, or train anew in another folder"
        )
    if tensors is None:
        if state["taught_evaluations"] > 0:
            raise ValueError("calibration.safetensors is missing")
        return None
    try:
        calibration = restored_calibration(tensors, model.config.num_classes, scheduler, None)
    except (TypeError, ValueError) as error:
        raise ValueError(f"calibration.safetensors: {error}") from error
    images, steps, _ = calibration.errors.shape
    found, wanted = (images, steps), (state["calibration_images"], config.teacher_steps)
    if found != wanted:
        raise ValueError(
            f"calibration.safetensors is of {found[0]} images at {found[1]} timesteps, "
            f"its teacher's of {wanted[0]} at {wanted[1]}"
        )
    return calibration
