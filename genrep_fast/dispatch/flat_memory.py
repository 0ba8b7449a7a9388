"""Flat memory for kernels.

Kernels see flat memory. The tensors that belong together (gradients of one parameter, its output,
its optimizer state) are therefore handed on as they are where they share one dense memory layout,
and through contiguous copies where they do not.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor


class _TensorLists(NamedTuple):
    """Positions of the arguments that hold T tensors, or T for each loss."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    # Position of an argument of length T.
    groups: int


_LISTS = {
    "gram": _TensorLists(inputs=(0,), outputs=(), groups=2),
    "combine": _TensorLists(inputs=(0,), outputs=(4,), groups=2),
    "adamw_step": _TensorLists(inputs=(4,), outputs=(0, 1, 2, 3), groups=6),
}


def on_flat_memory(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel` of the operator `name`, behind copies of what is not flat memory."""
    lists = _LISTS.get(name)
    if lists is None:
        return kernel

    def call(*arguments: Any) -> Any:
        read = [tensor for position in lists.inputs for tensor in arguments[position]]
        written = [tensor for position in lists.outputs for tensor in arguments[position]]
        copies: list[tuple[Tensor, Tensor]] = []
        if not all(tensor is None or tensor.is_contiguous() for tensor in read + written):
            arguments, copies = _flatten(arguments, lists)
        result = kernel(*arguments)
        for tensor, copy in copies:
            tensor.copy_(copy)
        # Autograd is to see changes of tensors that it saved, as after any operation in place.
        if written:
            torch.autograd.graph.increment_version(written)
        return result

    return call


def _flatten(
    arguments: tuple[Any, ...], lists: _TensorLists
) -> tuple[tuple[Any, ...], list[tuple[Tensor, Tensor]]]:
    """Arguments in which tensors that belong together have one dense layout.

    Also the outputs that are copies, behind their originals.
    """
    flat = list(arguments)
    positions = (*lists.inputs, *lists.outputs)
    for position in positions:
        flat[position] = list(flat[position])
    num_tensors = len(flat[lists.groups])
    copies = []
    for first in range(num_tensors):
        # Those that belong together: one of each argument, or one for each loss.
        places = []
        for position in positions:
            indices = range(first, len(flat[position]), num_tensors)
            places += [(position, index) for index in indices if flat[position][index] is not None]
        if _share_dense_layout([flat[position][index] for position, index in places]):
            continue
        for position, index in places:
            original = flat[position][index]
            copy = original.contiguous()
            flat[position][index] = copy
            if position in lists.outputs and not original.is_contiguous():
                copies.append((original, copy))
    return tuple(flat), copies


def _share_dense_layout(tensors: list[Tensor]) -> bool:
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    strides = tensors[0].stride()
    if any(tensor.stride() != strides for tensor in tensors):
        return False
    # empty_like keeps the strides of dense tensors, and no others.
    return torch.empty_like(tensors[0], device="meta").stride() == strides
