"""What precedes a strategy: classes leave before the denoiser compares those that go on.

Each screen may miss the full budget's winner. Calibration images say how far down the screen's
order their winners lie, and with them how much has to go on.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np

# Of a score below the best one: classes beyond it are equally unlikely, and none is impossible.
_LEAST_SCORE = 50.0


class Screened(NamedTuple):
    """What is known of an image before its strategy begins.

    Attributes:
        live: the classes that go on, ascending, int64 [R], R ≥ 1.
        log_mass: the log-posterior of each class that does not, float64 [K]; −inf of the live ones.
        evaluations: of the network.
        coarse_evaluations: of the network at lower resolution.
    """

    live: np.ndarray
    log_mass: np.ndarray
    evaluations: int = 0
    coarse_evaluations: int = 0

    @classmethod
    def of_all(cls, num_classes: int) -> Screened:
        """Every class goes on."""
        return cls(np.arange(num_classes), np.full(num_classes, -np.inf))

    def keep(self, staying: np.ndarray, miss: float, scores: np.ndarray | None = None) -> Screened:
        """Let the live classes outside of a mask [R] go.

        They share `miss`, the chance that the winner is one of them, in proportion to the exponent
        of their scores [R], or equally.
        """
        if staying.all():
            return self
        gone = np.zeros(int((~staying).sum()))
        if scores is not None:
            gone = scores[~staying].astype(np.float64)
            finite = gone[np.isfinite(gone)]
            if len(finite):
                gone = gone.clip(min=finite.max() - _LEAST_SCORE)
            else:
                gone = np.zeros(len(gone))
        log_share = gone - np.logaddexp.reduce(gone)
        rest = -np.expm1(np.logaddexp.reduce(self.log_mass))
        log_mass = self.log_mass.copy()
        log_mass[self.live[~staying]] = math.log(rest * miss) + log_share
        return self._replace(live=self.live[staying], log_mass=log_mass)


def upper_quantile(values: np.ndarray, error: float, unit: float) -> float:
    """What the value of another image exceeds with the probability `error` at most.

    With N values, the n-th smallest is exceeded with the probability 1 − n / (N + 1), whatever
    their distribution. Where that is more than `error` for all of them, an exponential tail is
    fitted to the values above 0, of which one of the size `unit` counts as seen besides: so fewer
    images give more.

    Args:
        values: not negative, float64 [N].
        error: within 0…1.
        unit: the size of a small value.
    """
    count = len(values)
    place = math.ceil((count + 1) * (1 - error))
    if place <= count:
        return float(np.sort(values)[place - 1])
    positive = values[values > 0]
    mean = (positive.sum() + unit) / (len(positive) + 1)
    return float(max(values.max(), mean * tail_factor(len(positive), count, error)))


def tail_factor(positive: int, images: int, error: float) -> float:
    """What the mean of positive values is multiplied by where their tail is exponential.

    The product is exceeded in a share `error` of images.

    Args:
        positive: how many images had such a value.
        images: of all.
        error: within 0…1.
    """
    count = positive + 1
    # One-sided: the count and one standard deviation of it.
    share = min((count + math.sqrt(count)) / (images + 2), 1.0)
    return math.log(max(share / error, 1.0))


def miss_rate(missed: np.ndarray, error: float | None = None) -> float:
    """The chance that the winner of another image is missed, from a mask of calibration images.

    By the rule of succession; no more than `error` where the screen was calibrated for it.
    """
    rate = (int(missed.sum()) + 1) / (len(missed) + 2)
    return rate if error is None else min(rate, error)


class Cut(NamedTuple):
    """Which classes of an image go on, by scores of which the greatest is the best.

    Attributes:
        keep: classes at most.
        margin: by which a score may lie below the best one.
    """

    keep: int
    margin: float = math.inf

    def staying(self, scores: np.ndarray) -> np.ndarray:
        """Mask of the classes that go on, of scores [R]; one of −inf never does."""
        found = np.zeros(len(scores), dtype=bool)
        found[np.argsort(-scores, kind="stable")[: self.keep]] = True
        return found & (scores >= scores.max() - self.margin) & (scores > -np.inf)

    def decides(self, classes: int) -> bool:
        """Whether one of so many classes may have to leave."""
        return classes > (self.keep if self.margin == math.inf else 1)

    def most(self, reaching: int | None) -> int | None:
        """The most classes that go on where so many are there; None: all of them may."""
        if self.margin < math.inf:
            return reaching
        return self.keep if reaching is None else min(reaching, self.keep)


def calibrated_cut(
    scores: np.ndarray, winners: np.ndarray, error: float, keep: int | None = None
) -> tuple[Cut, float]:
    """A cut, and the chance that the winner of an image is not among those that go on.

    The best classes or those within a margin of the best score, whichever are fewer.

    Args:
        scores: of calibration images [N, K], −inf of the classes that left before.
        winners: of their full budgets, int64 [N].
        error: the share of images whose winner may be missed.
        keep: how many go on; None: as many as that needs.
    """
    images, num_classes = np.arange(len(winners)), scores.shape[1]
    own = scores[images, winners]
    # The last of those that are tied; nowhere where it was ruled out.
    ranks = np.where(own > -np.inf, (scores >= own[:, None]).sum(1), num_classes + 1)
    if keep is not None:
        return Cut(keep), miss_rate(ranks > keep)
    # The first rank is no surprise; a class further is the smallest one.
    needed = 1 + math.ceil(upper_quantile(ranks - 1.0, error, 1.0))
    best_two = -np.partition(-scores, 1, axis=1)[:, :2]
    ahead = (best_two[:, 0] - best_two[:, 1]).clip(max=_LEAST_SCORE * np.abs(own).max())
    margin = upper_quantile(best_two[:, 0] - own, error, float(ahead.mean()))
    cuts = Cut(min(needed, num_classes)), Cut(num_classes, margin)
    passed = [np.stack([cut.staying(row) for row in scores]) for cut in cuts]
    fewest = int(passed[1].sum() < passed[0].sum())
    missed = ~passed[fewest][images, winners]
    return cuts[fewest], miss_rate(missed, error)
