"""One image's classes while a strategy compares them, and the rules by which classes leave.

Errors e = ‖target − o‖² come step by step; L = −Σ w·e / Σ w over the steps of a class.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, NamedTuple

import numpy as np

# What float32 sums of squares lose, relative to the sum.
_SUM_ROUNDING = 4 * float(np.finfo(np.float32).eps)


@dataclasses.dataclass(frozen=True)
class Steps:
    """The steps of a strategy.

    Attributes:
        order: rows of the noise's tables, in the order in which they are evaluated.
        weights: w of each row, positive.
        looks: numbers of steps after which classes may leave; the last is the end.
    """

    order: np.ndarray
    weights: np.ndarray
    looks: tuple[int, ...]

    @functools.cached_property
    def ordered_weights(self) -> np.ndarray:
        """w in the order in which the steps are evaluated."""
        return self.weights[self.order]


class Contest:
    """The state of one image.

    Args:
        index: its place among the images of the call.
        image_id: of its noise.
        image: [C, *spatial] on the network's device.
        num_classes: K.

    Attributes:
        live: the classes that are still compared, int64 [R].
        errors: e of the live classes [n, R], a row a step.
        null_errors: e of the null class, a number a step.
        roots: √D to `leader` at each step [n, R], of a strategy that asks for distances.
        leader: column of the live class with the least weighted error, −1 before the first step.
        evaluations: of the network.
        rounding: the relative rounding error of the network's outputs.
    """

    def __init__(self, index: int, image_id: int, image: Any, num_classes: int) -> None:
        self.index = index
        self.image_id = image_id
        self.image = image
        self.live = np.arange(num_classes)
        self.errors = np.empty((0, num_classes))
        self.null_errors = np.empty(0)
        self.roots = np.empty((0, num_classes))
        self.leader = -1
        self.evaluations = 0
        self.rounding = 0.0
        # Of the classes that left, when they left: steps, weighted error, and relative to the
        # leader of then the standard error and the expected difference.
        self.steps = np.zeros(num_classes, dtype=np.int64)
        self._total = np.zeros(num_classes)
        self._standard_error = np.zeros(num_classes)
        self._expected = np.zeros(num_classes)

    def __len__(self) -> int:
        """Steps taken."""
        return len(self.errors)

    def add(self, errors: np.ndarray, null_errors: np.ndarray, steps: Steps) -> None:
        """Append the errors of the next steps [m, R], and find the leader."""
        self.errors = np.concatenate([self.errors, errors])
        self.null_errors = np.concatenate([self.null_errors, null_errors])
        leader = int(self._weights(steps).dot(self.errors).argmin())
        if leader != self.leader and len(self.roots):
            # ‖o_k − o_m‖ ≤ ‖o_k − o_l‖ + ‖o_l − o_m‖: what was measured to the former leader l
            # bounds the distances to the new one, m.
            self.roots = self.roots + self.roots[:, leader : leader + 1]
            self.roots[:, leader] = 0
        self.leader = leader

    def add_roots(self, roots: np.ndarray) -> None:
        """Append √D to the leader at the next steps [m, R]."""
        self.roots = np.concatenate([self.roots, roots])

    def drop(self, leaving: np.ndarray, steps: Steps, rule: Rule) -> None:
        """Let the live classes of a mask [R] go; the leader is not among them."""
        if not leaving.any():
            return
        gone = self.live[leaving]
        self.steps[gone] = len(self)
        self._total[gone] = self._weights(steps).dot(self.errors)[leaving]
        self._standard_error[gone] = self._errors_to_leader(steps, rule)[leaving]
        if isinstance(rule, KnownVariance):
            self._expected[gone] = self._expected_gap(steps)[leaving]
        staying = ~leaving
        self.leader = int(staying[: self.leader].sum())
        self.live = self.live[staying]
        self.errors = self.errors[:, staying]
        self.roots = self.roots[:, staying]

    def _errors_to_leader(self, steps: Steps, rule: Rule) -> np.ndarray:
        """Standard errors of the mean differences to the leader, in the units of L [R].

        From what is known of the variance where the rule knows it, else from the differences
        themselves: NaN below two steps.
        """
        weights = self._weights(steps)
        if isinstance(rule, KnownVariance):
            return rule.spread(self) / weights.sum()
        differences = weights[:, None] * (self.errors - self.errors[:, [self.leader]])
        n = len(self)
        if n < 2:
            return np.where(np.arange(len(self.live)) == self.leader, 0.0, np.nan)
        return differences.std(0, ddof=1) * np.sqrt(n) / weights.sum()

    def outcome(self, steps: Steps, rule: Rule) -> Outcome:
        """What is known of every class; one that left keeps its difference to the leader."""
        num_classes = len(self.steps)
        unknown = np.full(num_classes, np.nan)
        if len(self) == 0:
            return Outcome(-1, unknown, unknown, self.steps, unknown, unknown)
        weights = self._weights(steps)
        total = weights.sum()
        of_leader = weights * self.errors[:, self.leader]
        gap = np.empty(num_classes)
        gap[self.live] = (weights.dot(self.errors) - of_leader.sum()) / total
        gone = np.flatnonzero(self.steps)
        # Over the steps that both were evaluated at. Who was dropped is not better than the rest.
        last = self.steps[gone] - 1
        gap_then = (self._total[gone] - of_leader.cumsum()[last]) / weights.cumsum()[last]
        gap[gone] = gap_then.clip(min=0)
        log_likelihood = -of_leader.sum() / total - gap
        taken = self.steps.copy()
        taken[self.live] = len(self)
        error = self._standard_error.copy()
        error[self.live] = self._errors_to_leader(steps, rule)
        evidence = log_likelihood
        if isinstance(rule, KnownVariance):
            expected = self._expected.copy()
            expected[self.live] = self._expected_gap(steps)
            known = error > 0
            evidence = -2 * expected * gap / np.where(known, error**2, np.inf)
        lift = unknown
        if len(self.null_errors):
            lift = log_likelihood + weights.dot(self.null_errors) / total
        prediction = int(self.live[self.leader])
        return Outcome(prediction, log_likelihood, evidence, taken, error, lift)

    def _expected_gap(self, steps: Steps) -> np.ndarray:
        """What the mean difference to the leader is expected to be where that is the truth [R]."""
        weights = self._weights(steps)
        return weights.dot(self.roots**2) / weights.sum()

    def _weights(self, steps: Steps) -> np.ndarray:
        return steps.ordered_weights[: len(self)]


class Outcome(NamedTuple):
    """Of one image.

    Attributes:
        prediction: the leader, −1 before the first step.
        log_likelihood: L [K].
        evidence: what the posterior is made of [K]. L, or where the variance is known the
            log-likelihood ratio to the leader of two normal distributions of the mean difference
            g: with the mean ±μ and the standard error σ it is −2·μ·g / σ².
        steps: [K].
        standard_error: of the difference of L to the leader's [K].
        lift: L less that of the null class [K].
    """

    prediction: int
    log_likelihood: np.ndarray
    evidence: np.ndarray
    steps: np.ndarray
    standard_error: np.ndarray
    lift: np.ndarray


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """A number of classes stays after each look; all of them where the numbers are empty."""

    keep: tuple[int, ...] = ()

    def leaving(self, contest: Contest, steps: Steps) -> np.ndarray:
        """The live classes that leave at this look, a mask [R]."""
        leaving = np.zeros(len(contest.live), dtype=bool)
        if self.keep:
            keep = self.keep[steps.looks.index(len(contest))]
            total = steps.ordered_weights[: len(contest)].dot(contest.errors)
            leaving[np.argsort(total, kind="stable")[keep:]] = True
        return leaving

    def ended(self, contest: Contest, steps: Steps) -> bool:
        """Whether the image is decided."""
        return len(contest) == steps.looks[-1]


@dataclasses.dataclass(frozen=True)
class KnownVariance:
    """A class leaves when it is behind by z standard deviations, which are known beforehand.

    For Z = e_k − e_l and D = ‖o_k − o_l‖², Var Z = 4·s²(t)·D, and the steps of an image correlate:
    class k leaves where Σ w·Z > z·√((wσ)ᵀ C (wσ)), σ = 2·s(t)·√D. A pair that does not differ by
    more than rounding stays.

    Attributes:
        z: number of standard deviations.
        scale: 2·w·s(t) of each step, in the order of the steps [n].
        correlation: C of the steps in that order [n, n], not negative.
    """

    z: float
    scale: np.ndarray
    correlation: np.ndarray

    def spread(self, contest: Contest) -> np.ndarray:
        """Standard deviation of Σ w·Z [R], Z of each live class and the leader."""
        taken = len(contest)
        sigma = self.scale[:taken, None] * contest.roots
        return np.sqrt((self.correlation[:taken, :taken].dot(sigma) * sigma).sum(0))

    def leaving(self, contest: Contest, steps: Steps) -> np.ndarray:
        """The live classes that leave at this look, a mask [R]."""
        weights = steps.ordered_weights[: len(contest)]
        total = weights.dot(contest.errors)
        lost = 2 * contest.rounding * np.sqrt((weights**2).dot(contest.errors))
        lost += _SUM_ROUNDING * total
        behind = total - total[contest.leader]
        return behind > self.z * self.spread(contest) + lost

    def ended(self, contest: Contest, steps: Steps) -> bool:
        """Whether the image is decided."""
        return len(contest.live) == 1


Rule = KeepBest | KnownVariance
