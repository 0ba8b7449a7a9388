"""What a diffusion classifier says of images."""

from __future__ import annotations

import dataclasses
from statistics import NormalDist
from typing import Any

import torch
from torch import Tensor

from ...ops.posterior import posterior


@dataclasses.dataclass(frozen=True, eq=False)
class ClassifierResult:
    """B images under K classes, on the device that the images came from.

    Attributes:
        prediction: the class with the greatest likelihood, int64 [B]; −1 for an image that the
            deadline left without one step.
        decided: bool [B]: a race has one class left, another strategy has taken all of its steps.
            False where the budget, the deadline or `max_steps` ended an image before.
        posterior: log p(y|x) of equally likely classes, log_softmax(evidence / temperature),
            float32 [B, K]. Classes that left before the strategy have the chance that calibration
            images leave them, shared out by the scores of what dropped them.
        evidence: L, or after a race the log-likelihood ratio to the predicted class, which counts
            a difference by its known variance, float32 [B, K]. Of a class that left before the
            strategy, what gives it its posterior.
        log_likelihood: L = −Σ w·e / Σ w over the steps that a class was evaluated at, up to a
            constant of the image, float32 [B, K]. A class that was dropped keeps its difference to
            the predicted class over the steps that both have. NaN of a class that left before the
            strategy (candidates, tree, coarse), as its standard error and lift.
        steps: of each class, int64 [B, K]; 0 of a class that left before the strategy.
        evaluations: of the network, the null class's included, int64 [B]. What a scorer of
            candidates costs is not counted.
        margin: L of the predicted class less that of its nearest rival, [B]; NaN without one.
        standard_error: of L of the predicted class less L of each, [B, K]; from the calibrated
            variance in a race, else from the paired differences (NaN below two steps).
        lift: log p(x|y) − log p(x) in the units of `log_likelihood`, [B, K]; None without a null
            class.
        temperature: τ of the posterior.
        labels: int64 [B] where all were given, else None.
        coarse_evaluations: of the network at lower resolution, which `evaluations` leaves out,
            int64 [B].
        coarse_share: what one of these costs of a full one, by FLOPs; 0 without a coarse pass.
        image_ids: of the noise, int64 [B].
        names: [B] where the batches gave any, with None for an image that has none; else None.
    """

    prediction: Tensor
    decided: Tensor
    posterior: Tensor
    evidence: Tensor
    log_likelihood: Tensor
    steps: Tensor
    evaluations: Tensor
    margin: Tensor
    standard_error: Tensor
    lift: Tensor | None
    temperature: float
    labels: Tensor | None = None
    coarse_evaluations: Tensor | None = None
    coarse_share: float = 0.0
    image_ids: Tensor | None = None
    names: list[str | None] | None = None

    def __len__(self) -> int:
        return len(self.prediction)

    @property
    def cost(self) -> Tensor:
        """What an image took, in evaluations at full resolution, float64 [B]."""
        if self.coarse_evaluations is None:
            return self.evaluations.double()
        return self.evaluations + self.coarse_share * self.coarse_evaluations.double()

    def to(self, device: torch.device | str) -> ClassifierResult:
        """The same result on another device."""
        moved: dict[str, Any] = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                moved[field.name] = value.to(device)
        return dataclasses.replace(self, **moved)

    def class_bias(self, labels: Tensor | None = None) -> ClassBias:
        """Whether classes are predicted more or less often than they should be.

        Args:
            labels: int64 [B]; None takes those of the result. Where there are neither, classes are
                taken to be equally frequent.
        """
        labels = self.labels if labels is None else labels
        num_classes = self.posterior.shape[1]
        seen = self.prediction >= 0
        prediction = self.prediction[seen]
        predicted = torch.bincount(prediction, minlength=num_classes).double()
        if labels is None:
            share = 1 / num_classes
            expected = torch.full_like(predicted, len(prediction) * share)
            deviation = (expected * (1 - share)).sqrt()
        else:
            if labels.shape != self.prediction.shape:
                raise ValueError(
                    f"labels must be one an image, got {list(labels.shape)} for {len(self)} images"
                )
            labels = labels.to(prediction.device)[seen]
            expected = torch.bincount(labels, minlength=num_classes).double()
            # Images taken from a class and given to it: as many where there is no bias.
            wrong = prediction != labels
            moved = torch.bincount(prediction[wrong], minlength=num_classes)
            moved = moved + torch.bincount(labels[wrong], minlength=num_classes)
            deviation = moved.double().sqrt()
        z = torch.where(deviation > 0, (predicted - expected) / deviation.clamp(min=1e-12), 0.0)
        limit = NormalDist().inv_cdf(1 - 0.025 / num_classes)
        return ClassBias(predicted.long(), expected, z, z.abs() > limit)


@dataclasses.dataclass(frozen=True, eq=False)
class ClassBias:
    """How often each class is predicted, each [K].

    Attributes:
        predicted: images.
        expected: images, by the labels or equally many.
        z: their difference in standard deviations (McNemar's where labels are known).
        biased: |z| beyond the two-sided 5% level over all classes.
    """

    predicted: Tensor
    expected: Tensor
    z: Tensor
    biased: Tensor


def log_posterior(evidence: Tensor, log_mass: Tensor, temperature: float) -> Tensor:
    """log p(y|x), float32 [B, K]; equal for classes of which nothing is known.

    Args:
        evidence: [B, K], NaN of classes that never ran.
        log_mass: of the classes that left before the strategy, else −inf, float32 [B, K].
        temperature: of the evidence.
    """
    left = log_mass > -torch.inf
    unknown = evidence.isnan().all(1, keepdim=True)
    of_live = evidence.masked_fill(unknown, 0.0).masked_fill(left, -torch.inf)
    found = posterior(of_live, temperature=temperature)
    if not left.any():
        return found
    share = torch.log1p(-log_mass.double().logsumexp(1, keepdim=True).exp())
    return torch.where(left, log_mass.double(), found.double() + share).float()


def filled_evidence(evidence: Tensor, posterior: Tensor, temperature: float) -> Tensor:
    """Evidence whose posterior is `posterior` for classes that never ran too, [B, K].

    Args:
        evidence: [B, K], NaN of classes that never ran.
        posterior: log p(y|x) [B, K].
        temperature: of the evidence.
    """
    best = evidence.nan_to_num(-torch.inf).argmax(1, keepdim=True)
    gap = temperature * (posterior - posterior.gather(1, best))
    return torch.where(evidence.isnan(), evidence.gather(1, best) + gap, evidence)
