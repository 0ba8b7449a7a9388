"""One image's classes while a strategy compares them, and the rules by which classes leave.

Errors e = ‖target − o‖² come step by step; L = −Σ w·e / Σ w over the steps of a class.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from .screening import Screened

# What float32 sums of squares lose, relative to the sum.
_SUM_ROUNDING = 4 * float(np.finfo(np.float32).eps)
# Of a standard deviation, so that quotients stay finite.
_TINY = 1e-100


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
        scores: of the candidates [K], or None.
        screened: what precedes the strategy; None: every class is compared.

    Attributes:
        live: the classes that are still compared, int64 [R].
        errors: e of the live classes [n, R], a row a step.
        null_errors: e of the null class, a number a step.
        distances: D to the leader at each step [n, R], of a strategy that asks for them.
        leader: column of the live class with the least weighted error, −1 before the first step.
        evaluations: of the network, those before the strategy included.
        rounding: the relative rounding error of the network's outputs.
    """

    def __init__(
        self,
        index: int,
        image_id: int,
        image: Any,
        num_classes: int,
        scores: np.ndarray | None = None,
        screened: Screened | None = None,
    ) -> None:
        self.index = index
        self.image_id = image_id
        self.image = image
        self.scores = scores
        self.screened = Screened.of_all(num_classes) if screened is None else screened
        self.live = self.screened.live
        self.errors = np.empty((0, len(self.live)))
        self.null_errors = np.empty(0)
        self.distances = np.empty((0, len(self.live)))
        self.leader = -1
        self.evaluations = self.screened.evaluations
        self.rounding = 0.0
        # D to the class that led at each step.
        self._measured = self.distances
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
        self.leader = int(self._weights(steps).dot(self.errors).argmin())

    def add_distances(self, distances: np.ndarray) -> None:
        """Append D to the leader at the next steps [m, R].

        To a leader m of now, D of the steps at which another class l led is taken to be
        ‖o_k − o_l‖² + ‖o_m − o_l‖², as if the two differences were orthogonal; it is exact for l.
        """
        self._measured = np.concatenate([self._measured, distances])
        self.distances = self._measured + self._measured[:, [self.leader]]
        self.distances[:, self.leader] = 0

    def drop(self, leaving: np.ndarray, steps: Steps, rule: Rule) -> None:
        """Let the live classes of a mask [R] go; the leader is not among them."""
        if not leaving.any():
            return
        gone = self.live[leaving]
        self.steps[gone] = len(self)
        self._total[gone] = self._weights(steps).dot(self.errors)[leaving]
        error, expected = self._gaps_to_leader(steps, rule)
        self._standard_error[gone], self._expected[gone] = error[leaving], expected[leaving]
        staying = ~leaving
        self.leader = int(staying[: self.leader].sum())
        self.live = self.live[staying]
        self.errors = self.errors[:, staying]
        self.distances, self._measured = self.distances[:, staying], self._measured[:, staying]

    def _gaps_to_leader(self, steps: Steps, rule: Rule) -> tuple[np.ndarray, np.ndarray]:
        """Standard errors of the mean differences to the leader, in the units of L [R].

        From what is known of the variance where the rule knows it, else from the differences
        themselves: NaN below two steps. Also what a known variance lets one expect of the
        differences where the leader is the truth, else 0.
        """
        weights = self._weights(steps)
        expected = np.zeros(len(self.live))
        if len(self.live) == 1:
            return expected, expected
        if isinstance(rule, KnownVariance):
            expected = weights.dot(self.distances) / weights.sum()
            return rule.spread(self) / weights.sum(), expected
        differences = weights[:, None] * (self.errors - self.errors[:, [self.leader]])
        n = len(self)
        if n < 2:
            return np.where(np.arange(len(self.live)) == self.leader, 0.0, np.nan), expected
        return differences.std(0, ddof=1) * np.sqrt(n) / weights.sum(), expected

    def outcome(self, steps: Steps, rule: Rule) -> Outcome:
        """What is known of every class; one that left keeps its difference to the leader."""
        log_mass = self.screened.log_mass
        unknown = np.full(len(self.steps), np.nan)
        if len(self) == 0:
            return Outcome(-1, unknown, unknown, self.steps, unknown, unknown, log_mass)
        weights = self._weights(steps)
        total = weights.sum()
        of_leader = weights * self.errors[:, self.leader]
        # Of classes that never ran it stays unknown.
        gap = unknown.copy()
        gap[self.live] = (weights.dot(self.errors) - of_leader.sum()) / total
        gone = np.flatnonzero(self.steps)
        # Over the steps that both were evaluated at. Who was dropped is not better than the rest.
        last = self.steps[gone] - 1
        gap_then = (self._total[gone] - of_leader.cumsum()[last]) / weights.cumsum()[last]
        gap[gone] = gap_then.clip(min=0)
        log_likelihood = -of_leader.sum() / total - gap
        taken = self.steps.copy()
        taken[self.live] = len(self)
        error = np.where(taken > 0, self._standard_error, np.nan)
        expected = self._expected.copy()
        error[self.live], expected[self.live] = self._gaps_to_leader(steps, rule)
        evidence = log_likelihood
        if isinstance(rule, KnownVariance):
            known = error > 0
            evidence = -2 * expected * gap / np.where(known, error**2, np.inf)
        lift = unknown
        if len(self.null_errors):
            lift = log_likelihood + weights.dot(self.null_errors) / total
        prediction = int(self.live[self.leader])
        return Outcome(prediction, log_likelihood, evidence, taken, error, lift, log_mass)

    def _weights(self, steps: Steps) -> np.ndarray:
        return steps.ordered_weights[: len(self)]


