"""Gradients side by side in memory, as collectives want them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Span(NamedTuple):
    """Where a parameter's gradient lies: in which buffer, from which element to which."""

    buffer: int
    start: int
    end: int


class FlatBuffers:
    """One buffer for each dtype, in which the gradients of parameters lie one behind the other.

    Args:
        parameters: of the aligner.
        indices: of the parameters that have a place.
        multiple: of which the length of a buffer is one; what is too much is zero.

    Attributes:
        buffers: tensors of one axis.
        views: by the index of its parameter a gradient, with the parameter's shape and strides.
        spans: by the index of its parameter the place of a gradient.
    """

    def __init__(self, parameters: Sequence[Tensor], indices: Sequence[int], multiple: int = 1):
        places: dict[torch.dtype, list[int]] = {}
        for index in indices:
            places.setdefault(gradient_dtype(parameters[index]), []).append(index)
        self.buffers: list[Tensor] = []
        self.views: dict[int, Tensor] = {}
        self.spans: dict[int, Span] = {}
        for number, (dtype, members) in enumerate(places.items()):
            size = sum(parameters[index].numel() for index in members)
            size += -size % multiple
            buffer = torch.zeros(size, dtype=dtype, device=parameters[members[0]].device)
            self.buffers.append(buffer)
            start = 0
            for index in members:
                parameter = parameters[index]
                end = start + parameter.numel()
                strides = torch.empty_like(parameter, device="meta").stride()
                self.views[index] = buffer.as_strided(parameter.shape, strides, start)
                self.spans[index] = Span(number, start, end)
                start = end

    def fill(self, gradients: Sequence[Tensor | None], factor: float) -> None:
        """Copy gradients in, by the index of their parameter; zeros where one is None."""
        places: list[Tensor] = []
        present: list[Tensor] = []
        for index, view in self.views.items():
            gradient = gradients[index]
            if gradient is None:
                view.zero_()
            else:
                places.append(view)
                present.append(gradient)
        if present:
            torch._foreach_copy_(places, present)
        if factor != 1:
            torch._foreach_mul_(self.buffers, factor)


def gradient_dtype(parameter: Tensor) -> torch.dtype:
    """The dtype in which autograd makes the gradient of `parameter`."""
    # A grad_dtype of None allows any dtype.
    return getattr(parameter, "grad_dtype", None) or parameter.dtype
