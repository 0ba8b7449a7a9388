"""Both gradients averaged and combined in shards: one and a half all-reduces instead of two."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...ops.alignment import combine_operator
from ..collected import Collected, CollectedGradients
from .all_reduce import AllReduce
from .flat_buffers import FlatBuffers


class Sharded(AllReduce):
    """Each process adds up, aligns and combines a part of the flat gradients.

    A reduce-scatter a loss (half an all-reduce), an all-reduce of n (n + 1) / 2 doubles a tensor
    for the Gram matrices, and one all-gather of the combined gradient (half an all-reduce).
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        wrapper: DistributedDataParallel | None,
        parameters: Sequence[Tensor],
        num_losses: int,
    ):
        super().__init__(group, wrapper, parameters, num_losses)
        self._scatters = dist.get_backend(group) != "gloo"
        # For each loss, the part of each buffer that this process adds up.
        self._shards: list[list[Tensor]] = []
        self._reached_by: list[set[int]] = []
        # The rows of what was combined last, and those of what it was combined of.
        self._rows: list[int] = []
        self._rows_before: list[int] = []

    def reduce_grams(self, matrices: Tensor, tensors: list[int]) -> Tensor:
        # What is asked for before gradients are averaged is of whole ones.
        if not self._shards:
            return matrices
        upper = torch.triu_indices(self._num_losses, self._num_losses, device=matrices.device)
        entries = matrices[:, upper[0], upper[1]].contiguous()  # [T, n (n + 1) / 2]
        dist.all_reduce(entries, group=self._group)
        whole = torch.empty_like(matrices)
        whole[:, upper[0], upper[1]] = entries
        whole[:, upper[1], upper[0]] = entries
        return whole

    def whole(self, collected: Collected) -> Collected:
        if not self._shards:
            return collected
        shards, flat = self._shards[0], self._flat[0]
        results = [self._part(shards, flat, index) for index in collected.indices]
        losses = [
            [of_loss[index] for index in collected.indices] for of_loss in collected.gradients
        ]
        parts = [part for of_loss in losses for part in of_loss]
        combine_operator(parts, collected.coefficients, collected.rows, [], results)
        for buffer, shard in zip(flat.buffers, shards, strict=True):
            dist.all_gather_into_tensor(buffer, shard, group=self._group)
        self._shards = []
        gradients: list[list[Tensor | None]] = [
            [None] * len(self._parameters) for _ in range(self._num_losses)
        ]
        for index in collected.indices:
            gradients[0][index] = flat.views[index]
        if self._rows_before is not collected.rows:
            self._rows_before, self._rows = collected.rows, [0] * len(collected.indices)
        row = torch.zeros_like(collected.coefficients[:1])
        row[0, 0] = 1
        return Collected(gradients, collected.indices, self._rows, row, combined=True)

    def _buffers_for(self, indices: list[list[int]]) -> list[FlatBuffers]:
        """Places that are the same for all losses, as a shard of each is combined."""
        union = sorted(set().union(*indices))
        self._reached_by = [set(of_loss) for of_loss in indices]
        return [FlatBuffers(self._parameters, union, self._size) for _ in indices]

    def _reduce(self, collected: CollectedGradients) -> None:
        factor = 1 / self._size if self._divides else 1.0
        scattered = []
        for gradients, flat in zip(collected.gradients, self._flat, strict=True):
            flat.fill(gradients, factor)
            gradients[:] = [None] * len(gradients)
            scattered.append([self._start_scatter(buffer) for buffer in flat.buffers])
        self._shards = [[each.wait() for each in of_loss] for of_loss in scattered]
        for loss, shards in enumerate(self._shards):
            for index in self._reached_by[loss]:
                part = self._part(shards, self._flat[loss], index)
                collected.gradients[loss][index] = part

    def _start_scatter(self, buffer: Tensor) -> _Scatter:
        if self._scatters:
            shard = buffer.new_empty(len(buffer) // self._size)
            work = dist.reduce_scatter_tensor(shard, buffer, group=self._group, async_op=True)
            return _Scatter(work, shard, 1)
        # Gloo's reduce-scatter is an all-reduce of which it keeps a part.
        parts = torch.empty_like(buffer)
        work = dist.all_to_all_single(parts, buffer, group=self._group, async_op=True)
        return _Scatter(work, parts, self._size)

    def _part(self, shards: list[Tensor], flat: FlatBuffers, index: int) -> Tensor:
        """What the shards hold of a parameter's gradient, without its shape; maybe nothing."""
        span = flat.spans[index]
        shard = shards[span.buffer]
        first = self._group.rank() * len(shard)
        start = min(max(span.start - first, 0), len(shard))
        end = min(max(span.end - first, 0), len(shard))
        return shard[start:end]


class _Scatter:
    """A reduce-scatter on its way: of `parts` parts that are left to be added up."""

    def __init__(self, work: Any, received: Tensor, parts: int):
        self._work = work
        self._received = received
        self._parts = parts

    def wait(self) -> Tensor:
        """The sum of the processes' parts."""
        self._work.wait()
        if self._parts == 1:
            return self._received
        return self._received.view(self._parts, -1).sum(0)
