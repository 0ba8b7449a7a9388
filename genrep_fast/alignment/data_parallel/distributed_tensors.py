"""Parameters that are DTensors, whose gradients FSDP2 or autograd itself reduces."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..collected import CollectedGradients
from ..tensor_grams import TensorGrams
from ..unreduced_gradients import UnreducedGradients
from .shard_sums import ShardSums
from .strategy import Strategy


class DistributedTensors(Strategy):
    """Takes the gradients that passes leave, and adds up Gram matrices of shards.

    Args:
        parameters: of the aligner, of which some are DTensors.
        n: number of losses.
    """

    # FSDP2 averages by itself what it keeps from pass to pass.
    adds_up = False

    def __init__(self, parameters: Sequence[Tensor], n: int):
        super().__init__(parameters)
        self._unreduced = UnreducedGradients(parameters)
        self._sums = ShardSums(parameters, n)

    def check_joint(self, last_call: str) -> None:
        pass

    def begin(self, loss: int, collected: CollectedGradients, is_last: bool) -> None:
        self._unreduced.check(loss)

    def end(self, loss: int, name: str, grams: TensorGrams) -> None:
        self._unreduced.find(loss)

    def agree(self, collected: CollectedGradients, facts: Sequence[object]) -> None:
        self._unreduced.check(None)

    def forget(self) -> None:
        self._unreduced.drop()

    def reduce_grams(self, matrices: Tensor, tensors: list[int]) -> Tensor:
        return self._sums(matrices, tensors)
