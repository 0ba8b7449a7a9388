"""What a run is besides weights and optimizer: place, momentum network, teacher, history."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ..files import read_json_lines
from ..models import GenRep
from ..models.weights import check_weights
from ..scoring.classifier.file import calibration_tensors
from .checkpoints import Checkpoint
from .config import FIRST_SPLIT, STAGES, TrainingConfig
from .teacher import Teacher, check_bank, check_calibration

# What is read off gradients may overflow where a GradScaler skips the step; the losses may not.
_MAY_OVERFLOW = ("gradient_norm", "cosine", "alpha")


class RaceFacts(NamedTuple):
    """What the race of an elbo teacher took, beside what the full budget would have taken.

    Attributes:
        evaluations_an_image: of the network, over the training steps.
        full_budget_evaluations_an_image: all classes at all timesteps.
        seconds_a_step: of the teacher in a training step that it teaches.
        full_budget_seconds_a_step: of as many images, as long as those of the calibration took.
        calibration_images: which took the full budget.
    """

    evaluations_an_image: float
    full_budget_evaluations_an_image: int
    seconds_a_step: float
    full_budget_seconds_a_step: float
    calibration_images: int


@dataclass
class TrainingState:
    """Place, networks beside the trained one and history of a run.

    Args:
        config: of the run.
        parameters: those that are trained, by name.
        averages: in the same order.
    """

    config: TrainingConfig
    parameters: dict[str, torch.Tensor]
    averages: list[torch.Tensor]
    step: int = 0
    micro_batch: int = 0
    stage: int = -1
    momentum: GenRep | None = None
    teacher: Teacher | None = None
    history: list[dict[str, float]] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))

    @property
    def teacher_percent(self) -> float:
        """What the teacher takes of a training step that it teaches, in per cent of its time."""
        if self.teacher is None:
            return 0.0
        taught = self.seconds["perception"] + self.seconds["joint"]
        return 100 * self.teacher.in_steps.seconds / taught

    @property
    def race_facts(self) -> RaceFacts | None:
        """Of an elbo teacher that has taught."""
        race = None if self.teacher is None else self.teacher.race
        if self.teacher is None or race is None or race.cost.taught_images == 0:
            return None
        cost = race.cost
        steps = self.step - self.config.stage_steps[0]
        full_seconds = cost.calibration_seconds / cost.calibration_images
        return RaceFacts(
            evaluations_an_image=cost.taught_evaluations / cost.taught_images,
            full_budget_evaluations_an_image=race.full_budget,
            seconds_a_step=self.teacher.in_steps.seconds / steps,
            full_budget_seconds_a_step=full_seconds * cost.taught_images / steps,
            calibration_images=cost.calibration_images,
        )

    def log(self, stage: int, metrics: dict[str, torch.Tensor], learning_rate: float) -> None:
        """Append a row to the history; raise FloatingPointError where a loss is not finite."""
        row: dict[str, float] = {
            "step": self.step,
            "stage": stage,
            "learning_rate": learning_rate,
        }
        row |= {name: float(value) for name, value in metrics.items()}
        for name, value in row.items():
            if name not in _MAY_OVERFLOW and not math.isfinite(value):
                raise FloatingPointError(
                    f"{name} is {value} at step {self.step} ({STAGES[stage]}); "
                    f"checkpoints up to the last finite one are kept in {self.config.output}"
                )
        if self.teacher is not None:
            seconds = self.teacher.in_steps.seconds + self.teacher.apart.seconds
            row |= {"teacher_evaluations": self.teacher.evaluations, "teacher_seconds": seconds}
        self.history.append(row)

    @torch.no_grad()
    def follow(self, momentum: float) -> None:
        """θ_sem ← momentum·θ_sem + (1 − momentum)·θ_unified, where there is such a network."""
        if self.momentum is None:
            return
        followers = [self.momentum.get_parameter(name) for name in self.parameters]
        torch._foreach_lerp_(followers, list(self.parameters.values()), 1 - momentum)

    def checkpoint(self) -> Checkpoint:
        """This state as a checkpoint holds it; the trainer adds weights and optimizer."""
        teacher = None
        tensors = {"averages": dict(zip(self.parameters, self.averages, strict=True))}
        if self.momentum is not None:
            tensors["momentum"] = self.momentum.trained_state()
        if self.teacher is not None:
            teacher = self.teacher.state_dict()
            tensors["teacher"] = teacher.pop("model")
            calibration = self.teacher.calibration
            if calibration is not None:
                tensors["calibration"] = calibration_tensors(calibration)
        state = {
            "step": self.step,
            "micro_batch": self.micro_batch,
            "stage": self.stage,
            "seconds": self.seconds,
            "history": self.history,
            "teacher": teacher,
            "options": self.config.decisive(),
        }
        return Checkpoint(state, tensors, None if self.teacher is None else self.teacher.bank)

    def check(self, checkpoint: Checkpoint) -> None:
        """Raise ValueError where `checkpoint` is not one of a run with these options."""
        state = checkpoint.state
        options = self.config.decisive()
        written = dict(state["options"])
        if self.config.data.startswith("folder:"):
            written.setdefault("split", FIRST_SPLIT)
        for name, saved in written.items():
            if name in options and options[name] != saved:
                raise ValueError(f"{name} is {options[name]} now, and was {saved}")
        place = tuple(state[name] for name in ("step", "micro_batch", "stage"))
        if place not in self._places(place[0]):
            found = f"step {place[0]}, micro-batch {place[1]} and stage {place[2]}"
            raise ValueError(f"{found} are no place in this run")
        if state["seconds"].keys() != set(STAGES):
            raise ValueError("the seconds in state.json are not those of the stages")
        check_numbers(state["seconds"], "the seconds in state.json")
        check_history(state["history"])
        averages = checkpoint.tensors["averages"]
        check_weights(averages, self.parameters, "the tensors of averages.safetensors")
        taught = place[2] > 0 and self.config.teacher != "none"
        wanted = {"momentum": place[2] == 2, "teacher": taught}
        for name, want in wanted.items():
            if want != (name in checkpoint.tensors):
                fault = "missing" if want else f"no part of stage {place[2]}"
                raise ValueError(f"{name}.safetensors is {fault}")
        if taught != (state["teacher"] is not None):
            raise ValueError("the teacher's part of state.json is not that of its stage")
        if taught:
            check_numbers(state["teacher"], "the teacher's part of state.json")

    def _places(self, step: int) -> list[tuple[int, int, int]]:
        """Step, micro-batches and stage of a checkpoint after `step` steps, if there can be one."""
        end = 0
        for stage, length in enumerate(self.config.stage_steps):
            if type(step) is int and end < step <= end + length:
                return [(step, step * self.config.gradient_accumulation_steps, stage)]
            end += length
        return []

    def restore(self, checkpoint: Checkpoint, model: GenRep, scheduler: Any) -> None:
        """Go to the place of `checkpoint`, which `check` accepted, with networks like `model`.

        Raises:
            ValueError: for networks and a bank that do not fit; nothing is changed then.
        """
        momentum = None
        if "momentum" in checkpoint.tensors:
            momentum = model.frozen_copy()
            saved = checkpoint.tensors["momentum"]
            check_weights(saved, momentum.trained_state(), "the tensors of momentum.safetensors")
            momentum.load_state_dict(momentum.state_dict() | saved)
        teacher = None
        if "teacher" in checkpoint.tensors:
            frozen = model.frozen_copy()
            saved = checkpoint.tensors["teacher"]
            check_weights(saved, frozen.trained_state(), "the tensors of teacher.safetensors")
            check_bank(checkpoint.bank, self.config, frozen)
            calibration = check_calibration(checkpoint, self.config, frozen, scheduler)
            teacher = Teacher(self.config, frozen, scheduler, checkpoint.bank, calibration)
            teacher.load_state_dict({**checkpoint.state["teacher"], "model": saved})
        for name in ("step", "micro_batch", "stage", "history", "seconds"):
            setattr(self, name, checkpoint.state[name])
        self.momentum = momentum
        self.teacher = teacher
        copy_(self.averages, [checkpoint.tensors["averages"][name] for name in self.parameters])


@torch.no_grad()
def copy_(targets: list[torch.Tensor], sources: list[torch.Tensor]) -> None:
    """Copy the values of `sources`, on whatever device, into `targets`."""
    torch._foreach_copy_(targets, sources)


def read_history(path: Path) -> list[dict[str, Any]]:
    """The rows of a history.jsonl.

    Raises:
        ValueError: with `path` in it, where it is damaged.
    """
    history = read_json_lines(path)
    try:
        check_history(history)
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    return history


def check_numbers(values: Any, what: str) -> None:
    """Raise ValueError where `values`, which `what` names, is no dictionary of finite numbers."""
    if not isinstance(values, dict) or not all(map(_is_finite_number, values.values())):
        raise ValueError(f"{what} must be numbers and finite, got {repr(values)[:80]}")


def _is_finite_number(value: Any) -> bool:
    return type(value) in (int, float) and abs(value) < math.inf


def check_history(history: Any) -> None:
    """Raise ValueError where `history` is not rows of numbers, each with its step and stage."""
    if not isinstance(history, list):
        raise ValueError(f"the history is a {type(history).__name__}")
    for number, row in enumerate(history, start=1):
        fits = isinstance(row, dict) and all(type(value) in (int, float) for value in row.values())
        placed = fits and type(row.get("step")) is int and row.get("stage") in range(len(STAGES))
        if not placed:
            fault = "no step, no stage or something that is no number"
            raise ValueError(f"row {number} of the history has {fault}")
