"""The progress bar of a diffusion classifier, where tqdm is installed."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple


class CostEstimate(NamedTuple):
    """Network evaluations of a call before it starts.

    Attributes:
        evaluations: an image; the mean over the calibration images where there are any, else the
            most.
        most: an image.
        images: of the call, or None where a stream does not say.
        seconds: of the call, at the speed of the last one; None before there was one.
    """

    evaluations: float
    most: int
    images: int | None
    seconds: float | None

    def __str__(self) -> str:
        text = f"about {self.evaluations:,.1f} evaluations an image, at most {self.most:,}"
        if self.images is not None:
            text += f"; {self.images * self.evaluations:,.0f} for {self.images:,} images"
        if self.seconds is not None:
            text += f", some {self.seconds:,.0f} s"
        return text


class Progress:
    """Counts images, and shows them where that is asked for and tqdm is there.

    tqdm writes to standard error: images a second, evaluations an image, the accuracy with its 95%
    interval where labels are known, and the time left.
    """

    def __init__(self, shown: bool, name: str, estimate: CostEstimate) -> None:
        self._bar: Any = None
        self._images = 0
        self._evaluations = 0
        self._labelled = 0
        self._correct = 0
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

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        if self._bar is not None:
            self._bar.close()


def accuracy_interval(correct: int, count: int) -> tuple[float, float]:
    """Wilson's 95% interval of a share."""
    z = 1.959964
    share = correct / count
    center = share + z**2 / (2 * count)
    half = z * math.sqrt(share * (1 - share) / count + z**2 / (4 * count**2))
    return (center - half) / (1 + z**2 / count), (center + half) / (1 + z**2 / count)