class Outcome(NamedTuple):
    """Of one image; NaN for classes that never ran.

    Attributes:
        prediction: the leader, −1 before the first step.
        log_likelihood: L [K].
        evidence: what the posterior is made of [K]. L, or where the variance is known the
            log-likelihood ratio to the leader of two normal distributions of the mean difference
            g: with the mean ±μ and the standard error σ it is −2·μ·g / σ².
        steps: [K].
        standard_error: of the difference of L to the leader's [K].
        lift: L less that of the null class [K].
        log_mass: the log-posterior of classes that left before the strategy, else −inf [K].
    """

    prediction: int
    log_likelihood: np.ndarray
    evidence: np.ndarray
    steps: np.ndarray
    standard_error: np.ndarray
    lift: np.ndarray
    log_mass: np.ndarray


@dataclasses.dataclass(frozen=True)
class KeepBest:
    """A number of classes stays after each look; all of them where the numbers are empty."""

    keep: tuple[int, ...] = ()

    def leaving(self, contests: Sequence[Contest], steps: Steps) -> list[np.ndarray]:
        """Of each contest the live classes that leave at this look, a mask [R]."""
        masks = []
        for contest in contests:
            leaving = np.zeros(len(contest.live), dtype=bool)
            if self.keep:
                keep = self.keep[steps.looks.index(len(contest))]
                total = steps.ordered_weights[: len(contest)].dot(contest.errors)
                leaving[np.argsort(total, kind="stable")[keep:]] = True
            masks.append(leaving)
        return masks

    def ended(self, contest: Contest, steps: Steps) -> bool:
        """Whether the image is decided."""
        return len(contest) == steps.looks[-1]


