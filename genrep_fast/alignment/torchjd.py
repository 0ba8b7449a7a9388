"""GenRep's alignment as a weighting of TorchJD; the one module that imports TorchJD."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_power, check_weights
from .rules import genrep

try:
    from torchjd.aggregation import Weighting
except ImportError as error:
    raise ImportError(
        "GenRepWeighting is a TorchJD Weighting: install it with pip install 'torchjd>=0.18'"
    ) from error


class GenRepWeighting(Weighting):
    """Weights of two gradients whose parallel parts GenRep damps, for TorchJD.

    E.g. ``GramianWeightedAggregator(GenRepWeighting())``. Called with a Gramian [2, 2] of any
    floating dtype, it returns weights [2] of that dtype and device that carry no gradient; the
    aggregate is that of `align_gradients` (GenRep, Li, Yang and Wang, ICLR 2026).

    Args:
        weights: of the first and the second objective.
        power: damping exponent, >= 0; 0 gives the plain weighted sum.

    Raises:
        TypeError: for weights or a power of a wrong type.
        ValueError: for other than 2 finite weights, a negative or infinite power, or, when called,
            for a Gramian of another shape.
    """

    def __init__(self, weights: Sequence[float] = (0.7, 0.3), power: float = 2.0) -> None:
        super().__init__()
        self.weights = tuple(check_weights(weights, 2))
        self.power = check_power(power)

    @torch.no_grad()
    def forward(self, gramian: Tensor, /) -> Tensor:
        """Weights [2] of the gradients whose inner products are `gramian` [2, 2]."""
        if gramian.shape != (2, 2):
            raise ValueError(f"gramian must have shape (2, 2), got {tuple(gramian.shape)}")
        gram = gramian.double()[None]  # [1, 2, 2]
        weights = genrep(gram, gramian.dtype, weights=self.weights, power=self.power)
        return weights[0].to(gramian.dtype)

    def extra_repr(self) -> str:
        return f"weights={self.weights}, power={self.power}"
