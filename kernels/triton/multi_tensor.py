"""Kernels over lists of separate tensors, by tables of addresses: nothing is copied or joined.

A kernel gets lists of T tensors (gradients of the first loss, of the second, parameters, ...), in
which tensor t of every list has the same number of elements. The table has a row for each t with
the addresses of its tensors. A program works on one chunk of `CHUNK` elements of one t, which a
second table names. A kernel is compiled for a combination of dtypes (None: the tensor is missing)
and for aligned or unaligned memory, never for a size; tensors of different combinations go to
different launches.

A table goes to the device once, as long as the tensors and their groups stay as they are. Inside a
CUDA graph's capture the upload is a part of the graph, from pinned memory that PyTorch keeps for
the graph, and no table from outside is used, which could be freed before the graph.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

CHUNK = 8192  # elements; a multiple of every kernel's block

_ALIGNMENT = 16  # bytes of the widest load, and elements, so that a mask cuts through no such load
_TRITON_DTYPES = {
    None: None,
    torch.float32: tl.float32,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}


class Layout(NamedTuple):
    """What a plan depends on: it stays as long as tensors stay where they are."""

    # [T, lists] each; 0 and None: missing.
    addresses: tuple[tuple[int, ...], ...]
    dtypes: tuple[tuple[torch.dtype | None, ...], ...]
    numels: tuple[int, ...]
    groups: tuple[int, ...]
    num_groups: int
    device: torch.device


class Launch(NamedTuple):
    """Chunks of the tensors that one compiled kernel takes."""

    chunks: Tensor  # int64 [chunks, 2]: the row, and the chunk's place in its tensor
    dtypes: tuple[tl.dtype | None, ...]  # one for each list
    aligned: bool


class Plan(NamedTuple):
    """The tables of one call, on the device."""

    # int64 [T, lists + 3]: addresses (0: missing), elements, group, and the slot of the first chunk
    rows: Tensor
    # int64 [groups + 1]: chunks of group g have the slots bounds[g] to bounds[g + 1]
    bounds: Tensor
    slots: int  # chunks of all tensors
    launches: list[Launch]


def plan(
    lists: Sequence[Sequence[Tensor | None]],
    groups: Sequence[int],
    num_groups: int,
    device: torch.device,
) -> Plan:
    """Tables for `lists` of tensors on `device`; ``groups[t]`` from -1 to ``num_groups - 1``."""
    rows = list(zip(*lists, strict=True))
    layout = Layout(
        tuple(tuple(0 if tensor is None else tensor.data_ptr() for tensor in row) for row in rows),
        tuple(tuple(None if tensor is None else tensor.dtype for tensor in row) for row in rows),
        tuple(next((tensor.numel() for tensor in row if tensor is not None), 0) for row in rows),
        tuple(groups),
        num_groups,
        device,
    )
    if device.type == "cpu":
        return _build_once(layout, None)
    if torch.cuda.is_current_stream_capturing():
        return _build(layout)
    # The upload is ordered before the kernels of its own stream alone.
    return _build_once(layout, torch.cuda.current_stream(device).cuda_stream)


class GroupTables(NamedTuple):
    """Which tensors are in which group, on the device."""

    groups: Tensor  # int64 [T]: group, or -1
    members: Tensor  # int64 [T]: tensors in the order of their groups
    bounds: Tensor  # int64 [groups + 1]: group g has members bounds[g] to bounds[g + 1]


def group_tables(groups: Sequence[int], num_groups: int, device: torch.device) -> GroupTables:
    """Tables on `device` for ``groups[t]`` from -1 to ``num_groups - 1``."""
    if device.type == "cpu":
        return _build_group_tables_once(tuple(groups), num_groups, device, None)
    if torch.cuda.is_current_stream_capturing():
        return _build_group_tables(tuple(groups), num_groups, device)
    return _build_group_tables_once(
        tuple(groups), num_groups, device, torch.cuda.current_stream(device).cuda_stream
    )


def by_loss(gradients: Sequence[Tensor | None], num_tensors: int) -> list[Sequence[Tensor | None]]:
    """Split flattened gradients, ``gradients[i * num_tensors + t]``, into lists, one for a loss."""
    return [
        gradients[first : first + num_tensors] for first in range(0, len(gradients), num_tensors)
    ]


def upload(values: Tensor, device: torch.device) -> Tensor:
    """`values` on `device`, without waiting for the device."""
    return values if values.device == device else values.pin_memory().to(device, non_blocking=True)


@triton.jit
def locate(chunks_ptr, rows_ptr, LISTS: tl.constexpr, CHUNK: tl.constexpr):
    """Row of the program's tensor, index of the row, and of the chunk in its tensor."""
    chunk_ptr = chunks_ptr + 2 * tl.program_id(0).to(tl.int64)
    row = tl.load(chunk_ptr)
    return rows_ptr + row * (LISTS + 3), row, tl.load(chunk_ptr + 1)


