"""Parameters that are DTensors, whose gradients FSDP2 or autograd itself reduces."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from ..collected import CollectedGradients
from ..fully_sharded import FullyShardedModules
from ..tensor_grams import TensorGrams
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
        self._modules = FullyShardedModules(parameters)
        self._sums = ShardSums(parameters, n)

    def check_joint(self, last_call: str) -> None:
        pass

    def begin(self, loss: int, collected: CollectedGradients, is_last: bool) -> None:
        self._modules.check_kept(loss)

    def end(self, loss: int, name: str, grams: TensorGrams) -> None:
        self._modules.find_kept(loss)

    def agree(self, collected: CollectedGradients, facts: Sequence[object]) -> None:
        self._modules.check_kept(None)
        self._modules.reshard()
        # Not a GradScaler's scale: its text names the device and waits for it, and processes that
        # skip the same steps have the same one.
        self._sums.facts = [fact for fact in facts if not isinstance(fact, Tensor)]

    def forget(self) -> None:
        self._modules.drop_kept()

    def reduce_grams(self, matrices: Tensor, tensors: list[int]) -> Tensor:
        return self._sums(matrices, tensors)
