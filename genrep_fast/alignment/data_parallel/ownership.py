"""DistributedDataParallel whose gradients an aligner averages in its place."""

from __future__ import annotations

import weakref
from typing import Any

import torch
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel
from torch.nn.parallel.distributed import _find_tensors
from torch.utils._pytree import tree_leaves

from ..passes import Passes

_OUTSIDE = (
    "a backward pass of outputs of DistributedDataParallel, whose gradients a GradientAligner "
    "averages, ran outside of the aligner, and would leave gradients that nothing averages: run it "
    "in `with aligner.collect(name):` or by aligner.backward(). For other losses beside, make the "
    'aligner with reduce="hook", which leaves averaging to DistributedDataParallel, or delete '
    "aligner and optimizer first"
)

_MISSED_STATIC_GRAPH = (
    "a DistributedDataParallel with static_graph whose first passes belonged to a GradientAligner, "
    "which is deleted, would average its first pass alone: make a new DistributedDataParallel"
)


def own(wrapper: DistributedDataParallel, passes: Passes) -> None:
    """Have `wrapper` reduce nothing as long as the aligner to which `passes` belongs lives.

    DistributedDataParallel decides in a forward pass whether the next backward pass reduces, by an
    attribute that it reads then, and which its ``no_sync`` and Lightning write. So the attribute is
    set for the time of every forward pass. Buffers are broadcast as ever.

    Raises:
        ValueError: for a wrapper with options under which it reduces by other means.
    """
    check_wrapper(wrapper)
    if wrapper._comm_hooks:
        raise ValueError(
            "params must be a DistributedDataParallel without a communication hook, which would "
            'not be called, as the aligner averages: make the aligner with reduce="hook" and no '
            "hook of your own, or of the module inside and run a forward pass for each loss"
        )
    _owned.setdefault(wrapper, _Owned(wrapper)).passes.add(passes)
    # A copy of a wrapper has its hooks.
    if _before_forward not in wrapper._forward_pre_hooks.values():
        wrapper.register_forward_pre_hook(_before_forward)
        wrapper.register_forward_hook(_after_forward, always_call=True)


def check_wrapper(wrapper: DistributedDataParallel) -> None:
    """Raise ValueError for options of `wrapper` under which its gradients cannot be aligned."""
    if wrapper.mixed_precision is not None:
        raise ValueError(
            "params must be a DistributedDataParallel without mixed_precision, which reduces by "
            "hooks of its own: use torch.autocast"
        )
    if wrapper._delay_all_reduce_params:
        raise ValueError(
            "params must be a DistributedDataParallel without delay_all_reduce_named_params, "
            "whose gradients it reduces in hooks of its own"
        )
    ignored = set(wrapper.parameters_to_ignore)
    for name, parameter in wrapper.module.named_parameters():
        if name in ignored and parameter.requires_grad:
            raise ValueError(
                f"params must have no trained parameters that DistributedDataParallel ignores, got "
                f"{name}, whose gradients are of one process alone: give the aligner the others, "
                "and run a forward pass for each loss"
            )


def check_no_join(wrapper: DistributedDataParallel) -> None:
    """Raise RuntimeError inside of `torch.distributed.algorithms.Join`."""
    if wrapper._join_config.enable:
        raise RuntimeError(
            "Join shadows one reduction a forward pass for the processes that have no more data, "
            "where alignment needs one a loss: give every process equally many batches (drop_last, "
            "or a DistributedSampler, which pads)"
        )


class _Owned:
    """Who owns a wrapper, and the attributes that it has outside of forward passes."""

    def __init__(self, wrapper: DistributedDataParallel) -> None:
        self.passes: weakref.WeakSet[Passes] = weakref.WeakSet()
        self.attributes: dict[str, bool] = {}
        # Whether the first graph of a static_graph was not recorded, though the reducer counts
        # every pass, and would wait for as many gradients in later ones.
        self.missed_static_graph = False
        self._wrapper = weakref.ref(wrapper)

    def check_inside(self, gradient: Tensor) -> None:
        """Raise RuntimeError at the end of a backward pass that no owner runs.

        One that makes no gradients of parameters, as ``autograd.grad`` of inputs, is nobody's.
        """
        if self.passes and all(passes.collecting is None for passes in self.passes):
            before = self._gradients()
            queue = torch.autograd.Variable._execution_engine.queue_callback
            queue(lambda: self._check_unchanged(before))

    def _gradients(self) -> list[tuple[Tensor, int]]:
        """Every ``.grad``, with the count of writes to it."""
        wrapper = self._wrapper()
        parameters = () if wrapper is None else wrapper.parameters()
        gradients = (parameter.grad for parameter in parameters)
        return [(gradient, gradient._version) for gradient in gradients if gradient is not None]

    def _check_unchanged(self, before: list[tuple[Tensor, int]]) -> None:
        now = self._gradients()
        pairs = zip(now, before, strict=False)
        same = all(new is old and a == b for (new, a), (old, b) in pairs)
        if len(now) != len(before) or not same:
            raise RuntimeError(_OUTSIDE)


_owned: weakref.WeakKeyDictionary[DistributedDataParallel, _Owned] = weakref.WeakKeyDictionary()
# Reduce nothing, but broadcast buffers.
_IN_FORWARD = {"require_backward_grad_sync": False, "require_forward_param_sync": True}
# What the first backward pass of a static graph would reduce counts as reduced.
_OF_STATIC_GRAPH = {"_static_graph_delay_allreduce_enqueued": True}


# Functions of the module, so that a wrapper with these hooks can be copied and pickled.
def _before_forward(wrapper: DistributedDataParallel, arguments: Any) -> None:
    owned = _owned.get(wrapper)
    if owned is None:
        return
    if not owned.passes:
        if owned.missed_static_graph and torch.is_grad_enabled():
            raise RuntimeError(_MISSED_STATIC_GRAPH)
        return
    check_no_join(wrapper)
    if wrapper.static_graph and not wrapper._static_graph_delay_allreduce_enqueued:
        owned.missed_static_graph |= torch.is_grad_enabled()
    attributes = _IN_FORWARD | (_OF_STATIC_GRAPH if wrapper.static_graph else {})
    owned.attributes = {name: getattr(wrapper, name) for name in attributes}
    for name, value in attributes.items():
        setattr(wrapper, name, value)


def _after_forward(wrapper: DistributedDataParallel, arguments: Any, output: Any) -> None:
    owned = _owned.get(wrapper)
    if owned is None or not owned.attributes:
        return
    for name, value in owned.attributes.items():
        setattr(wrapper, name, value)
    owned.attributes = {}
    if not torch.is_grad_enabled():
        return
    for leaf in tree_leaves(output):
        # Those of dataclasses, which are leaves there.
        for tensor in _find_tensors(leaf):
            if tensor.requires_grad:
                tensor.register_hook(owned.check_inside)
