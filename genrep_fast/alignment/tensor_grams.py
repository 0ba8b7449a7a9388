"""Gram matrices of single tensors."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ..ops.alignment import gram_operator

# From matrices [T, n, n] float64 and the tensors' numbers to what takes the matrices' place.
GramReducer = Callable[[Tensor, list[int]], Tensor]


class TensorGrams:
    """Gram matrices [n, n] of tensors by number, computed in batches.

    Args:
        n: number of losses.
        reduce: called once on all matrices of a batch, e.g. to add up those of tensors of which
            every process holds a part. None: a matrix computed here is whole.
    """

    def __init__(self, n: int, reduce: GramReducer | None = None):
        self._n = n
        self._reduce = reduce
        self._key: list[int] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget every tensor."""
        self._batches: list[Tensor] = []
        # Tensor -> its place among all batches' matrices.
        self._places: dict[int, int] = {}

    def compute(
        self, tensors: list[int], gradients_of: Callable[[list[int]], list[Tensor | None]]
    ) -> None:
        """Compute the matrices of `tensors`.

        ``gradients_of(tensors)`` returns their gradients, flattened loss by loss.
        """
        if not tensors:
            return
        own_rows = list(range(len(tensors)))
        grams = gram_operator(gradients_of(tensors), self._n, own_rows, len(tensors))
        if self._reduce is not None:
            grams = self._reduce(grams, tensors)
        self.add(tensors, grams)

    def add(self, tensors: list[int], matrices: Tensor) -> None:
        """Know the `matrices` [T, n, n] float64 of `tensors`, which were not known before."""
        first = sum(map(len, self._batches))
        self._batches.append(matrices)
        self._places.update(zip(tensors, range(first, first + len(tensors)), strict=True))

    def matrices(
        self, tensors: list[int], gradients_of: Callable[[list[int]], list[Tensor | None]]
    ) -> Tensor:
        """Matrices [T, n, n] float64 of `tensors`, at least one, in their order; see `compute`."""
        self.compute([tensor for tensor in tensors if tensor not in self._places], gradients_of)
        places = [self._places[tensor] for tensor in tensors]
        matrices = self._batches[0] if len(self._batches) == 1 else torch.cat(self._batches)
        if places == list(range(len(matrices))):
            return matrices
        if self._key != places:
            self._key, self._index = places, torch.tensor(places, device=matrices.device)
        return matrices[self._index]


def upper_triangles(matrices: Tensor) -> Tensor:
    """What is to be known of symmetric matrices, [T, n, n] -> [T, n (n + 1) / 2]."""
    rows, columns = _upper(matrices.shape[1], matrices.device)
    return matrices[:, rows, columns]


def symmetric(entries: Tensor, n: int) -> Tensor:
    """The inverse of `upper_triangles`, [T, n (n + 1) / 2] -> [T, n, n]."""
    rows, columns = _upper(n, entries.device)
    matrices = entries.new_empty(len(entries), n, n)
    matrices[:, rows, columns] = entries
    matrices[:, columns, rows] = entries
    return matrices


def _upper(n: int, device: torch.device) -> Tensor:
    return torch.triu_indices(n, n, device=device)
