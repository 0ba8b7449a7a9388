"""Both gradients averaged and combined in shards: one and a half all-reduces instead of two."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ...ops.alignment import combine_operator
from ..collected import Collected, CollectedGradients
from ..tensor_grams import symmetric, upper_triangles
from .all_reduce import AllReduce
from .flat_buffers import FlatBuffers

# The older names are deprecated since torch 2.13.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor


class Sharded(AllReduce):
    """Each process adds up, aligns and combines a part of the flat gradients.

    A reduce-scatter a loss (half an all-reduce), an all-reduce of n (n + 1) / 2 doubles a tensor
    for the Gram matrices, and one all-gather of the combined gradient (half an all-reduce).
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        wrappers: Sequence[DistributedDataParallel],
        parameters: Sequence[Tensor],
        num_losses: int,
    ):
        super().__init__(group, wrappers, parameters, num_losses)
        self._scatters = dist.get_backend(group) != "gloo"
        # For each loss and buffer, what arrives for this process, and what it adds up to.
        self._received: list[list[Tensor]] = []
        self._shards: list[list[Tensor]] = []
        self._reached_by: list[set[int]] = []
        # The rows of what was combined last, and those of what it was combined of.
        self._rows: list[int] = []
        self._rows_before: list[int] = []

    def begin(self, loss: int, collected: CollectedGradients, is_last: bool) -> None:
        super().begin(loss, collected, is_last)
        # Those of a step that raised.
        self._shards = []

    def reduce_grams(self, matrices: Tensor, tensors: list[int]) -> Tensor:
        # What is asked for before gradients are averaged is of whole ones.
        if not self._shards:
            return matrices
        entries = upper_triangles(matrices).contiguous()
        dist.all_reduce(entries, group=self._group)
        return symmetric(entries, self._num_losses)

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
            _all_gather(buffer, shard, group=self._group)
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

    def _arrange(self, indices: list[list[int]]) -> None:
        # Places that are the same for all losses, as a shard of each is combined.
        union = sorted(set().union(*indices))
        self._reached_by = [set(of_loss) for of_loss in indices]
        self._flat = [FlatBuffers(self._parameters, union, self._size) for _ in indices]
        parts = 1 if self._scatters else self._size
        self._received = [
            [buffer.new_empty(parts * len(buffer) // self._size) for buffer in of_loss.buffers]
            for of_loss in self._flat
        ]

    def _reduce(self, collected: CollectedGradients) -> None:
        factor = 1 / self._size if self._divides else 1.0
        works = []
        for gradients, flat, received in zip(
            collected.gradients, self._flat, self._received, strict=True
        ):
            flat.fill(gradients, factor)
            gradients[:] = [None] * len(gradients)
            for buffer, parts in zip(flat.buffers, received, strict=True):
                works.append(self._start_scatter(parts, buffer))
        for work in works:
            work.wait()
        self._shards = [[self._added_up(parts) for parts in of_loss] for of_loss in self._received]
        for loss, shards in enumerate(self._shards):
            for index in self._reached_by[loss]:
                part = self._part(shards, self._flat[loss], index)
                collected.gradients[loss][index] = part

    def _start_scatter(self, parts: Tensor, buffer: Tensor) -> dist.Work:
        """Send every process its part of `buffer`; `parts` get what is for this one."""
        if self._scatters:
            return _reduce_scatter(parts, buffer, group=self._group, async_op=True)
        # Gloo's reduce-scatter is an all-reduce of which it keeps a part.
        return dist.all_to_all_single(parts, buffer, group=self._group, async_op=True)

    def _added_up(self, parts: Tensor) -> Tensor:
        """The sum of the parts, in the memory of the first one."""
        if self._scatters:
            return parts
        first, *others = parts.chunk(self._size)
        for part in others:
            first += part
        return first

    def _part(self, shards: list[Tensor], flat: FlatBuffers, index: int) -> Tensor:
        """What the shards hold of a parameter's gradient, without its shape; maybe nothing."""
        span = flat.spans[index]
        shard = shards[span.buffer]
        first = self._group.rank() * len(shard)
        start = min(max(span.start - first, 0), len(shard))
        end = min(max(span.end - first, 0), len(shard))
        return shard[start:end]
