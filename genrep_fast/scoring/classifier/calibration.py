"""What a few images tell of a denoiser's errors: their variance, correlation and signal.

For two classes Z = e_k − e_l and D = ‖o_k − o_l‖², Var Z = 4·s²(t)·D where l is the winner. s²(t),
the correlation of an image's steps, the order of the timesteps, their weights, the threshold of the
race and temperatures all follow from the errors and distances that a calibration keeps.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch import Tensor

from ...ops.posterior import fit_temperature, posterior
from .contest import Contest, KnownVariance, Rule, Steps
from .members import Members
from .noise import ForwardNoise
from .offsets import fit_offsets
from .screening import Screened, tail_factor
from .strategies import low_discrepancy_order

# Powers of 1/s²(t) among which the labels choose the weights; 0 is uniform.
_POWERS = (0.0, 0.25, 0.5, 0.75, 1.0)
# Steps with less than this share of the greatest signal come last in the order: they add hardly
# any variance either, and would seem to serve better than another step that correlates.
_TELLING = 0.05


class SameOutputs(ValueError):
    """Of a denoiser that gives the same output under every class: there is nothing to calibrate."""


@dataclasses.dataclass(frozen=True, eq=False)
class CoarseErrors:
    """Errors of N images under every class at lower resolution.

    Attributes:
        errors: float32 [N, n, K].
        rows: of the full budget's timesteps, in the order of the pass, int64 [n].
        factor: by which height and width shrink.
        share: cost of a coarse evaluation, of a full one.
    """

    errors: np.ndarray
    rows: np.ndarray
    factor: int
    share: float

    def arrays(self) -> dict[str, np.ndarray]:
        """What `of_arrays` takes, by name."""
        cost = np.array([self.factor, self.share], dtype=np.float64)
        return {"coarse_errors": self.errors, "coarse_rows": self.rows, "coarse_cost": cost}

    @classmethod
    def of_arrays(
        cls, arrays: dict[str, np.ndarray], shape: tuple[int, ...]
    ) -> CoarseErrors | None:
        """Those of a calibration whose errors have the shape [N, S, K]; None where there are none.

        Raises:
            ValueError: for arrays that are none.
        """
        names = ("coarse_errors", "coarse_rows", "coarse_cost")
        found = [arrays[name] for name in names if name in arrays]
        if not arrays:
            return None
        if set(arrays) != set(names):
            raise ValueError(f"{', '.join(names)} must come together, got {sorted(arrays)}")
        count, steps, num_classes = shape
        errors, rows, cost = found
        fits = errors.shape == (count, rows.size, num_classes) and cost.shape == (2,)
        kinds = (errors.dtype, rows.dtype, cost.dtype) == (np.float32, np.int64, np.float64)
        if not fits or not kinds or rows.ndim != 1 or rows.size == 0:
            raise ValueError(
                f"coarse_errors must be float32 [{count}, n, {num_classes}], got {errors.dtype} "
                f"{list(errors.shape)} with {rows.dtype} {list(rows.shape)}"
            )
        if not np.isfinite(errors).all() or (errors < 0).any():
            raise ValueError("coarse_errors must be finite and not negative")
        if len(set(rows.tolist())) < len(rows) or rows.min() < 0 or rows.max() >= steps:
            raise ValueError(f"coarse_rows must be distinct, from 0 to {steps - 1}")
        factor, share = cost.tolist()
        if not (factor >= 2 and factor.is_integer() and 0 < share < np.inf):
            raise ValueError(f"coarse_cost must be a factor and a share, got {cost.tolist()}")
        return cls(errors, rows, int(factor), share)


@dataclasses.dataclass(frozen=True, eq=False)
class Calibration:
    """Errors of N images under every class at the S timesteps of a full budget.

    Attributes:
        timesteps: [S], distinct.
        errors: e = ‖target − o‖², float32 [N, S, K].
        roots: √D to the output under the image's winner, float32 [N, S, K].
        labels: int64 [N], or None: the winners serve as labels.
        scores: of candidates, float32 [N, K], or None.
        coarse: at lower resolution, or None.
        offsets: of L of the full budget with calibrated weights, by class, float64 [K], or None.
    """

    timesteps: np.ndarray
    errors: np.ndarray
    roots: np.ndarray
    labels: np.ndarray | None = None
    scores: np.ndarray | None = None
    coarse: CoarseErrors | None = None
    offsets: np.ndarray | None = None

    def __str__(self) -> str:
        pairs = ~np.eye(len(self.timesteps), dtype=bool)
        mean = self.measured_correlation[pairs].mean() if len(self.timesteps) > 1 else math.nan
        return (
            f"calibration on {len(self.errors)} images, {len(self.timesteps)} timesteps, "
            f"{self.errors.shape[2]} classes: s² {self.variance.min():.3g} to "
            f"{self.variance.max():.3g}, mean step correlation {mean:.2f}, "
            f"power of the weights {self.power}"
        )

    @functools.cached_property
    def winners(self) -> np.ndarray:
        """Class with the least mean error, int64 [N]."""
        return self.errors.astype(np.float64).mean(1).argmin(1)

    @functools.cached_property
    def variance(self) -> np.ndarray:
        """s²(t), the mean of (Z − D)² / (4·D) over images and rivals of the winner [S]."""
        return self._moments[0]

    @functools.cached_property
    def measured_correlation(self) -> np.ndarray:
        """Correlation of (Z − D) / √D between an image's steps, within 0…1 [S, S]."""
        return self._moments[1]

    @functools.cached_property
    def correlation(self) -> np.ndarray:
        """The measured correlation and one standard error more, (1 − C²) / √N [S, S]."""
        measured = self.measured_correlation
        return np.minimum(measured + (1 - measured**2) / math.sqrt(len(self.errors)), 1)

    @functools.cached_property
    def signal(self) -> np.ndarray:
        """How much a step tells the winner from its nearest rival: the mean of D / (4·s²) [S]."""
        return self._nearest_distances.mean(0) / (4 * self.variance)

    @functools.cached_property
    def reliability(self) -> float:
        """Share of the spread of log signal over the timesteps that is no sampling noise, 0…1."""
        count = len(self.errors)
        if count < 2:
            return 0.0
        near = self._nearest_distances
        floor = np.finfo(np.float64).tiny
        noise = near.var(0, ddof=1) / np.maximum(near.mean(0) ** 2, floor)
        noise += self._moments[2] / np.maximum(self.variance**2, floor)
        spread = np.log(np.maximum(self.signal, floor)).var()
        return float(np.clip(1 - noise.mean() / count / max(spread, floor), 0, 1))

    @functools.cached_property
    def power(self) -> float:
        """p of the weights (1/s²)^p: the least that the labels' likelihood does not tell from best.

        1/s² is right where steps are independent and the denoiser exact; neither holds, and too
        much weight on few timesteps costs accuracy. So p is the least with a negative
        log-likelihood of all labels within half a nat, one standard error, of the best p's; 0
        without labels.
        """
        if self.labels is None:
            return 0.0
        labels = torch.from_numpy(self.labels)
        found = []
        for power in _POWERS:
            weights = _power_weights(self.variance, power)
            scores = torch.from_numpy(-self._weighted(self.errors, weights))
            log_p = posterior(scores, temperature=fit_temperature(scores, labels))
            found.append(-log_p[torch.arange(len(labels)), labels].sum().item())
        near_best = [loss <= min(found) + 0.5 for loss in found]
        return _POWERS[near_best.index(True)]

    def full_winners(self, kind: str) -> np.ndarray:
        """Class that the full budget chooses with weights of a kind, int64 [N]."""
        weights = self.weights(kind, self.timesteps)
        return self._weighted(self.adjusted_errors, weights).argmin(1)

    def with_offsets(self, always: bool) -> Calibration:
        """With class offsets that its labels tell, always or where held-out images gain by them.

        Raises:
            ValueError: without labels, and for too few.
        """
        if self.labels is None:
            raise ValueError("offsets need labels, got none")
        weights = self.weights("calibrated", self.timesteps)
        fit = fit_offsets(-self._weighted(self.errors, weights), self.labels)
        return dataclasses.replace(self, offsets=fit.offsets if always or fit.helps else None)

    def offsets_at(self, timesteps: np.ndarray) -> np.ndarray | None:
        """What is taken off the errors of each class, float64 [S', K], or None without offsets.

        In proportion to the distances between the outputs at a timestep, such that the weighted
        mean over those of the full budget is the offset of L.
        """
        if self.offsets is None:
            return None
        ascending = np.argsort(self.timesteps)
        scale = np.square(self.roots, dtype=np.float64).mean((0, 2))[ascending]
        known = self.timesteps[ascending]
        weights = self.weights("calibrated", known)
        share = np.interp(timesteps, known, scale * weights.sum() / weights.dot(scale))
        return share[:, None] * self.offsets

    @functools.cached_property
    def adjusted_errors(self) -> np.ndarray:
        """The errors less the offsets [N, S, K]."""
        taken = self.offsets_at(self.timesteps)
        return self.errors if taken is None else self.errors - taken

    def weights(self, kind: str, timesteps: np.ndarray) -> np.ndarray:
        """Weights of timesteps, interpolated between those of the calibration, with mean 1 [S']."""
        if kind == "uniform":
            return np.ones(len(timesteps))
        ascending = np.argsort(self.timesteps)
        known = self.timesteps[ascending]
        log_variance = np.interp(timesteps, known, np.log(self.variance[ascending]))
        return _power_weights(np.exp(log_variance), self.power)

    def order(self, kind: str) -> np.ndarray:
        """The calibration's rows in the order of "signal" or "low_discrepancy" [S].

        By signal: each step is the one that adds most to the expected Σ Z / s² in standard
        deviations, given the steps before and their correlation. Its ranks are mixed with those of
        the low-discrepancy order as far as the signal is not reliable.
        """
        spread_out = low_discrepancy_order(len(self.timesteps))
        if kind == "low_discrepancy":
            return spread_out
        trust = self.reliability
        ranks = trust * np.argsort(self._by_signal()) + (1 - trust) * np.argsort(spread_out)
        return np.argsort(ranks, kind="stable")

    def rule(self, kind: str, steps: Steps, confidence: float) -> KnownVariance:
        """The race's rule; `kind` is the correlation: "measured", "full" or "none"."""
        rows = steps.order
        measured = self.correlation[np.ix_(rows, rows)]
        correlation = {
            "measured": measured,
            "full": np.ones((len(rows), len(rows))),
            "none": np.eye(len(rows)),
        }[kind]
        rule = KnownVariance(
            math.nan,
            steps.ordered_weights,
            2 * np.sqrt(self.variance[rows]),
            correlation,
            measured,
            np.maximum(self._nearest_distances.mean(0)[rows], np.finfo(np.float64).tiny),
        )
        return dataclasses.replace(rule, bound=self._bound(rule, steps, confidence))

    def _bound(self, rule: KnownVariance, steps: Steps, confidence: float) -> float:
        """The bound with which the full budget's winner is dropped as often as 1 − confidence.

        Were all chances P right, those of the K − 1 classes that leave would add up to that at
        log(K − 1) − log(1 − confidence), which is the least bound. Calibration images say how far
        −log P of their winner T rose while another class led: the share of images with T > 0 and
        the mean of these T give an exponential tail, whose quantile raises the bound. So does the
        quantile of T that holds for any distribution (the greatest T where images are too few).
        """
        error = 1 - confidence
        least = math.log((self.errors.shape[2] - 1) / error)
        risen = np.sort(self._furthest_risen(rule, steps))
        positive = risen[risen > 0]
        factor = tail_factor(len(positive), len(risen), error)
        tail = positive.mean() * factor if len(positive) else 0.0
        place = min(math.ceil((len(risen) + 1) * confidence), len(risen))
        return float(max(least, tail, risen[place - 1]))

    def _furthest_risen(self, rule: KnownVariance, steps: Steps) -> np.ndarray:
        """The greatest −log P of each image's winner at a look, 0 where it always leads [N]."""
        order = steps.order
        found = np.zeros(len(self.errors))
        for image, errors in enumerate(self.adjusted_errors[:, order].astype(np.float64)):
            total = (errors * steps.ordered_weights[:, None]).cumsum(0)
            winner = int(total[-1].argmin())
            leaders = total.argmin(1)
            for look in steps.looks:
                leader = leaders[look - 1]
                if leader != winner:
                    distances = self._distances(image)[order[:look]]
                    both = distances[:, [winner]] + distances[:, [leader]]
                    gaps = errors[:look, [winner]] - errors[:look, [leader]]
                    found[image] = max(found[image], -rule.log_chance(gaps, both)[0])
        return found

    def replay(
        self,
        steps: Steps,
        rule: Rule,
        members: Members | None = None,
        screened: Sequence[Screened] | None = None,
    ) -> Iterator[Contest]:
        """What a strategy would have made of each image.

        Args:
            steps, rule: of the strategy.
            members: of the classes and the null class; None: every class is one row.
            screened: what precedes the strategy, of each image.
        """
        if members is None:
            members = Members((1,) * self.errors.shape[2])
        for image, errors in enumerate(self.adjusted_errors.astype(np.float64)):
            before = None if screened is None else screened[image]
            contest = Contest(image, 0, None, errors.shape[1], None, before)
            for look in steps.looks:
                taken = steps.order[len(contest) : look]
                contest.evaluations += len(taken) * members.rows(contest.live)
                contest.add(errors[taken][:, contest.live], np.empty(0), steps)
                if isinstance(rule, KnownVariance):
                    contest.add_distances(self._distances(image)[taken][:, contest.live])
                contest.drop(rule.leaving([contest], steps)[0], steps, rule)
                if rule.ended(contest, steps):
                    break
            yield contest

    def temperature(self, evidence: np.ndarray) -> float:
        """τ of the posterior of the evidence that a strategy found [N, K].

        NaN of classes that never ran. Images whose label is one of them say nothing.
        """
        labels = self.winners if self.labels is None else self.labels
        ran = ~np.isnan(evidence)
        told = np.flatnonzero(ran[np.arange(len(labels)), labels])
        if len(told) == 0:
            return 1.0
        known = torch.from_numpy(np.where(ran, evidence, -np.inf)[told])
        return fit_temperature(known, torch.from_numpy(labels[told]))

    def _distances(self, image: int) -> np.ndarray:
        """D to the output under the image's winner [S, K]."""
        return self.roots[image].astype(np.float64) ** 2

    def _weighted(self, errors: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """Mean weighted errors, float64 [N, K], of errors [N, S, K]."""
        return (errors.astype(np.float64) * weights[:, None]).mean(1)

    @functools.cached_property
    def _nearest_distances(self) -> np.ndarray:
        """D of the winner and its nearest rival by the errors [N, S]."""
        images = np.arange(len(self.errors))
        total = self.errors.astype(np.float64).mean(1)
        total[images, self.winners] = np.inf
        return self.roots[images, :, total.argmin(1)].astype(np.float64) ** 2

    @functools.cached_property
    def _moments(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """s² [S], the correlation [S, S], and the variance over images of their own s² [S]."""
        steps = len(self.timesteps)
        products = np.zeros((steps, steps))
        counts = np.zeros((steps, steps))
        of_image = []
        for errors, roots, winner in zip(self.errors, self.roots, self.winners, strict=True):
            root = np.delete(roots.astype(np.float64), winner, 1)
            gap = np.delete(errors.astype(np.float64) - errors[:, [winner]], winner, 1)
            # Outputs that are the same tell nothing.
            differ = root > 0
            residual = np.where(differ, gap - root**2, 0) / np.where(differ, 2 * root, 1)
            products += residual @ residual.T
            counts += differ.astype(float) @ differ.T.astype(float)
            of_image.append((residual**2).sum(1) / np.maximum(differ.sum(1), 1))
        mean = products / np.maximum(counts, 1)
        variance = mean.diagonal().copy()
        seen = variance > 0
        if not seen.any():
            raise SameOutputs(
                "denoiser must depend on its labels, got the same output under every class"
            )
        scale = np.sqrt(np.where(seen, variance, 1))
        correlation = np.clip(mean / np.outer(scale, scale), 0, 1)
        np.fill_diagonal(correlation, 1)
        variance[~seen] = np.median(variance[seen])
        spread = np.stack(of_image).var(0, ddof=1) if len(of_image) > 1 else np.zeros(steps)
        return variance, correlation, spread

    def _by_signal(self) -> np.ndarray:
        # Mean and standard deviation of Z / s².
        gain = self._nearest_distances.mean(0) / self.variance
        # Its square must not be zero where all outputs are the same.
        sigma = np.maximum(2 * np.sqrt(gain), np.sqrt(np.finfo(np.float64).tiny))
        left = list(low_discrepancy_order(len(gain)))
        order: list[int] = []
        expected, variance, cross = 0.0, 0.0, np.zeros(len(gain))
        tells = gain >= _TELLING * gain.max()
        while left:
            rows = [row for row in left if tells[row]] or left
            # Of Σ Z / s² with each of the remaining steps added.
            total = variance + 2 * sigma[rows] * cross[rows] + sigma[rows] ** 2
            best = rows[int(((expected + gain[rows]) / np.sqrt(total)).argmax())]
            left.remove(best)
            order.append(best)
            variance += 2 * sigma[best] * cross[best] + sigma[best] ** 2
            cross += self.correlation[best] * sigma[best]
            expected += gain[best]
        return np.array(order)


def of_contests(
    noise: ForwardNoise, contests: list[Contest], steps: Steps, labels: Tensor | None
) -> Calibration:
    """The calibration of images that ran through the full budget, with distances.

    Args:
        labels: of the images by their `index`, or None.
    """
    # They came as they finished.
    contests = sorted(contests, key=lambda contest: contest.index)
    rows = np.argsort(steps.order)
    if labels is not None:
        labels = labels[[contest.index for contest in contests]]
    return Calibration(
        noise.timesteps.cpu().double().numpy(),
        np.stack([contest.errors[rows] for contest in contests]).astype(np.float32),
        np.sqrt([contest.distances[rows] for contest in contests]).astype(np.float32),
        None if labels is None else labels.numpy(),
        _scores(contests),
    )


def _scores(contests: list[Contest]) -> np.ndarray | None:
    scores = [contest.scores for contest in contests if contest.scores is not None]
    return np.stack(scores).astype(np.float32) if scores else None


def _power_weights(variance: np.ndarray, power: float) -> np.ndarray:
    weights = variance**-power
    return weights / weights.mean()
