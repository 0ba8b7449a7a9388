"""The rows that a network evaluates for a class at a step: one, or one a prompt of its ensemble.

An ensemble's error is the mean of its members' errors, ē = (1/M)·Σ_m ‖target − o_m‖², which
averages them in log-likelihood. With the mean output ō it is ‖target − ō‖² + V, where
V = (1/M)·Σ_m ‖o_m − ō‖² does not depend on the target. So two classes differ by
Z = ‖target − ō_k‖² − ‖target − ō_l‖² + V_k − V_l, whose variance is 4·s²·D with D = ‖ō_k − ō_l‖²,
the squared distance of the mean outputs.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from ...checks import check_integer


@dataclasses.dataclass(frozen=True)
class Members:
    """Network rows of K classes and of the null class.

    Attributes:
        counts: members of each class, whose labels follow one another from 0 on.
        null_label: of the null class, which has one member, or None.
    """

    counts: tuple[int, ...]
    null_label: int | None = None

    @functools.cached_property
    def is_ensemble(self) -> bool:
        """Whether a class has several members."""
        return max(self.counts) > 1

    def labels_of(self, classes: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Labels of the rows of some classes and then the null class, and how many each has.

        Args:
            classes: int64 [R].

        Returns:
            labels [rows] and counts [R], or [R + 1] with a null class.
        """
        labels, counts = classes, self._counts[classes]
        if self.is_ensemble:
            # Each class's first label, and one more for each row that follows.
            before = counts.cumsum() - counts
            labels = np.repeat(self._first[classes] - before, counts) + np.arange(counts.sum())
        if self.null_label is None:
            return labels, counts
        return np.append(labels, self.null_label), np.append(counts, 1)

    def rows(self, classes: Sequence[int] | np.ndarray) -> int:
        """Evaluations of a step under some classes and the null class."""
        return int(self._counts[classes].sum()) + (self.null_label is not None)

    def without_null(self) -> Members:
        """The classes alone."""
        return Members(self.counts)

    @property
    def all_rows(self) -> int:
        """Evaluations of a step under all classes and the null class."""
        return sum(self.counts) + (self.null_label is not None)

    def most_rows(self, classes: int) -> int:
        """The most evaluations of a step that as many classes, and the null class, take."""
        return sum(sorted(self.counts)[-classes:]) + (self.null_label is not None)

    def least_rows(self, classes: int) -> int:
        """The least evaluations of a step that as many classes, and the null class, take."""
        return sum(sorted(self.counts)[:classes]) + (self.null_label is not None)

    def check_budget(self, budget: int | None, classes: int) -> None:
        """Check that a budget of an image allows for a step of so many classes, if not of more.

        Raises:
            TypeError, ValueError: otherwise.
        """
        if budget is None:
            return
        check_integer(budget, "budget")
        least = self.least_rows(classes)
        if budget < least:
            each = "prompt" if self.is_ensemble else "class"
            raise ValueError(
                f"budget must be at least {least} evaluations an image, one a {each}, got {budget}"
            )

    @functools.cached_property
    def _counts(self) -> np.ndarray:
        return np.array(self.counts)

    @functools.cached_property
    def _first(self) -> np.ndarray:
        return self._counts.cumsum() - self._counts


def mean_errors(errors: np.ndarray, counts: np.ndarray) -> np.ndarray:
    """Mean over the rows of each class, [n, rows] -> [n, len(counts)]."""
    if errors.shape[1] == len(counts):
        return errors
    return np.add.reduceat(errors, counts.cumsum() - counts, axis=1) / counts


def mean_outputs(outputs: Tensor, counts: np.ndarray) -> Tensor:
    """Mean over rows that follow one another, [rows, D] -> [len(counts), D].

    The members are added one after the other, in the same order on every device.
    """
    if len(outputs) == len(counts):
        return outputs
    size = torch.from_numpy(counts).to(outputs.device)
    first = size.cumsum(0) - size
    total = outputs[first]
    for member in range(1, int(counts.max())):
        present = size > member
        total[present] += outputs[first[present] + member]
    return total / size[:, None]
