"""What `GradientAligner` keeps of gradients: Gram matrices of single tensors, the memory they occupy, flat buckets, and what stays in
``.grad`` meanwhile."""

from __future__ import annotations

import bisect
import enum
from collections.abc import Callable

import torch
from torch import Tensor

from .ops.alignment import gram_operator

# As many of a gradient's values are compared with what they were.
WATCHED_ELEMENTS = 4096


class TensorGrams:
    """Gram matrices [n, n] of tensors by number, computed in batches, and their sums."""

    def __init__(self, n: int):
        self._n = n
        self._key: list[int] | None = None
        self.clear()

    def clear(self) -> None:
        """Forget every tensor."""
        self._batches: list[Tensor] = []
        self._places: dict[int, int] = {}  # tensor -> its place among all batches' matrices

    def compute(self, tensors: list[int], gradients_of: Callable[[list[int]], list[Tensor | None]]) -> None:
        """Compute the matrices of `tensors`; ``gradients_of(tensors)`` returns their gradients, flattened loss by loss."""
        if not tensors:
            return
        first = sum(map(len, self._batches))
        self._batches.append(gram_operator(gradients_of(tensors), self._n, list(range(len(tensors))), len(tensors)))
        self._places.update(zip(tensors, range(first, first + len(tensors)), strict=True))

    def matrices(self, tensors: list[int], gradients_of: Callable[[list[int]], list[Tensor | None]]) -> Tensor:
        """Matrices [T, n, n] float64 of `tensors`, at least one, in their order; see `compute`."""
        self.compute([tensor for tensor in tensors if tensor not in self._places], gradients_of)
        places = [self._places[tensor] for tensor in tensors]
        matrices = self._batches[0] if len(self._batches) == 1 else torch.cat(self._batches)
        if places == list(range(len(matrices))):
            return matrices
        if self._key != places:
            self._key, self._index = places, torch.tensor(places, device=matrices.device)
        return matrices[self._index]


class Fate(enum.Enum):
    """What became of gradients that were left in ``.grad``."""

    KEPT = enum.auto()
    DROPPED = enum.auto()
    CHANGED = enum.auto()


class LeftGradients:
    """Gradients that stay in ``.grad`` between two blocks, so that what anybody does to them meanwhile is noticed.

    They are the collected tensors themselves, or one of them alone. The values of a watched one, or a part of them, are compared, since a
    write through ``.data`` counts no version.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Forget what was left, and leave it where it is."""
        self._parameters: list[Tensor] = []
        self._gradients: list[Tensor] = []
        # Counts of the writes to them.
        self._versions: list[int] = []
        self._of: dict[int, Tensor] = {}
        # A part of what was left, and a copy.
        self._watched: tuple[Tensor, Tensor] | None = None

    def leave(self, parameters: list[Tensor], gradients: list[Tensor], watched: Tensor | None = None) -> None:
        """Put `gradients` into the ``.grad`` of `parameters`; `watched` is one of them, or None."""
        self.clear()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
        self._parameters, self._gradients = parameters, gradients
        self._versions = [gradient._version for gradient in gradients]
        self._of = dict(zip(map(id, parameters), gradients, strict=True))
        if watched is not None:
            part = _part(watched)
            self._watched = (part, part.clone())

    def take_back(self) -> None:
        """Take away what was left, where it still lies."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is gradient:
                parameter.grad = None
        self.clear()

    def stranger(self, parameters: list[Tensor]) -> int | None:
        """The first of `parameters` whose ``.grad`` was not left there."""
        for index, parameter in enumerate(parameters):
            gradient = parameter.grad
            if gradient is not None and self._of.get(id(parameter)) is not gradient:
                return index
        return None

    def fate(self, *, written_by_scaler: bool = False) -> Fate:
        """Whether all is as it was left, gone or zeroed as by ``zero_grad``, or something else.

        A GradScaler that looked for non-finite values wrote the values that were there.
        """
        now = [parameter.grad for parameter in self._parameters]
        if any(gradient is not left for gradient, left in zip(now, self._gradients, strict=True)):
            gone = all(gradient is None for gradient in now)
            return Fate.DROPPED if gone else Fate.CHANGED
        if written_by_scaler or self._versions == [gradient._version for gradient in self._gradients]:
            return Fate.KEPT
        zeroed = not any(gradient.any() for gradient in self._gradients)
        return Fate.DROPPED if zeroed else Fate.CHANGED

    def assert_values(self, message: str) -> None:
        """Raise RuntimeError with `message`, on a GPU when it gets there, where the watched gradient has other values than it had."""
        if self._watched is not None:
            gradient, copy = self._watched
            same = (gradient == copy) | (gradient.isnan() & copy.isnan())
            torch._assert_async(same.all(), message)


def _part(tensor: Tensor) -> Tensor:
    """A view of `tensor`, or of a part of it that takes no time to compare."""
    while tensor.numel() > WATCHED_ELEMENTS:
        tensor = tensor[0] if tensor.ndim > 1 else tensor[:WATCHED_ELEMENTS]
    return tensor


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

    def arrange(self, parameters: dict[int, Tensor], groups: list[int | None]) -> None:
        """Allocate buffers for `parameters`, the ones without a group (-1) last, unless they are there."""
        key = [(index, groups[index], _gradient_dtype(parameter), parameter.device) for index, parameter in parameters.items()]
        if self._key == key:
            return
        self._key = key
        dtypes = {index: dtype for index, _, dtype, _ in key}
        starts: dict[int, int] = {}
        sizes: dict[torch.dtype, int] = {}

        def place(index: int) -> tuple:
            return str(dtypes[index]), groups[index] < 0, groups[index], index

        for index in sorted(parameters, key=place):
            starts[index] = sizes.get(dtypes[index], 0)
            sizes[dtypes[index]] = starts[index] + parameters[index].numel()
        device = next(iter(parameters.values())).device if parameters else None
        for views in self.views:
            buffers = {dtype: torch.empty(size, dtype=dtype, device=device) for dtype, size in sizes.items()}
            views.clear()
            for index, parameter in parameters.items():
                strides = torch.empty_like(parameter, device="meta").stride()
                views[index] = buffers[dtypes[index]].as_strided(parameter.shape, strides, starts[index])


def _gradient_dtype(parameter: Tensor) -> torch.dtype:
    return getattr(parameter, "grad_dtype", None) or parameter.dtype  # grad_dtype None: any dtype