@triton.jit
def chunk_pointers(row_ptr, start, DTYPES: tl.constexpr, ALIGNED: tl.constexpr):
    """Pointers to element `start` of a row's tensors (0: missing); and how many elements follow."""
    pointers = ()
    for i in tl.static_range(len(DTYPES)):
        if DTYPES[i] is None:
            pointers = pointers + (0,)
        else:
            pointer = tl.load(row_ptr + i).to(tl.pointer_type(DTYPES[i])) + start
            pointers = pointers + (tl.multiple_of(pointer, 16) if ALIGNED else pointer,)
    count = tl.load(row_ptr + len(DTYPES)) - start
    return pointers, tl.multiple_of(count, 16) if ALIGNED else count


@functools.lru_cache(maxsize=64)
def _build_group_tables_once(
    groups: tuple[int, ...], num_groups: int, device: torch.device, stream: int | None
) -> GroupTables:
    return _build_group_tables(groups, num_groups, device)


def _build_group_tables(
    groups: tuple[int, ...], num_groups: int, device: torch.device
) -> GroupTables:
    if groups and not -1 <= min(groups) <= max(groups) < num_groups:
        raise ValueError(
            f"groups must be from -1 to {num_groups - 1}, got {min(groups)} to {max(groups)}"
        )
    table = torch.tensor(groups, dtype=torch.int64)
    members = table.argsort(stable=True)
    bounds = torch.searchsorted(table[members], torch.arange(num_groups + 1))
    flat = upload(torch.cat([table, members, bounds]), device)
    return GroupTables(*flat.split([len(table), len(members), len(bounds)]))


@functools.lru_cache(maxsize=64)
def _build_once(layout: Layout, stream: int | None) -> Plan:
    return _build(layout)


def _build(layout: Layout) -> Plan:
    addresses, dtypes, numels, groups, num_groups, device = layout
    counts = [triton.cdiv(numel, CHUNK) for numel in numels]
    first_slots = [0] * len(counts)
    bounds = [0] * (num_groups + 1)
    slots = 0
    for t in sorted(range(len(counts)), key=groups.__getitem__):
        first_slots[t] = slots
        slots += counts[t]
        bounds[groups[t] + 1] = slots
    # A group without chunks ends where the one before it does.
    bounds = list(itertools.accumulate(bounds, max))

    members: dict[tuple, list[int]] = {}
    for t, count in enumerate(counts):
        if count:
            aligned = all(number % _ALIGNMENT == 0 for number in (*addresses[t], numels[t]))
            members.setdefault((dtypes[t], aligned), []).append(t)
    rows = [(*addresses[t], numels[t], groups[t], first_slots[t]) for t in range(len(counts))]
    tables = [
        torch.tensor(rows),
        torch.tensor(bounds),
        *(_chunks(tensors, counts) for tensors in members.values()),
    ]
    flat = upload(torch.cat([table.reshape(-1) for table in tables]), device)
    pieces = flat.split([table.numel() for table in tables])
    rows, bounds, *chunks = (
        piece.view(table.shape) for piece, table in zip(pieces, tables, strict=True)
    )
    launches = [
        Launch(table, tuple(_TRITON_DTYPES[dtype] for dtype in combination), aligned)
        for table, (combination, aligned) in zip(chunks, members, strict=True)
    ]
    return Plan(rows, bounds, slots, launches)


def _chunks(tensors: list[int], counts: list[int]) -> Tensor:
    """[chunks, 2]: for each chunk of `tensors`, the tensor and the chunk's place in it."""
    repeats = torch.tensor([counts[t] for t in tensors])
    first = (repeats.cumsum(0) - repeats).repeat_interleave(repeats)
    return torch.stack(
        [torch.tensor(tensors).repeat_interleave(repeats), torch.arange(len(first)) - first], dim=1
    )
