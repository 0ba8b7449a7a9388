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
        if not _are_contiguous(arguments, lists):
            return _run_on_copies(kernel, arguments, lists)
        result = kernel(*arguments)
        _count_writes(arguments, lists)
        return result

    return call


class RefusingKernel:
    """A kernel of tensor lists that looks at every tensor itself.

    It raises RuntimeError, before it writes, for memory that is not flat and for float64: then
    alone Python asks the tensors one by one, which takes longer than the kernel of small ones.
    """

    def __init__(self, name: str, kernel: Callable[..., Any]):
        self._lists = _LISTS[name]
        self._kernel = kernel

    def __call__(self, *arguments: Any) -> Any:
        try:
            result = self._kernel(*arguments)
        except RuntimeError:
            if _are_contiguous(arguments, self._lists):
                raise
            return _run_on_copies(self._kernel, arguments, self._lists)
        _count_writes(arguments, self._lists)
        return result


def refusing_kernel(name: str, kernel: Callable[..., Any]) -> Callable[..., Any]:
    """`kernel`, which refuses what is not flat memory, behind copies of that."""
    return RefusingKernel(name, kernel) if name in _LISTS else kernel


def _are_contiguous(arguments: tuple[Any, ...], lists: _TensorLists) -> bool:
    for position in (*lists.inputs, *lists.outputs):
        if not all([tensor is None or tensor.is_contiguous() for tensor in arguments[position]]):
            return False
    return True


def _run_on_copies(
    kernel: Callable[..., Any], arguments: tuple[Any, ...], lists: _TensorLists
) -> Any:
    flat, copies = _flatten(arguments, lists)
    result = kernel(*flat)
    for tensor, copy in copies:
        tensor.copy_(copy)
    _count_writes(flat, lists)
    return result


def _count_writes(arguments: tuple[Any, ...], lists: _TensorLists) -> None:
    """Let autograd see changes of tensors that it saved, as after any operation in place."""
    for position in lists.outputs:
        torch.autograd.graph.increment_version(arguments[position])


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
