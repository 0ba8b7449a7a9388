"""Gram matrices of whole tensors from those of their shards."""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..tensor_grams import symmetric, upper_triangles
from ..wrappers import is_sharded

# Of all processes the numbers of tensors are to be the same: what is compared are 16 bits, whose
# squares are exact in the sums of 1024 processes.
_BITS = 0xFFFF
# Of the squared norms of what is not sharded, their variance relative to the squared mean. Rounding
# makes some 1e-12 of the same gradient where kernels add up in any order; unreduced gradients of
# different images are 1e-2 apart and more.
_TOLERATED_VARIANCE = 1e-6

_DISAGREEMENT = (
    "the processes disagree: the losses reached other parameters in this one than in others that "
    "hold shards of them, or names, weights, rule, power, groups or max_norm differ. Run the same "
    "passes in all of them, with aligners of the same arguments"
)
_UNREDUCED = (
    "parameters that are not sharded, beside sharded ones, must have the same gradients in all "
    "processes, got different ones: FSDP2 does not average those of its ignored_params. "
    "Let fully_shard have them, or average their .grad inside the block of collect"
)


class _Axis(NamedTuple):
    """Processes that hold the shards of some tensors, an axis of a mesh."""

    group: Any
    # Where its collectives want their tensors.
    device: str
    # Tensors that are sharded over it, in the order in which all processes send them.
    tensors: list[int]


class _Plan(NamedTuple):
    """Where matrices lie among those that are given, and among those that are sent."""

    given: list[int]
    facts: Sequence[object]
    device: torch.device
    # For each axis: among the given, and among the sent.
    places: list[tuple[Tensor, Tensor]]
    # Those that are not sharded, among the given.
    plain: Tensor
    # [2] what the given tensors and the facts come to as a number, and its square.
    fingerprint: Tensor

    def is_of(self, given: list[int], facts: Sequence[object], device: torch.device) -> bool:
        """Whether it was made for these tensors and facts on this device."""
        return self.given == given and self.facts == facts and self.device == device


class ShardSums:
    """Adds up the Gram matrices of tensors' shards, over every mesh axis that shards a tensor.

    The shards along an axis are different elements, so that their inner products add up to those
    of the whole tensor; along an axis that replicates, every process has the same elements, which
    must count once. A tensor that several axes shard is summed over one after the other. There is
    one all-reduce an axis, of the upper triangles of all its tensors' matrices, and of four more
    numbers that show whether the processes' tensors and what is not sharded are the same.

    Args:
        parameters: all parameters, of which some are DTensors; the same ones in every process.
        n: number of losses.

    Attributes:
        facts: what else the processes are to have alike.
    """

    def __init__(self, parameters: Sequence[Tensor], n: int):
        self._axes = _axes_that_shard(parameters)
        self._is_plain = [not is_sharded(parameter) for parameter in parameters]
        self._n = n
        self.facts: Sequence[object] = ()
        self._plan: _Plan | None = None

    def __call__(self, grams: Tensor, tensors: list[int]) -> Tensor:
        """Matrices [T, n, n] of whole tensors from those of their local parts, float64.

        Raises RuntimeError where processes give other tensors or have other facts, or where what is
        not sharded has other gradients; on a GPU, when the device gets there.
        """
        if not self._axes:
            return grams
        if self._plan is None or not self._plan.is_of(tensors, self.facts, grams.device):
            self._plan = self._new_plan(tensors, grams.device)
        entries = upper_triangles(grams)
        plain = grams[self._plan.plain].diagonal(dim1=1, dim2=2).sum()
        tail = torch.cat([self._plan.fingerprint, torch.stack([plain, plain.square()])])
        for axis, (given, sent) in zip(self._axes, self._plan.places, strict=True):
            table = entries.new_zeros(len(axis.tensors), entries.shape[1])
            table[sent] = entries[given]
            message = torch.cat([table.flatten(), tail])
            # Of parameters that are offloaded to the CPU.
            if message.device.type != axis.device:
                message = message.to(axis.device)
            dist.all_reduce(message, group=axis.group)
            message = message.to(grams.device)
            _check_same(message[-4:], dist.get_world_size(axis.group))
            entries[given] = message[:-4].view_as(table)[sent]
        return symmetric(entries, self._n)

    def _new_plan(self, tensors: list[int], device: torch.device) -> _Plan:
        places = []
        for axis in self._axes:
            sent_at = {tensor: place for place, tensor in enumerate(axis.tensors)}
            given = [place for place, tensor in enumerate(tensors) if tensor in sent_at]
            sent = [sent_at[tensors[place]] for place in given]
            pair = (_indices(given, device), _indices(sent, device))
            places.append(pair)
        plain = [place for place, tensor in enumerate(tensors) if self._is_plain[tensor]]
        number = float(zlib.crc32(repr((tensors, self.facts)).encode()) & _BITS)
        fingerprint = torch.tensor([number, number**2], dtype=torch.float64, device=device)
        return _Plan(tensors, self.facts, device, places, _indices(plain, device), fingerprint)


def _indices(places: list[int], device: torch.device) -> Tensor:
    return torch.tensor(places, dtype=torch.int64, device=device)


def _axes_that_shard(parameters: Sequence[Tensor]) -> list[_Axis]:
    """The axes of the parameters' meshes that shard some of them, in order of first appearance.

    Meshes that were sliced from one share its axes' process groups.
    """
    axes: dict[str, _Axis] = {}
    for index, parameter in enumerate(parameters):
        if not is_sharded(parameter):
            continue
        whole = cast(Any, parameter)
        mesh = whole.device_mesh
        for number, placement in enumerate(whole.placements):
            if placement.is_replicate() or mesh.size(number) == 1:
                continue
            group = mesh.get_group(number)
            axis = axes.setdefault(group.group_name, _Axis(group, mesh.device_type, []))
            axis.tensors.append(index)
    return list(axes.values())


def _check_same(tail: Tensor, processes: int) -> None:
    """Compare the sums of two numbers and of their squares over processes, which vary in none."""
    number, number_squared, plain, plain_squared = tail.unbind()
    torch._assert_async(processes * number_squared == number.square(), _DISAGREEMENT)
    variance = processes * plain_squared - plain.square()
    # Not the other way around: what is not finite is for others to find.
    differs = variance > _TOLERATED_VARIANCE * plain.square()
    torch._assert_async(~differs, _UNREDUCED)
