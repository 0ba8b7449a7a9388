"""What the processes tell each other before they reduce gradients."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

# What every process must have alike in a step.
FACTS = (
    "the call",
    "names of losses, rule, power or groups",
    "weights",
    "max_norm",
    "the scale of GradScaler",
)


class Agreement:
    """Asks all processes of a group whether they are about to do the same, once a step.

    What they say travels in one small all-reduce, of a byte a tensor and loss. It is on the CPU
    where the group has a backend for it; in a group of NCCL alone, reading it waits for the device.

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
        digests = [_digest(fact) for fact in facts]
        largest = self._largest([0, *itertools.chain(*digests), *reached])
        if largest[0]:
            raise RuntimeError(
                "another process raised an error in this step, which no process has taken: see its "
                "message, and start the step over with zero_grad()"
            )
        starts = range(1, 1 + len(FACTS) * _SIZE, _SIZE)
        found = [largest[start : start + _SIZE] for start in starts]
        pairs = zip(FACTS, digests, found, strict=True)
        different = [name for name, own, of_all in pairs if own != of_all]
        if different:
            raise RuntimeError(
                f"the processes disagree on {', '.join(different)}: every process must make its "
                "aligner and optimizer of the same arguments, and call the same in every step"
            )
        return [bool(number) for number in largest[1 + len(FACTS) * _SIZE :]]

    def fail(self, num_reached: int) -> None:
        """Tell the others, who call `settle`, that this process raises an error."""
        self._largest([1] + [0] * (len(FACTS) * _SIZE + num_reached))

    def _largest(self, numbers: list[int]) -> list[int]:
        """The largest of each number in all processes."""
        if not self._checked:
            self._check_parameters()
        return self._reduced(numbers)

    def _check_parameters(self) -> None:
        described = [(tuple(parameter.shape), parameter.dtype) for parameter in self._parameters]
        digest = _digest(described)
        if self._reduced(digest) != digest:
            raise RuntimeError(
                "the processes disagree on the parameters' number, shapes or dtypes: every process "
                "must make its aligner of the same model"
            )
        self._checked = True

    def _reduced(self, numbers: list[int]) -> list[int]:
        tensor: Tensor = torch.tensor(numbers, dtype=torch.uint8, device=self._device)
        dist.all_reduce(tensor, dist.ReduceOp.MAX, group=self._group)
        return tensor.tolist()


# Bytes of a digest.
_SIZE = 8


def _digest(fact: object) -> list[int]:
    """Bytes whose maxima over processes are they themselves only where all have the same fact."""
    digest = zlib.crc32(repr(fact).encode()).to_bytes(_SIZE // 2, "big")
    return [*digest, *(255 - byte for byte in digest)]
