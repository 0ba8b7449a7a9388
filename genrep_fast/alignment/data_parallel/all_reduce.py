"""Both gradients averaged by all-reduces of flat buffers, after all backward passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..collected import CollectedGradients
from ..tensor_grams import TensorGrams
from .agreement import Agreement
from .flat_buffers import FlatBuffers
from .ownership import check_no_join
from .strategy import Strategy


class AllReduce(Strategy):
    """One all-reduce a loss and dtype, whatever the number of forward passes and micro-batches.

    A parameter that a loss reaches in any process counts as reached. Gradients travel in their own
    dtype; float16 ones are divided by the number of processes before they are added up, others
    afterwards, by way of the coefficients.

    Args:
        group: the processes.
        wrapper: DistributedDataParallel that leaves averaging to the aligner; None without one.
        parameters: of the aligner.
        num_losses: how many losses there are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        wrapper: DistributedDataParallel | None,
        parameters: Sequence[Tensor],
        num_losses: int,
    ):
        super().__init__(parameters)
        self._group = group
        self._wrapper = wrapper
        self._num_losses = num_losses
        self._size = group.size()
        self.averages = self._size > 1
        self._agreement = Agreement(group, parameters)
        self._reached: list[bool] | None = None
        self._flat: list[FlatBuffers] = []

    @property
    def adds_up(self) -> bool:
        return False

    def check_joint(self, last_call: str) -> None:
        pass

    def flat(self, wanted: bool) -> bool:
        return wanted and self._size == 1

    def begin(self, loss: int, collected: CollectedGradients, is_last: bool) -> None:
        if self._wrapper is not None:
            check_no_join(self._wrapper)

    def fail(self) -> None:
        if self._size > 1:
            self._agreement.fail(self._num_losses * len(self._parameters))

    def agree(self, collected: CollectedGradients, facts: Sequence[object]) -> None:
        if self._size == 1:
            return
        reached = self._settle(collected, facts)
        if reached != self._reached:
            # The old ones make room.
            self._flat = []
            self._flat = self._buffers_for(self._indices(reached))
            self._reached = reached

    def average(self, collected: CollectedGradients, grams: TensorGrams) -> None:
        grams.clear()
        self._reduce(collected)

    def scaled(self, grad_scale: Tensor | None) -> Tensor | float | None:
        if self._size == 1 or self._divides:
            return grad_scale
        return self._size if grad_scale is None else grad_scale * self._size

    def add_up(
        self, number: Tensor, collected: CollectedGradients, facts: Sequence[object]
    ) -> Tensor:
        if self._size > 1:
            self._settle(collected, facts)
            dist.all_reduce(number, group=self._group)
        return number

    @property
    def _divides(self) -> bool:
        """Whether gradients are divided before they are added up, as sums of float16 overflow."""
        buffers = [buffer for flat in self._flat for buffer in flat.buffers]
        return any(buffer.dtype == torch.float16 for buffer in buffers)

    def _settle(self, collected: CollectedGradients, facts: Sequence[object]) -> list[bool]:
        """Which gradients, loss by loss, any process has."""
        present = [one for of_loss in collected.present() for one in of_loss]
        return self._agreement.settle(facts, present)

    def _indices(self, reached: list[bool]) -> list[list[int]]:
        """For each loss, the parameters that it reaches in any process."""
        count = len(self._parameters)
        return [
            [index for index in range(count) if reached[loss * count + index]]
            for loss in range(self._num_losses)
        ]

    def _buffers_for(self, indices: list[list[int]]) -> list[FlatBuffers]:
        return [FlatBuffers(self._parameters, of_loss) for of_loss in indices]

    def _reduce(self, collected: CollectedGradients) -> None:
        factor = 1 / self._size if self._divides else 1.0
        works = []
        for gradients, flat in zip(collected.gradients, self._flat, strict=True):
            flat.fill(gradients, factor)
            for index, view in flat.views.items():
                gradients[index] = view
            for buffer in flat.buffers:
                works.append(dist.all_reduce(buffer, group=self._group, async_op=True))
        for work in works:
            work.wait()
