"""Memory that a network takes for an image, told without running it."""

from __future__ import annotations

import contextlib
from typing import Any, NamedTuple

import torch
from torch import nn

from .genrep import GenRep


class Footprint(NamedTuple):
    """Bytes that the outputs of the network's layers take for one image.

    Attributes:
        training: of all layers; backward passes need about as much.
        inference: of the largest one.
    """

    training: int
    inference: int


def footprint(model: GenRep) -> Footprint:
    """What a pass of `model` takes, from the shapes of its layers' outputs on the meta device.

    It is a lower bound: attention and temporary memory are not counted.
    """
    sizes: list[int] = []

    def measure(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, torch.Tensor):
            sizes.append(output.numel() * output.element_size())

    layers = [layer for layer in model.backbone.modules() if not any(layer.children())]
    handles = [layer.register_forward_hook(measure) for layer in layers]
    tensors = (*model.backbone.named_parameters(), *model.backbone.named_buffers())
    state = {name: tensor.detach().to("meta") for name, tensor in tensors}
    x = torch.empty(1, *model.sample_shape, dtype=model.dtype, device="meta")
    zero = torch.zeros(1, dtype=torch.int64, device="meta")
    try:
        # Where sizes overflow, those up to there tell enough.
        with torch.no_grad(), contextlib.suppress(RuntimeError):
            options = {"timestep": zero, "class_labels": zero, "return_dict": False}
            torch.func.functional_call(model.backbone, state, (x,), options)
    finally:
        for handle in handles:
            handle.remove()
    return Footprint(sum(sizes), max(sizes, default=0))
