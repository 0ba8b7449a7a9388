"""How the gradients of several processes become one."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..collected import Collected, CollectedGradients
from ..tensor_grams import TensorGrams
from ..wrappers import data_parallel_around, world_size


class Strategy:
    """What a `GradientAligner` asks of data parallelism, in the order in which it does.

    This one is that of one process, or of a wrapper that the aligner does not know: it takes what a
    pass leaves in ``.grad`` for what all processes have.

    Args:
        parameters: of the aligner.

    Attributes:
        averages: whether the processes' gradients differ until `average` is called.
    """

    averages = False

    def __init__(self, parameters: Sequence[Tensor]):
        self._parameters = parameters
        self._is_wrapped: bool | None = None

    @property
    def adds_up(self) -> bool:
        """Whether a block finds in ``.grad`` what was collected for its loss before.

        A wrapper averages what ``.grad`` holds, which includes micro-batches that it did not
        average (``no_sync``).
        """
        return (world_size() or 1) > 1

    def flat(self, wanted: bool) -> bool:
        """Whether collected gradients are copied to flat buffers, where that is `wanted`."""
        return wanted

    def check_joint(self, last_call: str) -> None:
        """Raise RuntimeError where several passes over one graph are not all averaged.

        `last_call` is that which ends a step.
        """
        processes = world_size()
        if processes is None:
            return
        if processes == 1:
            if self._is_wrapped is None:
                self._is_wrapped = bool(data_parallel_around(self._parameters))
            if not self._is_wrapped:
                return
        running = "process is" if processes == 1 else "processes are"
        raise RuntimeError(
            "backward runs several backward passes over one graph, "
            "of which DistributedDataParallel reduces but one, "
            f"and {processes} {running} running. Make the aligner of the module that is wrapped in "
            "DistributedDataParallel (what accelerator.prepare and fabric.setup return, and "
            "self.trainer.model in Lightning), or with process_group: then it averages the "
            "gradients of all passes itself. Or run a forward pass for each loss, through the "
            "wrapper, and its backward pass inside `with aligner.collect(name):`, "
            f"then call {last_call}. "
            "Where a loss does not reach every parameter, wrap with find_unused_parameters=True; "
            "with Accelerate's gradient accumulation, also pass "
            "GradientAccumulationPlugin(num_steps=..., sync_each_batch=True)"
        )

    def begin(self, loss: int, collected: CollectedGradients, is_last: bool) -> None:
        """Before a block of `loss`, which `is_last` where all others have been collected.

        Raises RuntimeError where no backward pass may begin.
        """

    def arm(self, loss: Tensor) -> None:
        """Before the backward pass of a loss that shares its graph with others."""

    def end(self, loss: int, name: str, grams: TensorGrams) -> None:
        """After the block of `loss`, before its gradients are taken; `grams` get what is known."""

    def fail(self) -> None:
        """Tell the other processes, which call `agree`, that this one raises an error."""

    def agree(self, collected: CollectedGradients, facts: Sequence[object]) -> None:
        """Raise RuntimeError where the processes cannot take a step together.

        `facts` are what they must have alike.
        """

    def average(self, collected: CollectedGradients, grams: TensorGrams) -> None:
        """Put what all processes collected in the place of what this one did.

        `grams` are those of what this process did.
        """

    def forget(self) -> None:
        """When everything that was collected is dropped, or has been consumed."""

    def scaled(self, grad_scale: Tensor | None) -> Tensor | float | None:
        """By which the gradients that `average` leaves are too large, None for 1.

        `grad_scale` is by which those of this process were.
        """
        return grad_scale

    def reduce_grams(self, matrices: Tensor, tensors: list[int]) -> Tensor:
        """Whole Gram matrices from those of what this process holds."""
        return matrices

    def add_up(
        self, number: Tensor, collected: CollectedGradients, facts: Sequence[object]
    ) -> Tensor:
        """The sum of what all processes found in their gradients; `facts` as for `agree`."""
        return number

    def whole(self, collected: Collected) -> Collected:
        """Gradients of whole tensors from those of what this process holds."""
        return collected
