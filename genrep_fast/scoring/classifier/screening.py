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
    seen = len(positive) + 1
    # One-sided: the count and one standard deviation of it.
    share = min((seen + math.sqrt(seen)) / (count + 2), 1.0)
    tail = (positive.sum() + unit) / seen * math.log(max(share / error, 1.0))
    return float(max(values.max(), tail))


def keep_for(ranks: np.ndarray, error: float, num_classes: int) -> int:
    """How many of the best classes the winner is among, but for a share `error` of images.

    Args:
        ranks: of the winners of calibration images, from 1, [N].
        error: within 0…1.
        num_classes: K.
    """
    # The first rank is no surprise; a class further is the smallest one.
    return min(1 + math.ceil(upper_quantile(ranks - 1.0, error, 1.0)), num_classes)


def miss_rate(missed: np.ndarray, error: float | None = None) -> float:
    """The chance that the winner of another image is missed, from a mask of calibration images.

    By the rule of succession; no more than `error` where the screen was calibrated for it.
    """
    rate = (int(missed.sum()) + 1) / (len(missed) + 2)
    return rate if error is None else min(rate, error)
