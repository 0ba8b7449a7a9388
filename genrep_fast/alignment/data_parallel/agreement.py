"""What the processes tell each other before they reduce gradients."""

from __future__ import annotations

import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# What every process must have alike in a step.
FACTS = ("the call", "names of losses, rule or groups", "weights", "max_norm")


class Agreement:
    """Asks all processes of a group whether they are about to do the same, once a step.

    The numbers travel in one small all-reduce, on the CPU where the group has a backend for it; in
    a group of NCCL alone, reading them waits for the device.

    Args:
        group: the processes.
        parameters: of the aligner, whose shapes and dtypes are compared the first time.
    """

    def __init__(self, group: dist.ProcessGroup, parameters: Sequence[Tensor]):
        self._group = group
        self._parameters = parameters
        cpu = torch.device("cpu")
        self._device = cpu if cpu in group._device_types else parameters[0].device
        self._checked = False

    def settle(self, facts: Sequence[object], reached: list[bool]) -> list[bool]:
        """Which of `reached` are true in any process, once all have the same `facts`.

        Facts are one for each of `FACTS`.

        Raises:
            RuntimeError: where facts differ, and where another process called `fail`.
        """
        numbers = [_number(fact) for fact in facts]
        both = [sign * number for number in numbers for sign in (1, -1)]
        largest = self._largest([0, *both, *reached])
        if largest[0]:
            raise RuntimeError(
                "another process raised an error in this step, which no process has taken: see its "
                "message, and start the step over with zero_grad()"
            )
        ends = largest[1 : 1 + len(both)]
        pairs = zip(FACTS, ends[::2], ends[1::2], strict=True)
        different = [name for name, high, minus_low in pairs if high != -minus_low]
        if different:
            raise RuntimeError(
                f"the processes disagree on {', '.join(different)}: every process must make its "
                "aligner and optimizer of the same arguments, and call the same in every step"
            )
        return [bool(number) for number in largest[1 + len(both) :]]

    def fail(self, num_reached: int) -> None:
        """Tell the others, who call `settle`, that this process raises an error."""
        self._largest([1] + [0] * (2 * len(FACTS) + num_reached))

    def _largest(self, numbers: list[int]) -> list[int]:
        """The largest of each number in all processes."""
        if not self._checked:
            self._check_parameters()
        return self._reduced(numbers)

    def _check_parameters(self) -> None:
        described = [(tuple(parameter.shape), parameter.dtype) for parameter in self._parameters]
        number = _number(described)
        if self._reduced([number, -number]) != [number, -number]:
            raise RuntimeError(
                "the processes disagree on the parameters' number, shapes or dtypes: every process "
                "must make its aligner of the same model"
            )
        self._checked = True

    def _reduced(self, numbers: list[int]) -> list[int]:
        tensor: Tensor = torch.tensor(numbers, dtype=torch.int64, device=self._device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()


def _number(fact: object) -> int:
    """The same of facts that are the same, and most likely another one of others."""
    return zlib.crc32(repr(fact).encode())
