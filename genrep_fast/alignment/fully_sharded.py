"""What modules of ``fully_shard`` (FSDP2) hold beside parameters and their gradients."""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor


class FullyShardedModules:
    """The modules of ``fully_shard`` that hold some of an aligner's parameters.

    With ``set_requires_gradient_sync(False)`` they keep the gradients of a pass, and add them to
    those of the next one, whichever loss that is of.

    Args:
        parameters: of the aligner.
    """

    def __init__(self, parameters: Sequence[Tensor]):
        self._states = _states_of(parameters)
        # The loss whose gradients are kept.
        self._loss: int | None = None

    def find_kept(self, loss: int) -> None:
        """See whether the passes of `loss` have left gradients without a reduction.

        Raises RuntimeError where they do not wait for the reduction that they started.
        """
        for state in self._states:
            reduces = any(group.reduce_grads for group in _groups_of(state))
            context = getattr(state, "_state_ctx", None)
            if reduces and not getattr(context, "is_last_backward", True):
                raise RuntimeError(
                    "set_is_last_backward(False) leaves the reduction of gradients running, which "
                    "the aligner takes over: set it to True for the passes that reduce"
                )
        self._loss = loss if any(self._kept()) else None

    def check_kept(self, loss: int | None) -> None:
        """Raise RuntimeError where other gradients than those of `loss` are kept; None: any."""
        if any(self._kept()) and (loss is None or loss != self._loss):
            raise RuntimeError(
                "FSDP2 keeps gradients that it has not reduced, and would add them to those of the "
                "next loss: let the last backward pass of every loss reduce, with "
                "set_requires_gradient_sync(True) and, under HSDP, set_requires_all_reduce(True). "
                "zero_grad() drops what was collected"
            )

    def reshard(self) -> None:
        """Let go of whole parameters that a pass left there, as the next one is to have new ones.

        A pass without gradients leaves those of the root module, which FSDP2 would not gather
        again after the step.
        """
        for state in self._states:
            for group in _groups_of(state):
                group.reshard()

    def drop_kept(self) -> None:
        """Drop the gradients that were kept, those of a pass that raised, too."""
        self._loss = None
        for state in self._states:
            for group in _groups_of(state):
                group._partial_reduce_output = None
                for one in group.fsdp_params:
                    one.unsharded_accumulated_grad = None
                    unsharded = getattr(one, "_unsharded_param", None)
                    if unsharded is not None:
                        unsharded.grad = None

    def _kept(self) -> Iterator[bool]:
        for state in self._states:
            for group in _groups_of(state):
                yield group._partial_reduce_output is not None
                for one in group.fsdp_params:
                    yield one.unsharded_accumulated_grad is not None
                    yield getattr(getattr(one, "_unsharded_param", None), "grad", None) is not None


def is_unsharded(parameters: Sequence[Tensor]) -> bool:
    """Whether one of `parameters` is what FSDP2 gathers for a forward or backward pass."""
    known = set(map(id, parameters))
    for state in _all_states():
        for group in _groups_of(state):
            for one in group.fsdp_params:
                if id(getattr(one, "_unsharded_param", None)) in known:
                    return True
    return False


def _states_of(parameters: Sequence[Tensor]) -> list[Any]:
    """The states of the modules of ``fully_shard`` that hold some of `parameters`."""
    known = set(map(id, parameters))
    states: dict[int, Any] = {}
    for state in _all_states():
        for group in _groups_of(state):
            if any(id(one.sharded_param) in known for one in group.fsdp_params):
                states[id(state)] = state
    return list(states.values())


def _all_states() -> list[Any]:
    """The states of all modules that composable APIs, such as ``fully_shard``, manage."""
    from torch.distributed import _composable_state

    held = list(_composable_state._module_state_mapping.values())
    states = [one() if isinstance(one, weakref.ref) else one for one in held]
    return [state for state in states if state is not None]


def _groups_of(state: Any) -> list[Any]:
    """The groups of parameters that FSDP2 communicates together; none of another API's state."""
    groups = getattr(state, "_fsdp_param_groups", None)
    if groups is None:
        # torch before 2.12
        groups = [getattr(state, "_fsdp_param_group", None)]
    return [group for group in groups if group is not None]
