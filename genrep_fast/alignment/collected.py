"""The memory of collected gradients: which of it is held, and flat buckets."""

from __future__ import annotations

import bisect

import torch
from torch import Tensor


class HeldMemory:
    """The memory that gradients occupy, to find those that share some.

    Autograd may give several parameters views of one tensor.
    """

    def __init__(self):
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        # Of each storage, which it keeps alive: no other one gets its address.
        self._first: dict[int, Tensor] = {}
        # Of storages that hold several tensors: first byte and end, in order.
        self._ranges: dict[int, list[tuple[int, int]]] = {}

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
        if place > 0 and ranges[place - 1][1] > start:
            return False
        if place < len(ranges) and ranges[place][0] < end:
            return False
        ranges.insert(place, (start, end))
        return True


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of `tensor` in its storage."""
    span = 0
    if tensor.numel():
        axes = zip(tensor.shape, tensor.stride(), strict=True)
        span = sum((size - 1) * stride for size, stride in axes) + 1
    start = tensor.storage_offset()
    return start * tensor.element_size(), (start + span) * tensor.element_size()


class Buckets:
    """For each loss (and dtype) one flat buffer, in which parameters lie group by group."""

    def __init__(self, n: int):
        # For each loss, parameter -> its part of the buffer.
        self.views: list[dict[int, Tensor]] = [{} for _ in range(n)]
        self._key: list[tuple] | None = None

    def arrange(self, parameters: dict[int, Tensor], groups: list[int | None]) -> None:
        """Allocate buffers for `parameters` unless they are there; those in no group (-1) last."""
        key = []
        for index, parameter in parameters.items():
            key.append((index, groups[index], _gradient_dtype(parameter), parameter.device))
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
            buffers = {}
            for dtype, size in sizes.items():
                buffers[dtype] = torch.empty(size, dtype=dtype, device=device)
            views.clear()
            for index, parameter in parameters.items():
                strides = torch.empty_like(parameter, device="meta").stride()
                buffer = buffers[dtypes[index]]
                views[index] = buffer.as_strided(parameter.shape, strides, starts[index])


def _gradient_dtype(parameter: Tensor) -> torch.dtype:
    # A grad_dtype of None allows any dtype.
    return getattr(parameter, "grad_dtype", None) or parameter.dtype
