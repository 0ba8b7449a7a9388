"""From the Gram matrices of collected gradients to the coefficients of every tensor."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ..ops.alignment import (
    AlignmentStats,
    alignment_coefficients_operator,
    group_gram_operator,
    tensor_coefficients_operator,
)
from .collected import CollectedGradients
from .layout import GramTensors
from .rules import Rule, least_accurate_dtype
from .tensor_grams import GramReducer, TensorGrams


@dataclass(frozen=True)
class AlignerStats(AlignmentStats):
    """What an alignment of n losses did, group by group as in `GradientAligner.group_keys`.

    All are float64 tensors on the gradients' device.

    Attributes:
        cosine: [groups] between two gradients, [groups, n, n] between n > 2; 0 where one of them is
            zero.
        alpha: [groups], the damping rho of the rule "genrep"; None for other rules.
        norms: [groups, n], Euclidean norms of the gradients.
        coefficients: [groups, n], factors of the gradients in the result before clipping.
        total_norm: [], Euclidean norm of the result before clipping, over all parameters; None
            without `max_norm`. Its error is relative to sum_i |c_i| norm_i: where gradients cancel,
            it is an upper bound.
    """

    # Read-only, so that None, which `AlignmentStats` does not have, is no error of type.
    alpha: Tensor | None  # type: ignore[assignment]
    total_norm: Tensor | None


class _PlainRow(NamedTuple):
    """The weights of what is not aligned, and a row [1, n] of them on a device."""

    weights: tuple[float, ...]
    row: Tensor

    def is_of(self, weights: tuple[float, ...], device: torch.device) -> bool:
        """Whether the row holds these weights, on this device."""
        return self.weights == weights and self.row.device == device


class TensorCoefficients:
    """Coefficients of tensors by a rule, from the Gram matrices of their groups.

    Args:
        n: number of losses.
        rule: from Gram matrices and a dtype to coefficients of groups; None for GenRep's operator,
            which has statistics, too.
        power: GenRep's damping exponent.
        reduce_grams: what `TensorGrams` asks of matrices of tensors of which it sees parts.

    Attributes:
        tensor_grams: the Gram matrices that are known.
    """

    def __init__(
        self, n: int, rule: Rule | None, power: float, reduce_grams: GramReducer | None = None
    ):
        self._n = n
        self._rule = rule
        self._power = power
        self.tensor_grams = TensorGrams(n, reduce_grams)
        self._plain: _PlainRow | None = None

    def clear(self) -> None:
        """Forget the Gram matrices of gradients that have changed."""
        self.tensor_grams.clear()

    def grams(self, tensors: GramTensors, collected: CollectedGradients) -> Tensor:
        """Gram matrices [T, n, n] of the collected gradients of `tensors`."""
        if tensors.indices:
            return self.tensor_grams.matrices(tensors.indices, collected.of)
        n = self._n
        return torch.zeros(0, n, n, dtype=torch.float64, device=collected.device)

    def rows(
        self,
        tensors: GramTensors,
        collected: CollectedGradients,
        num_groups: int,
        weights: tuple[float, ...],
        *,
        max_norm: float | None,
        grad_scale: Tensor | float | None,
    ) -> tuple[Tensor, AlignerStats]:
        """Coefficients [rows, n] float64 of `tensors` and of what is not aligned, and statistics.

        The gradients are those of losses times `grad_scale`, which the result is free of: it is
        divided by it, and `max_norm` and the statistics are those of unscaled gradients. With
        `max_norm`, `tensors` are all that some loss reaches; without, one row behind theirs is that
        of the others.
        """
        grams = self.grams(tensors, collected)
        if isinstance(grad_scale, Tensor):
            grad_scale = grad_scale.to(grams)
        if grad_scale is not None:
            grams = grams / grad_scale**2
        gram = group_gram_operator(grams, tensors.groups, num_groups)
        coefficients, cosine, alpha, norms = self._of_groups(gram, weights, collected)
        rows = tensor_coefficients_operator(coefficients, grams, tensors.groups, list(weights))
        total_norm = None
        if max_norm is not None:
            total_norm = (rows[:, :, None] * grams * rows[:, None, :]).sum().clamp(min=0).sqrt()
            rows = rows * (max_norm / (total_norm + 1e-6)).clamp(max=1)
        else:
            rows = torch.cat([rows, self._plain_row(weights, rows.device)])
        if grad_scale is not None:
            rows = rows / grad_scale
        return rows, AlignerStats(cosine, alpha, norms, coefficients, total_norm)

    def _of_groups(
        self, gram: Tensor, weights: tuple[float, ...], collected: CollectedGradients
    ) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Coefficients, cosine, alpha and norms of the groups' Gram matrices."""
        norms = gram.diagonal(dim1=1, dim2=2).sqrt()
        if self._rule is None:
            return *alignment_coefficients_operator(gram, weights, self._power), norms
        products = norms[:, :, None] * norms[:, None, :]
        cosine = gram / norms[:, :, None] / norms[:, None, :]
        cosine = torch.where(products == 0, 0.0, cosine).clamp(-1, 1)
        if self._n == 2:
            cosine = cosine[:, 0, 1]
        dtype = least_accurate_dtype(itertools.chain(*collected.gradients))
        return self._rule(gram, dtype), cosine, None, norms

    def _plain_row(self, weights: tuple[float, ...], device: torch.device) -> Tensor:
        if self._plain is None or not self._plain.is_of(weights, device):
            row = torch.tensor([weights], dtype=torch.float64, device=device)
            self._plain = _PlainRow(weights, row)
        return self._plain.row
