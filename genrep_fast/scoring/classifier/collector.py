"""Collects what a diffusion classifier finds, image by image, until the result is asked for."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .contest import Contest, Outcome
from .engine import Plan
from .images import Images
from .result import ClassifierResult, filled_evidence, log_posterior


class Collector:
    """The images of a call and their outcomes, by their place among the images.

    Args:
        num_classes: K.
        has_null: whether outcomes have a lift.
    """

    def __init__(self, num_classes: int, has_null: bool) -> None:
        self.images = 0
        self._num_classes = num_classes
        self._has_null = has_null
        self._device: torch.device | None = None
        self._labels: list[int] | None = []
        self._found: dict[int, _Found] = {}

    def see(self, batch: Images) -> None:
        """Note a batch that was read."""
        if self._device is None:
            self._device = batch.images.device
        self.images += len(batch.images)
        if batch.labels is None:
            self._labels = None
        elif self._labels is not None:
            self._labels += batch.labels.tolist()

    def label_of(self, index: int) -> int | None:
        """The label of an image, where all have one."""
        return self._labels[index] if self._labels else None

    def labels(self) -> Tensor | None:
        """Of all images that were read, int64 [B], or None."""
        return torch.tensor(self._labels) if self._labels else None

    def add(self, contest: Contest, plan: Plan) -> int:
        """Keep the outcome of a contest; the predicted class, −1 where nothing is known."""
        outcome = contest.outcome(plan.steps, plan.rule)
        self._found[contest.index] = _Found(
            _in_float32(outcome),
            plan.rule.ended(contest, plan.steps),
            contest.evaluations,
            contest.screened.coarse_evaluations,
        )
        return outcome.prediction

    def result(
        self, temperature: float, total: int | None, coarse_share: float = 0.0
    ) -> ClassifierResult:
        """Of all images; `total` of them where the deadline left some unread."""
        count = self.images if total is None else max(total, self.images)
        unknown = np.full(self._num_classes, np.nan, dtype=np.float32)
        no_steps = np.zeros(self._num_classes, dtype=np.int64)
        no_mass = np.full(self._num_classes, -np.inf, dtype=np.float32)
        outcome = Outcome(-1, unknown, unknown, no_steps, unknown, unknown, no_mass)
        nothing = _Found(outcome, False, 0, 0)
        found = [self._found.get(index, nothing) for index in range(count)]
        prediction = torch.tensor([image.outcome.prediction for image in found])
        names = ("log_likelihood", "evidence", "steps", "standard_error", "lift", "log_mass")
        scores, evidence, steps, error, lift, log_mass = (
            torch.from_numpy(np.stack([getattr(image.outcome, name) for image in found]))
            for name in names
        )
        posterior = log_posterior(evidence, log_mass, temperature)
        known = prediction >= 0
        best = scores.nan_to_num(-torch.inf).topk(2, 1).values
        margin = best[:, 0] - best[:, 1]
        margin = margin.masked_fill(margin == torch.inf, torch.nan)
        labels = self.labels()
        if labels is not None and len(labels) != count:
            labels = None
        result = ClassifierResult(
            prediction=prediction,
            decided=torch.tensor([image.decided for image in found]),
            posterior=posterior,
            evidence=filled_evidence(evidence, posterior, temperature),
            log_likelihood=scores,
            steps=steps,
            evaluations=torch.tensor([image.evaluations for image in found]),
            margin=torch.where(known, margin, 0.0),
            standard_error=error,
            lift=lift if self._has_null else None,
            temperature=temperature,
            labels=labels,
            coarse_evaluations=torch.tensor([image.coarse_evaluations for image in found]),
            coarse_share=coarse_share,
        )
        return result if self._device is None else result.to(self._device)


class _Found(NamedTuple):
    """What is kept of an image."""

    outcome: Outcome
    decided: bool
    evaluations: int
    coarse_evaluations: int


def _in_float32(outcome: Outcome) -> Outcome:
    names = ("log_likelihood", "evidence", "standard_error", "lift", "log_mass")
    return outcome._replace(**{name: getattr(outcome, name).astype(np.float32) for name in names})