@dataclasses.dataclass(frozen=True)
class KnownVariance:
    """A class leaves when hardly a chance is left that it wins the full budget.

    Z = e_k − e_l of a class k and the leader l has at each step the mean D = ‖o_k − o_l‖² where l
    is the truth and −D where k is, and the variance 4·s²(t)·D; the steps of an image correlate.
    Λ is the logarithm of the likelihood ratio of l and k that Σ Z / s² of the steps so far gives.
    G = Σ w·Z so far has to become negative for k to win, by what the remaining steps add: a normal
    variable with the mean M_l or M_k, given G, and the standard deviation σ. So k's chance is

        P = e^(−Λ) · Φ(−(G + M_k) / σ) + Φ(−(G + M_l) / σ)

    and k leaves where P < e^(−bound). The D of remaining steps are taken to be in proportion to
    `distances`. A pair that does not differ by more than rounding stays.

    Attributes:
        bound: of −log P.
        weights: w of the steps of the full budget, in their order [S].
        deviation: 2·s(t) of these steps [S].
        correlation: of these steps, not negative, for Λ and standard errors [S, S].
        measured: the same for what the remaining steps add.
        distances: D of these steps up to a factor [S].
    """

    bound: float
    weights: np.ndarray
    deviation: np.ndarray
    correlation: np.ndarray
    measured: np.ndarray
    distances: np.ndarray

    def spread(self, contest: Contest) -> np.ndarray:
        """Standard deviation of Σ w·Z [R], Z of each live class and the leader."""
        roots = np.sqrt(contest.distances)
        return np.sqrt(self._variance(self.weights, roots, self.correlation))

    def leaving(self, contests: Sequence[Contest], steps: Steps) -> list[np.ndarray]:
        """Of each contest the live classes that leave at this look, a mask [R]."""
        masks = [np.zeros(len(contest.live), dtype=bool) for contest in contests]
        # Those of as many steps are compared together.
        for n in {len(contest) for contest in contests}:
            alike = [place for place, contest in enumerate(contests) if len(contest) == n]
            sizes = [len(masks[place]) for place in alike]
            leading = [contests[place].errors[:, contests[place].leader] for place in alike]
            rounding = np.repeat([contests[place].rounding for place in alike], sizes)
            errors = np.concatenate([contests[place].errors for place in alike], 1)
            distances = np.concatenate([contests[place].distances for place in alike], 1)
            gaps = errors - np.repeat(np.stack(leading, 1), sizes, 1)
            weights = self.weights[:n]
            # Class offsets may have made errors negative.
            size = np.abs(errors)
            lost = 2 * rounding * np.sqrt((weights**2).dot(size))
            lost += _SUM_ROUNDING * weights.dot(size)
            leaves = self.log_chance(gaps, distances, lost) < -self.bound
            for place, part in zip(alike, np.split(leaves, np.cumsum(sizes)[:-1]), strict=True):
                masks[place] = part
        for mask, contest in zip(masks, contests, strict=True):
            mask[contest.leader] = False
        return masks

    def log_chance(
        self, gaps: np.ndarray, distances: np.ndarray, lost: np.ndarray | float = 0.0
    ) -> np.ndarray:
        """log P of each class [R].

        Args:
            gaps: Z of the first n steps [n, R].
            distances: D of these steps [n, R].
            lost: what rounding may have changed of Σ w·Z [R].
        """
        n = len(gaps)
        roots = np.sqrt(distances)
        # Λ, by the weights that are best for independent steps.
        precision = self.deviation[:n] ** -2
        variance = self._variance(precision, roots, self.correlation)
        log_ratio = 2 * precision.dot(distances) * precision.dot(gaps)
        log_ratio /= np.where(variance > 0, variance, np.inf)
        # G, and what the remaining steps add to it.
        weights = self.weights[:n]
        gap = np.maximum(weights.dot(gaps) - lost, 0)
        mean = weights.dot(distances)
        ahead = self._ahead[n]
        scale = mean / ahead.seen
        mean_ahead = scale * ahead.mean
        covariance = np.sqrt(scale) * ahead.covariance.dot(roots)
        variance = self._variance(self.weights, roots, self.measured)
        slope = covariance / np.where(variance > 0, variance, np.inf)
        deviation = np.sqrt(np.maximum(scale * ahead.variance - slope * covariance, 0))
        given_leader = gap + mean_ahead + slope * (gap - mean)
        given_class = gap - mean_ahead + slope * (gap + mean)
        ends = -np.stack([given_class, given_leader]) / np.maximum(deviation, _TINY)
        log_tail = torch.special.log_ndtr(torch.from_numpy(ends)).numpy()
        return np.logaddexp(np.minimum(log_tail[0] - log_ratio, 0), log_tail[1])

    def ended(self, contest: Contest, steps: Steps) -> bool:
        """Whether the image is decided."""
        return len(contest.live) == 1

    def _variance(
        self, weights: np.ndarray, roots: np.ndarray, correlation: np.ndarray
    ) -> np.ndarray:
        """Of Σ weights·Z over the first n steps [R], with their √D [n, R]."""
        n = len(roots)
        sigma = (weights[:n] * self.deviation[:n])[:, None] * roots
        return (correlation[:n, :n].dot(sigma) * sigma).sum(0)

    @functools.cached_property
    def _ahead(self) -> list[_Ahead]:
        """What lies ahead after 0, 1, … S steps, for D as large as `distances`."""
        scale = self.weights * self.deviation
        sigma = scale * np.sqrt(self.distances)
        signal = self.weights * self.distances
        found = []
        for n in range(len(signal) + 1):
            cross = self.measured[:n, n:].dot(sigma[n:])
            variance = sigma[n:].dot(self.measured[n:, n:]).dot(sigma[n:])
            found.append(
                _Ahead(signal[:n].sum(), signal[n:].sum(), float(variance), scale[:n] * cross)
            )
        return found


class _Ahead(NamedTuple):
    """Of Σ w·Z over the steps that remain after n.

    Attributes:
        seen: its mean over the first n steps.
        mean, variance: over the remaining ones.
        covariance: with Σ w·Z over the first n steps, for √D = 1 in each of them [n].
    """

    seen: float
    mean: float
    variance: float
    covariance: np.ndarray


Rule = KeepBest | KnownVariance
