"""Strategies of a diffusion classifier: which classes are evaluated at which timesteps."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np

from ...checks import check_at_least, check_choice, check_number

WEIGHTS = ("calibrated", "uniform")
# Of the full budget, where nothing says otherwise.
DEFAULT_STEPS = 24


@dataclasses.dataclass(frozen=True)
class Full:
    """Every class at every step.

    Args:
        steps: S; None: those of the calibration, or 24.
        weights: "calibrated", 1/s²(t) (uniform without a calibration), or "uniform".
    """

    steps: int | None = None
    weights: str = "calibrated"

    def __post_init__(self) -> None:
        _check_steps(self.steps, "steps")
        check_choice(self.weights, "weights", WEIGHTS)


@dataclasses.dataclass(frozen=True)
class Stratified:
    """Every class at a few steps, the midpoints of as many equal parts of the timesteps.

    Args:
        steps: S; None: what the budget of the call allows, or 8.
        weights: as of `Full`.
    """

    steps: int | None = None
    weights: str = "calibrated"

    def __post_init__(self) -> None:
        _check_steps(self.steps, "steps")
        check_choice(self.weights, "weights", WEIGHTS)


@dataclasses.dataclass(frozen=True)
class Staged:
    """Fewer classes from stage to stage (Diffusion Classifier, ICCV 2023).

    The default is the published schedule of CIFAR-10: 50 steps of all classes, then 450 more of
    the best five.

    Args:
        keep: classes that stay after each stage, at least 1 and never more than before.
        steps: of an image up to the end of each stage, ascending.
        weights: as of `Full`.
    """

    keep: Sequence[int] = (5, 1)
    steps: Sequence[int] = (50, 500)
    weights: str = "uniform"

    def __post_init__(self) -> None:
        for name in ("keep", "steps"):
            values = getattr(self, name)
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
            for value in values:
                check_at_least(1, **{name: value})
            # A list could be changed afterwards, and could not be hashed.
            object.__setattr__(self, name, tuple(int(value) for value in values))
        if len(self.keep) != len(self.steps):
            raise ValueError(
                "keep and steps must have one entry a stage, "
                f"got {len(self.keep)} and {len(self.steps)}"
            )
        if list(self.keep) != sorted(self.keep, reverse=True):
            raise ValueError(f"keep must not grow from stage to stage, got {self.keep}")
        if any(
            later <= earlier for earlier, later in zip(self.steps, self.steps[1:], strict=False)
        ):
            raise ValueError(f"steps must grow from stage to stage, got {self.steps}")
        check_choice(self.weights, "weights", WEIGHTS)


@dataclasses.dataclass(frozen=True)
class Race:
    """Classes leave one by one, as soon as what is known of the noise allows it.

    Args:
        max_steps: of an image; None: those of the calibration.
        order: of the timesteps: "signal", the most telling first, or "low_discrepancy".
        weights: as of `Full`.
        correlation: of an image's steps in the likelihood ratio of two classes: as "measured", or
            the bounds "full" and "none".
    """

    max_steps: int | None = None
    order: str = "signal"
    weights: str = "calibrated"
    correlation: str = "measured"

    def __post_init__(self) -> None:
        _check_steps(self.max_steps, "max_steps")
        check_choice(self.order, "order", ("signal", "low_discrepancy"))
        check_choice(self.weights, "weights", WEIGHTS)
        check_choice(self.correlation, "correlation", ("measured", "full", "none"))


Strategy: TypeAlias = Full | Stratified | Staged | Race

_BY_NAME: dict[str, type[Any]] = {
    "full": Full,
    "stratified": Stratified,
    "staged": Staged,
    "race": Race,
}


def require_strategy(strategy: str | Strategy) -> Strategy:
    """The strategy of a name, or the one given."""
    if isinstance(strategy, str):
        check_choice(strategy, "strategy", tuple(_BY_NAME))
        return _BY_NAME[strategy]()
    if not isinstance(strategy, tuple(_BY_NAME.values())):
        wanted = "a name, or gf.Full, gf.Stratified, gf.Staged or gf.Race"
        raise TypeError(f"strategy must be {wanted}, got {strategy!r}")
    return strategy


def check_confidence(confidence: float) -> None:
    """Check that `confidence` is a number between 0 and 1."""
    check_number(confidence, "confidence")
    if not 0 < confidence < 1:
        raise ValueError(f"confidence must lie between 0 and 1, got {confidence}")


def low_discrepancy_order(steps: int) -> np.ndarray:
    """The rows 0 … steps − 1 in an order of which every beginning is spread evenly.

    They follow van der Corput's sequence ½, ¼, ¾, ⅛, …, int64 [steps].
    """
    found: dict[int, None] = {}
    index = 1
    while len(found) < steps:
        value, digit, rest = 0.0, 0.5, index
        while rest:
            value += digit * (rest & 1)
            digit, rest = digit / 2, rest >> 1
        found.setdefault(int(value * steps))
        index += 1
    return np.array(list(found))


def _check_steps(steps: int | None, name: str) -> None:
    if steps is not None:
        check_at_least(1, **{name: steps})
