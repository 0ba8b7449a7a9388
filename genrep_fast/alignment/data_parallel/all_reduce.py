"""Both gradients averaged by all-reduces, after all backward passes."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from ..collected import CollectedGradients
from ..tensor_grams import TensorGrams
from .agreement import Agreement
from .flat_buffers import FlatBuffers, gradient_dtype
from .ownership import check_no_join
from .strategy import Strategy

# Of so many bytes a gradient travels by itself, from where it lies: copying it to others would cost
# more than its own collective.
LARGE = 2**22


class AllReduce(Strategy):
    """All-reduces in the step, whatever the number of forward passes and micro-batches.

    Large gradients travel from where autograd put them, small ones side by side, in their own
    dtypes. float16 is divided by the number of processes before it is added up, as sums overflow,
    others afterwards, by way of the coefficients. A parameter that a loss reaches in any process
    counts as reached.

    Args:
        group: the processes.
        wrappers: those that leave averaging to the aligner.
        parameters: of the aligner.
        num_losses: how many losses there are.
    """

    def __init__(
        self,
        group: dist.ProcessGroup,
        wrappers: Sequence[DistributedDataParallel],
        parameters: Sequence[Tensor],
        num_losses: int,
    ):
        super().__init__(parameters)
        self._group = group
        self._wrappers = wrappers
        self._num_losses = num_losses
        self._size = group.size()
        self.averages = self._size > 1
        self._agreement = Agreement(group, parameters)
        # What room was made for.
        self._arranged: tuple[list[bool], list[tuple[torch.dtype, torch.device]]] | None = None
        # For each loss, where small gradients lie, and the parameters whose gradients are large.
        self._flat: list[FlatBuffers] = []
        self._large: list[list[int]] = []
        self._divides = False

    @property
    def adds_up(self) -> bool:
        return False

    def check_joint(self, last_call: str) -> None:
        pass

    def flat(self, wanted: bool) -> bool:
        return wanted and self._size == 1

    def begin(self, loss: int, collected: CollectedGradients, is_last: bool) -> None:
        for wrapper in self._wrappers:
            check_no_join(wrapper)

    def fail(self) -> None:
        if self._size > 1:
            self._agreement.fail(self._num_losses * len(self._parameters))

    def agree(self, collected: CollectedGradients, facts: Sequence[object]) -> None:
        if self._size == 1:
            return
        reached = self._settle(collected, facts)
        # A model may have been converted or moved.
        kinds = [(gradient_dtype(parameter), parameter.device) for parameter in self._parameters]
        if (reached, kinds) != self._arranged:
            # The old ones make room.
            self._flat = []
            self._arrange(self._indices(reached))
            self._divides = any(dtype == torch.float16 for dtype, _ in kinds)
            self._arranged = (reached, kinds)

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

    def _settle(self, collected: CollectedGradients, facts: Sequence[object]) -> list[bool]:
        """Which gradients, loss by loss, any process has."""
        present = [one for of_loss in collected.present() for one in of_loss]
        # Of a GradScaler's scale: waits for the device.
        values = [float(fact) if isinstance(fact, Tensor) else fact for fact in facts]
        return self._agreement.settle(values, present)

    def _indices(self, reached: list[bool]) -> list[list[int]]:
        """For each loss, the parameters that it reaches in any process."""
        count = len(self._parameters)
        return [
            [index for index in range(count) if reached[loss * count + index]]
            for loss in range(self._num_losses)
        ]

    def _arrange(self, indices: list[list[int]]) -> None:
        """Make room for the gradients of the parameters that each loss reaches."""
        self._large = [list(filter(self._is_large, of_loss)) for of_loss in indices]
        for of_loss, large in zip(indices, self._large, strict=True):
            small = sorted(set(of_loss) - set(large))
            self._flat.append(FlatBuffers(self._parameters, small))

    def _is_large(self, index: int) -> bool:
        parameter = self._parameters[index]
        bytes_of_one = gradient_dtype(parameter).itemsize
        # In all processes the elements must lie in the same order.
        return parameter.is_contiguous() and parameter.numel() * bytes_of_one >= LARGE

    def _reduce(self, collected: CollectedGradients) -> None:
        works = []
        for gradients, flat, large in zip(
            collected.gradients, self._flat, self._large, strict=True
        ):
            for index in large:
                gradient = self._contiguous(gradients[index], index)
                gradients[index] = gradient
                if self._divides:
                    gradient /= self._size
                works.append(dist.all_reduce(gradient, group=self._group, async_op=True))
            flat.fill(gradients, 1 / self._size if self._divides else 1.0)
            for index, view in flat.views.items():
                gradients[index] = view
            for buffer in flat.buffers:
                works.append(dist.all_reduce(buffer, group=self._group, async_op=True))
        for work in works:
            work.wait()

    def _contiguous(self, gradient: Tensor | None, index: int) -> Tensor:
        """A gradient as all processes have it, zeros where this one has none."""
        parameter = self._parameters[index]
        dtype = gradient_dtype(parameter)
        if gradient is None:
            return torch.zeros_like(parameter, dtype=dtype)
        return gradient.to(dtype).contiguous()
