"""Offsets of classes that are predicted too often or too rarely.

The classes' log-posteriors are β·L_y + c_y, where a normal prior of the standard deviation ρ holds
the c_y back: what few images of a class say counts for little. ρ is the one of the best
cross-validated likelihood, and so is the choice between offsets and none.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

# ρ in nats.
_SPREADS = (0.1, 0.3, 1.0, 3.0)
_FOLDS = 5
# Standard errors that a gain has to exceed.
_SIGNIFICANT = 2.0


class OffsetFit(NamedTuple):
    """What labelled images say of class offsets.

    Attributes:
        offsets: of L, with mean 0, float64 [K].
        spread: ρ.
        gain: in log-likelihood of a held-out label, in nats an image.
        gain_error: its standard error.
    """

    offsets: np.ndarray
    spread: float
    gain: float
    gain_error: float

    @property
    def helps(self) -> bool:
        """Whether the gain is more than chance would give."""
        return self.gain > _SIGNIFICANT * self.gain_error


def fit_offsets(log_likelihood: np.ndarray, labels: np.ndarray) -> OffsetFit:
    """Class offsets of the full budget.

    Args:
        log_likelihood: L of labelled images, float64 [N, K].
        labels: int64 [N].

    Raises:
        ValueError: for fewer images than folds.
    """
    count = len(labels)
    if count < _FOLDS:
        raise ValueError(f"offsets need at least {_FOLDS} labelled images, got {count}")
    scores, targets = torch.from_numpy(log_likelihood), torch.from_numpy(labels)
    # β·L of the size of nats.
    scores = scores - scores.max(1, keepdim=True).values
    scores = scores / (-scores.mean()).clamp(min=torch.finfo(torch.float64).tiny)
    scale = float((log_likelihood.max(1) - log_likelihood.mean(1)).mean()) or 1.0
    folds = torch.randperm(count, generator=torch.Generator().manual_seed(0)) % _FOLDS
    without = _held_out(scores, targets, folds, None)
    gains = {spread: _held_out(scores, targets, folds, spread) - without for spread in _SPREADS}
    spread = max(gains, key=lambda spread: gains[spread].mean().item())
    beta, offsets = _fit(scores, targets, spread)
    in_units = (offsets / beta * scale).numpy()
    gain = gains[spread]
    error = gain.std().item() / math.sqrt(count)
    return OffsetFit(in_units - in_units.mean(), spread, gain.mean().item(), error)


def _held_out(scores: Tensor, labels: Tensor, folds: Tensor, spread: float | None) -> Tensor:
    """Log-likelihood of each label by a fit to the images of the other folds, [N]."""
    found = scores.new_empty(len(labels))
    for fold in range(_FOLDS):
        inside = folds == fold
        beta, offsets = _fit(scores[~inside], labels[~inside], spread)
        log_p = (beta * scores[inside] + offsets).log_softmax(1)
        found[inside] = log_p.gather(1, labels[inside, None])[:, 0]
    return found


def _fit(scores: Tensor, labels: Tensor, spread: float | None) -> tuple[Tensor, Tensor]:
    """β and c [K] of the greatest posterior probability; c = 0 where no spread is given.

    β has a wide log-normal prior, so that labels that are all predicted leave it finite.
    """
    log_beta = torch.zeros((), dtype=torch.float64, requires_grad=True)
    offsets = torch.zeros(scores.shape[1], dtype=torch.float64, requires_grad=spread is not None)
    parameters = [log_beta] if spread is None else [log_beta, offsets]
    optimizer = torch.optim.LBFGS(parameters, max_iter=60, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        optimizer.zero_grad()
        log_p = (log_beta.exp() * scores + offsets).log_softmax(1)
        value = -log_p.gather(1, labels[:, None]).sum() + log_beta**2 / (2 * 3.0**2)
        if spread is not None:
            value = value + offsets.square().sum() / (2 * spread**2)
        value.backward()
        return value

    with torch.inference_mode(False), torch.enable_grad():
        optimizer.step(loss)
    return log_beta.detach().exp(), offsets.detach()
