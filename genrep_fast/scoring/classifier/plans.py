"""Makes a plan of a strategy: timesteps, weights and rules, from a calibration where there is one.

Without a calibration, timesteps come in low-discrepancy order and weights are uniform.
"""

from __future__ import annotations

import dataclasses
import math
import warnings
from typing import Any, NamedTuple

import numpy as np

from .calibration import Calibration
from .contest import KeepBest, Rule, Steps
from .engine import SKETCH, Plan
from .funnel import Basis, Funnel, Screens
from .members import Members
from .noise import ForwardNoise
from .strategies import (
    DEFAULT_STEPS,
    Race,
    Staged,
    Strategy,
    Stratified,
    low_discrepancy_order,
)

_STRATIFIED_STEPS = 8
# Steps that a race takes for each class that it begins with, about.
_LATER_IN_RACE = 2.0
# Images on which a race that has no calibration calibrates itself.
SELF_CALIBRATION = 32
# Numbers of sketches that an image keeps during a calibration: 64 MiB.
_CALIBRATION_SKETCHES = 2**24


class Prepared(NamedTuple):
    """A plan with the temperature of its posterior, evaluations an image, and what precedes it."""

    plan: Plan
    temperature: float
    mean_evaluations: float
    most_evaluations: int
    screens: Screens = Screens()

    @property
    def settings(self) -> dict[str, float]:
        """What a result takes of it."""
        return {"temperature": self.temperature, "coarse_share": self.screens.coarse_share}


