"""What networks are asked before and while they are used: their device, dtype and mode."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn

from ...checks import DTYPES


def first_parameter(module: nn.Module) -> Tensor | None:
    """The first parameter that is float32, bfloat16, float16 or float64, or None.

    Weights that are only stored in a smaller type say nothing of what the module computes in.
    """
    return next((tensor for tensor in module.parameters() if tensor.dtype in DTYPES), None)


def execution_device(module: nn.Module) -> torch.device | None:
    """Where a module's inputs have to be, or None for one without parameters.

    Not always where its weights are: those of an offloaded module wait elsewhere, and the hooks of
    Accelerate or diffusers say where they are brought.
    """
    for part in module.modules():
        hook = getattr(part, "_hf_hook", None)
        device = getattr(hook, "execution_device", None)
        group = getattr(part, "_diffusers_hook", None)
        if group is not None and (found := group.get_hook("group_offloading")) is not None:
            device = found.config.onload_device
        if device is not None:
            return torch.device(device)
    parameter = next(module.parameters(), None)
    return None if parameter is None else parameter.device


@contextlib.contextmanager
def eval_mode(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Eval mode without gradients; every module gets its own mode back."""
    parts = (part for module in modules for part in module.modules())
    training = [part for part in parts if part.training]
    try:
        for part in training:
            part.training = False
        with torch.no_grad():
            yield
    finally:
        for part in training:
            part.training = True
