"""What `GradientAligner` keeps of gradients: Gram matrices of single tensors, the memory they occupy, and flat buckets."""

from __future__ import annotations

import bisect
from collections.abc import Callable

import torch
from torch import Tensor

from .ops.alignment import gram_operator


class TensorGrams:
    """Gram matrices [n, n] of tensors by number, computed in batches, and their sums."""

    def __init__(self, n: int):
        self.n = n
        self._key: tuple | None = None
        self.clear()

    def clear(self) -> None:
        """Forget every tensor."""
        self._batches: list[Tensor] = []
        self._places: dict[int, int] = {}  # tensor -> its place among all batches' matrices, from 1
        self._computed = 0
        self._pending: dict[int, None] = {}
        self.elements = 0  # that are pending

    def forget(self, tensor: int) -> None:
        """The gradients of `tensor` change."""
        self._places.pop(tensor, None)

    def submit(self, tensor: int, elements: int) -> None:
        """Let the next batch hold `tensor`."""
        if tensor not in self._pending:
            self._pending[tensor] = None
            self.elements += elements

    def compute(self, gradients_of: Callable[[list[int]], list[Tensor | None]]) -> None:
        """Compute the matrices of what was submitted; ``gradients_of(tensors)`` returns their gradients, flattened loss by loss."""
        batch = list(self._pending)
        if batch:
            self._batches.append(gram_operator(gradients_of(batch), self.n, list(range(len(batch))), len(batch)))
            self._places.update(zip(batch, range(self._computed + 1, self._computed + len(batch) + 1), strict=True))
            self._computed += len(batch)
            self._pending, self.elements = {}, 0

    def sums(
        self, tensors: list[int], rows: list[int], groups: int, rest: bool, gradients_of: Callable[[list[int]], list[Tensor | None]]
    ) -> Tensor:
        """Sums [groups, n, n], with `rest` [groups + 1, n, n], over the tensors of the same row, in their order; see `compute`."""
        self._pending.update((tensor, None) for tensor in tensors if tensor not in self._places)
        self.compute(gradients_of)
        key = ([self._places[tensor] for tensor in tensors], rows, groups)
        if self._key != key:
            self._key = key
            self._index_groups(*key)
        # A NaN stays in its group, and the order of a sum is fixed.
        matrices = torch.cat([self._batches[0].new_zeros(1, self.n, self.n), *self._batches])
        sums = matrices[self._grouped].sum(dim=1)
        return torch.cat([sums, matrices[self._rest].sum(dim=0, keepdim=True)]) if rest else sums

    def _index_groups(self, places: list[int], rows: list[int], groups: int) -> None:
        members: list[list[int]] = [[] for _ in range(groups + 1)]
        for place, row in zip(places, rows, strict=True):
            members[row].append(place)
        longest = max((len(places) for places in members[:groups]), default=0)
        padded = [places + [0] * (longest - len(places)) for places in members[:groups]]  # 0: a matrix of zeros
        device = self._batches[0].device
        self._grouped = torch.tensor(padded, dtype=torch.int64, device=device).reshape(groups, longest)
        self._rest = torch.tensor(members[groups], dtype=torch.int64, device=device)


class HeldMemory:
    """The memory that gradients occupy, to find those that share some: autograd may give several parameters views of one tensor."""

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        self._first: dict[int, Tensor] = {}  # of each storage, which it keeps alive: no other one gets its address
        self._ranges: dict[int, list[tuple[int, int]]] = {}  # of storages that hold several tensors: first byte and end, in order

    def claim(self, tensor: Tensor) -> bool:
        """Hold the memory of `tensor` if none of it is held; whether that is so."""
        storage = tensor.untyped_storage()._cdata
        if storage not in self._first:
            self._first[storage] = tensor
            return True
        ranges = self._ranges.setdefault(storage, [])
        if not ranges:
            ranges.append(_byte_range(self._first[storage]))
        start, end = _byte_range(tensor)
        place = bisect.bisect(ranges, (start, end))
        if (place > 0 and ranges[place - 1][1] > start) or (place < len(ranges) and ranges[place][0] < end):
            return False
        ranges.insert(place, (start, end))
        return True


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of `tensor` in its storage."""
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True)) + 1 if tensor.numel() else 0
    start = tensor.storage_offset()
    return start * tensor.element_size(), (start + span) * tensor.element_size()


class Buckets:
    """For each loss (and dtype) one flat buffer, in which parameters lie group by group."""

    def __init__(self, n: int):
        self.views: list[dict[int, Tensor]] = [{} for _ in range(n)]  # for each loss, parameter -> its part of the buffer
        self._key: list[tuple] | None = None

    def arrange(self, parameters: dict[int, Tensor], groups: list[int | None]) -> bool:
        """Allocate buffers for `parameters`, the ones without a group (-1) last, unless they are there; whether that was necessary."""
        key = [(index, groups[index], _gradient_dtype(parameter), parameter.device) for index, parameter in parameters.items()]
        if self._key == key:
            return False
        self._key = key
        self._dtypes = {index: dtype for index, _, dtype, _ in key}
        self._order = sorted(parameters, key=lambda index: (str(self._dtypes[index]), groups[index] < 0, groups[index], index))
        self._starts: dict[int, int] = {}
        sizes: dict[torch.dtype, int] = {}
        for index in self._order:
            self._starts[index] = sizes.get(self._dtypes[index], 0)
            sizes[self._dtypes[index]] = self._starts[index] + parameters[index].numel()
        device = next(iter(parameters.values())).device if parameters else None
        self._buffers = [{dtype: torch.empty(size, dtype=dtype, device=device) for dtype, size in sizes.items()} for _ in self.views]
        for views, buffers in zip(self.views, self._buffers, strict=True):
            views.clear()
            for index, parameter in parameters.items():
                strides = torch.empty_like(parameter, device="meta").stride()
                views[index] = buffers[self._dtypes[index]].as_strided(parameter.shape, strides, self._starts[index])
        return True

    def runs(self, rows: dict[int, int], whole: set[int]) -> list[list[int]]:
        """The parameters of `rows`, in the buffers' order: neighbours of the same row are one run if all losses reach them (`whole`)."""
        runs: list[list[int]] = []
        open_key = None  # of the run that the next parameter may join
        for index in self._order:
            key = (rows[index], self._dtypes[index]) if index in whole else None
            if key is not None and key == open_key:
                runs[-1].append(index)
            elif index in rows:
                runs.append([index])
            open_key = key
        return runs

    def span(self, loss: int, run: list[int]) -> Tensor:
        """The part of the buffer that holds `run`."""
        first, last = run[0], run[-1]
        end = self._starts[last] + self.views[loss][last].numel()
        return self._buffers[loss][self._dtypes[first]][self._starts[first] : end]


def _gradient_dtype(parameter: Tensor) -> torch.dtype:
    return getattr(parameter, "grad_dtype", None) or parameter.dtype  # grad_dtype None: any dtype