@dataclasses.dataclass(frozen=True)
class Planner:
    """What the plans of a classifier have in common.

    Attributes:
        scheduler, parameterization: as of `ForwardNoise`.
        members: of the K classes and the null class.
        calibration: or None.
        reaching: the most classes that reach the strategy; None: all of them.
    """

    scheduler: Any
    parameterization: str | None
    members: Members
    calibration: Calibration | None = None
    reaching: int | None = None

    @property
    def columns(self) -> int:
        """Evaluations of a step of all classes that reach the strategy, at most."""
        reaching = len(self.members.counts) if self.reaching is None else self.reaching
        return self.members.most_rows(reaching)

    @property
    def default_steps(self) -> int:
        """Of the full budget."""
        if self.calibration is not None:
            return len(self.calibration.timesteps)
        return min(DEFAULT_STEPS, ForwardNoise.most_steps(self.scheduler))

    def prepare(
        self, strategy: Strategy, confidence: float, budget: int | None, funnel: Funnel
    ) -> Prepared:
        """The plan of a strategy and of what precedes it, and what the calibration says of them.

        A race and the screens before it share what the confidence leaves.

        Raises:
            ValueError: as `plan`, and as `Funnel.screens`.
        """
        error = 1 - confidence
        if isinstance(strategy, Race) and funnel.shares:
            error /= 2
            confidence = 1 - error
        screens = funnel.screens(self._basis(strategy), error)
        planner = dataclasses.replace(self, reaching=screens.reaching)
        return planner._prepared(strategy, confidence, budget, screens)

    def _basis(self, strategy: Strategy) -> Basis | None:
        calibration = self.calibration
        if calibration is None:
            return None
        held = len(calibration.timesteps)
        noise = ForwardNoise(self.scheduler, held, self.parameterization)
        weights = calibration.weights(strategy.weights, calibration.timesteps)
        steps = Steps(calibration.order("signal"), weights, tuple(range(1, held + 1)))
        later = _LATER_IN_RACE if isinstance(strategy, Race) else held
        winners = calibration.full_winners(strategy.weights)
        members = self.members.without_null()
        return Basis(calibration, noise, steps, winners, later, members)

    def _prepared(
        self, strategy: Strategy, confidence: float, budget: int | None, screens: Screens
    ) -> Prepared:
        if budget is not None and self.reaching is not None and budget < self.columns:
            raise ValueError(
                f"budget must be at least {self.columns} evaluations an image, one a class that "
                f"is compared, got {budget}"
            )
        plan = self.plan(strategy, confidence, budget)
        most = self.most_evaluations(plan, self.columns) + math.ceil(screens.most_cost)
        calibration = self.calibration
        if calibration is None:
            return Prepared(plan, 1.0, most, most, screens)
        steps, rule = plan.steps, plan.rule
        held = len(calibration.timesteps)
        known = len(plan.noise) == held
        if not known:
            # Other timesteps: as many of those that are known.
            number = min(len(steps.order), held)
            weights = calibration.weights(strategy.weights, calibration.timesteps)
            steps = Steps(low_discrepancy_order(held)[:number], weights, (number,))
            rule = KeepBest()
        contests = list(calibration.replay(steps, rule, self.members, screens.screened))
        evidence = np.stack([contest.outcome(steps, rule).evidence for contest in contests])
        evaluations = [contest.evaluations for contest in contests]
        if not known:
            evaluations = [
                image.evaluations + self.most_evaluations(plan, self.members.rows(image.live))
                for image in screens.screened
            ]
        coarse = np.mean([image.coarse_evaluations for image in screens.screened])
        mean = float(np.mean(evaluations) + screens.coarse_share * coarse)
        temperature = calibration.temperature(evidence)
        return Prepared(plan, temperature, min(mean, most), most, screens)

    def plan(self, strategy: Strategy, confidence: float, budget: int | None) -> Plan:
        """The plan of a strategy.

        Raises:
            ValueError: for a race without a calibration or longer than it, and as `ForwardNoise`.
        """
        if isinstance(strategy, Race):
            return self._race(strategy, confidence, budget)
        if isinstance(strategy, Staged):
            looks = tuple(strategy.steps)
            num_classes = len(self.members.counts)
            keep = tuple(min(number, num_classes) for number in strategy.keep)
            return self._fixed(looks, KeepBest(keep), strategy.weights, budget)
        steps = strategy.steps
        if steps is None and isinstance(strategy, Stratified):
            steps = _STRATIFIED_STEPS if budget is None else max(budget // self.columns, 1)
            steps = min(steps, ForwardNoise.most_steps(self.scheduler))
        elif steps is None:
            steps = self.default_steps
        return self._fixed((steps,), KeepBest(), strategy.weights, budget)

    def prepare_calibration(self, steps: int) -> Prepared:
        """The full budget, with distances to its winner."""
        plan = self._fixed((steps,), KeepBest(), "uniform", None)
        evaluations = steps * self.columns
        size = _CALIBRATION_SKETCHES // evaluations
        plan = dataclasses.replace(plan, sketch=min(max(size, 64), SKETCH))
        return Prepared(plan, 1.0, evaluations, evaluations)

    def own_calibration(self, strategy: Race, budget: int | None, funnel: Funnel) -> Prepared:
        """The full budget, of the first images of a race that calibrates itself; warns of that.

        Raises:
            ValueError: for a budget that does not allow it, and with a coarse pass.
        """
        if funnel.coarse is not None:
            raise ValueError("coarse needs a calibration; call calibrate with coarse first")
        steps = self.default_steps
        if strategy.max_steps is not None:
            steps = max(steps, strategy.max_steps)
        needed = steps * self.members.all_rows
        if budget is not None and budget < needed:
            raise ValueError(
                "strategy: this race is not calibrated, and to calibrate itself takes "
                f"{needed} evaluations an image, more than the budget of {budget}: "
                "call calibrate first"
            )
        warnings.warn(
            "the race is not calibrated: the first "
            f"{SELF_CALIBRATION} images take the full budget of {needed} evaluations and calibrate "
            "it; call calibrate with images of their own instead",
            stacklevel=3,
        )
        return self.prepare_calibration(steps)

    def most_evaluations(self, plan: Plan, columns: int) -> int:
        """Evaluations of an image of which no class leaves before it must.

        Args:
            plan: of the strategy.
            columns: evaluations of its first step.
        """
        most, taken = 0, 0
        looks = plan.steps.looks
        keep = plan.rule.keep if isinstance(plan.rule, KeepBest) else ()
        for stage, look in enumerate(looks):
            most += (look - taken) * columns
            taken = look
            if keep:
                columns = min(self.members.most_rows(keep[stage]), columns)
        return most if plan.budget is None else min(most, plan.budget)

    def _race(self, strategy: Race, confidence: float, budget: int | None) -> Plan:
        calibration = self.calibration
        if calibration is None:
            raise ValueError("strategy: a race needs a calibration; call calibrate first")
        held = len(calibration.timesteps)
        most = held if strategy.max_steps is None else strategy.max_steps
        if most > held:
            raise ValueError(
                f"max_steps must be at most the calibration's {held} steps, got {most}; "
                f"calibrate with steps={most}"
            )
        noise = ForwardNoise(self.scheduler, held, self.parameterization)
        weights = calibration.weights(strategy.weights, calibration.timesteps)
        order = calibration.order(strategy.order)
        steps = Steps(order, weights, tuple(range(1, most + 1)))
        rule = calibration.rule(strategy.correlation, steps, confidence)
        offsets = calibration.offsets_at(calibration.timesteps)
        return Plan(noise, steps, rule, budget, SKETCH, offsets)

    def _fixed(
        self, looks: tuple[int, ...], rule: Rule, weighting: str, budget: int | None
    ) -> Plan:
        noise = ForwardNoise(self.scheduler, looks[-1], self.parameterization)
        weights, offsets = np.ones(looks[-1]), None
        if self.calibration is not None:
            timesteps = noise.timesteps.double().cpu().numpy()
            weights = self.calibration.weights(weighting, timesteps)
            offsets = self.calibration.offsets_at(timesteps)
        steps = Steps(low_discrepancy_order(looks[-1]), weights, looks)
        return Plan(noise, steps, rule, budget, offsets=offsets)
