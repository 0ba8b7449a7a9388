"""The quick check of tensor lists, in one call of the C++ library: whether all is well with them.

Where it is, nobody asks the tensors one by one, which takes longer than the kernels of small ones.
Where it is not, or not known, the checks in Python find out what is wrong and say it.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from .operators import in_function_transform

LISTS_FIT = "lists_fit(Tensor?[] tensors, int num_lists, int num_written, Tensor[] others) -> bool"

_KNOWN_TYPES = {Tensor, torch.nn.Parameter, type(None)}

_kernels: list[Callable[..., bool]] = []


def register_list_check(kernel: Callable[..., bool]) -> None:
    """Have `kernel`, of the schema `LISTS_FIT`, answer `lists_fit`."""
    _kernels[:] = [kernel]


def lists_fit(
    written: Sequence[Sequence[Tensor | None]],
    read: Sequence[Sequence[Tensor | None]],
    others: Sequence[Tensor] = (),
) -> bool:
    """Whether lists of one length are known to be fit for an operator that writes `written`.

    Then every tensor is a plain, contiguous one of a dtype that operators take, all are on one
    device, those at one place of the lists have one shape, and a tensor that is written shares no
    memory with any other one, but for one of `read` at its place that is the same.
    """
    if not _kernels or in_function_transform() or torch.compiler.is_compiling():
        return False
    if torch._C._len_torch_dispatch_stack() > 0:
        return False
    tensors = list(itertools.chain(*written, *read))
    if not tensors or not set(map(type, tensors)) <= _KNOWN_TYPES:
        return False
    try:
        return _kernels[0](tensors, len(written) + len(read), len(written), list(others))
    except RuntimeError:
        # Other devices and layouts, which the kernel is not there for.
        return False
