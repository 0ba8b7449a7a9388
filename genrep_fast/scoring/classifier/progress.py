"""What a diffusion classifier costs, and its progress bar, where tqdm is installed."""

from __future__ import annotations

import math
import sys
import time
from typing import Any, NamedTuple

from ...memory import shown_bytes

# Batches and seconds after which the speed is told. The first batch is not counted: it compiles,
# chooses kernels and reserves memory.
_TIMED_BATCHES = 3
_TIMED_SECONDS = 2.0


class CostEstimate(NamedTuple):
    """What a call costs before it starts.

    Attributes:
        evaluations: of the network, an image; the mean over the calibration images where there are
            any, else the most.
        most: an image.
        images: of the call, or None where a stream does not say.
        seconds: of the call, at the speed of the last one; None before there was one.
        memory: bytes that weights and the largest layer's output for a batch take, which is less
            than the network needs; None where the denoiser is a function without a module.
    """

    evaluations: float
    most: int
    images: int | None
    seconds: float | None
    memory: int | None = None

    def __str__(self) -> str:
        text = f"about {self.evaluations:,.1f} evaluations an image, at most {self.most:,}"
        if self.images is not None:
            text += f"; {self.images * self.evaluations:,.0f} for {self.images:,} images"
        if self.seconds is not None:
            text += f", some {duration(self.seconds)}"
        if self.memory is not None:
            text += f"; over {shown_bytes(self.memory)} of memory"
        return text


class Progress:
    """Counts images, and shows them where that is asked for and tqdm is there.

    tqdm writes to standard error: the cost before the first image, the time that it takes after
    some batches; then images a second, evaluations an image, the accuracy with its 95% interval
    where labels are known, and the time left.

    Attributes:
        taken: evaluations of all batches, coarse ones as their share of full ones.
    """

    def __init__(self, shown: bool, name: str, estimate: CostEstimate) -> None:
        self.taken = 0.0
        self._bar: Any = None
        self._name = name
        self._estimate = estimate
        self._images = 0
        self._evaluations = 0
        self._labelled = 0
        self._correct = 0
        self._skipped = 0
        self._batches = 0
        # Of the end of the first batch: its time, and the evaluations up to then.
        self._first = (0.0, 0.0)
        if not shown:
            return
        try:
            from tqdm import tqdm  # type: ignore[import-untyped]
        except ImportError:
            return
        tqdm.write(f"{name}: {estimate}", file=sys.stderr)
        self._bar = tqdm(total=estimate.images, desc=name, unit="image")

    def add(self, evaluations: int, correct: bool | None) -> None:
        """Count an image; `correct` is None where its label is not known."""
        self._images += 1
        self._evaluations += evaluations
        if correct is not None:
            self._labelled += 1
            self._correct += correct
        if self._bar is not None:
            shown = {"evaluations/image": f"{self._evaluations / self._images:.1f}"}
            if self._labelled:
                low, high = accuracy_interval(self._correct, self._labelled)
                share = self._correct / self._labelled
                shown["accuracy"] = f"{share:.1%} ({low:.1%} to {high:.1%})"
            self._bar.set_postfix(shown, refresh=False)
            self._bar.update()

    def skip(self, evaluations: int, correct: bool | None) -> None:
        """Count an image that had finished before the call, and took none of its time."""
        self._skipped += 1
        if self._bar is not None:
            self._bar.initial += 1
        self.add(evaluations, correct)

    def after_batch(self, evaluations: float) -> None:
        """Count a batch; tell once how long the rest takes, where that is known."""
        self.taken += evaluations
        self._batches += 1
        if self._bar is None or self._estimate.images is None:
            return
        now = time.monotonic()
        if self._batches == 1:
            self._first = (now, self.taken)
        started, before = self._first
        if self._batches <= _TIMED_BATCHES or now - started < _TIMED_SECONDS:
            return
        speed = (self.taken - before) / (now - started)
        left = (self._estimate.images - self._skipped) * self._estimate.evaluations - self.taken
        self._bar.write(
            f"{self._name}: {speed:,.1f} evaluations a second, some {duration(left / speed)} left",
            file=sys.stderr,
        )
        # Not again.
        self._estimate = self._estimate._replace(images=None)

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def duration(seconds: float) -> str:
    """Seconds in words: "40 s", "12 minutes", "3.5 hours", "20 days"."""
    seconds = max(seconds, 0)
    if seconds < 120:
        return f"{seconds:,.0f} s"
    if seconds < 7200:
        return f"{seconds / 60:,.0f} minutes"
    if seconds < 172800:
        return f"{seconds / 3600:,.1f} hours"
    return f"{seconds / 86400:,.1f} days"


def accuracy_interval(correct: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z = 1.959964
    share = correct / count
    center = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (center - half) / (1 + z**2 / count), (center + half) / (1 + z**2 / count)
