"""The numbers of an evaluation.

A value that the data does not define (too few images, a non-finite input) is NaN, never an
exception.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

CALIBRATION_BINS = 15


class ReliabilityBins(NamedTuple):
    """What lies in bins of equal width in confidence, each [CALIBRATION_BINS].

    Attributes:
        confidence: its mean, NaN in an empty bin.
        accuracy: NaN in an empty bin.
        counts: of predictions.
    """

    confidence: np.ndarray
    accuracy: np.ndarray
    counts: np.ndarray


def classification_metrics(log_probabilities: Tensor, labels: Tensor) -> dict[str, float]:
    """Accuracy, likelihood and calibration of log p(y|x) [N, K] against labels [N].

    Returns:
        top1: accuracy of the most probable class.
        nll: mean negative log-likelihood in nats.
        ece: expected calibration error, the mean of |accuracy - confidence| over bins of equal
            width, weighted by their counts (Guo et al. 2017).
    """
    from torchmetrics.functional.classification import multiclass_calibration_error

    if not _is_usable(log_probabilities):
        return dict.fromkeys(("top1", "nll", "ece"), math.nan)
    log_probabilities = log_probabilities.double()
    error = multiclass_calibration_error(
        log_probabilities.exp(), labels, log_probabilities.shape[1], n_bins=CALIBRATION_BINS
    )
    return {
        "top1": accuracy(log_probabilities.argmax(1), labels),
        "nll": F.nll_loss(log_probabilities, labels).item(),
        "ece": error.item(),
    }


def reliability_bins(log_probabilities: Tensor, labels: Tensor) -> ReliabilityBins:
    """Confidence and accuracy of log p(y|x) [N, K] in bins, for a reliability diagram."""
    highest, predicted = log_probabilities.exp().max(1)
    confidence = highest.double().numpy()
    correct = (predicted == labels).double().numpy()
    edges = np.linspace(0, 1, CALIBRATION_BINS + 1)
    counts, _ = np.histogram(confidence, edges)
    sums, _ = np.histogram(confidence, edges, weights=confidence)
    hits, _ = np.histogram(confidence, edges, weights=correct)
    filled = np.where(counts > 0, counts, np.nan)
    return ReliabilityBins(sums / filled, hits / filled, counts)


def accuracy(predicted: Tensor, labels: Tensor) -> float:
    """Share of predicted labels [N] that equal the labels [N]."""
    return (predicted == labels).double().mean().item()


def frechet_distance(features: Tensor, reference: Tensor) -> float:
    """Squared Fréchet distance of two sets of features [N, F] and [M, F] (Heusel et al. 2017).

    It is that of the Gaussians fitted to them. NaN where a set has fewer than two rows or holds a
    non-finite value.
    """
    from torchmetrics.image.fid import FrechetInceptionDistance

    if min(len(features), len(reference)) < 2:
        return math.nan
    if not (_is_usable(features) and _is_usable(reference)):
        return math.nan
    metric = FrechetInceptionDistance(_GivenFeatures(features.shape[1]))
    metric.update(reference.double(), real=True)
    metric.update(features.double(), real=False)
    return metric.compute().item()


class _GivenFeatures(nn.Identity):
    """In the place of torchmetrics' network: its inputs are features already."""

    def __init__(self, num_features: int) -> None:
        super().__init__()
        self.num_features = num_features


def nearest_distances(images: Tensor, reference: Iterable[Tensor], batch_size: int) -> Tensor:
    """Distances [N] of images [N, C, H, W] to the nearest of the reference images.

    They are Euclidean, in pixel space.

    Args:
        images: `batch_size` of them are compared at once.
        reference: batches [B, C, H, W], each read once.
    """
    flat = images.flatten(1).split(batch_size)
    nearest = torch.full((len(images),), math.inf)
    for batch in reference:
        others = batch.flatten(1)
        distances = torch.cat([torch.cdist(part, others).amin(1) for part in flat])
        # NaN stays.
        nearest = torch.minimum(nearest, distances)
    return nearest


def auroc(inside: Tensor, outside: Tensor) -> float:
    """Area under the ROC curve of scores of in-distribution images [N] against others [M].

    1 where every `inside` is higher.
    """
    from sklearn.metrics import roc_auc_score

    if not (_is_usable(inside) and _is_usable(outside)):
        return math.nan
    scores = torch.cat([inside, outside]).double().numpy()
    is_inside = [1] * len(inside) + [0] * len(outside)
    return float(roc_auc_score(is_inside, scores))


def shuffle_pixels(images: Tensor, generator: torch.Generator) -> Tensor:
    """Images [N, C, H, W] with the locations of each permuted at random.

    All channels of a location stay together.
    """
    order = torch.rand(len(images), 1, images[0, 0].numel(), generator=generator).argsort(-1)
    return images.flatten(2).gather(2, order.expand(-1, images.shape[1], -1)).view_as(images)


def _is_usable(values: Tensor) -> bool:
    return len(values) > 0 and bool(values.isfinite().all())
