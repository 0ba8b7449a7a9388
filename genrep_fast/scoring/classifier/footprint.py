"""Memory that a diffusion classifier's networks take, told without running them."""

from __future__ import annotations

import contextlib
import copy
import inspect
from typing import Any

import torch
from torch import Tensor, nn

from .network import Network


def least_memory(network: Network, rows: int) -> int | None:
    """Bytes of all weights and of the largest layer's output for a batch; None without a module.

    Attention, temporary memory and what an allocator keeps come on top.
    """
    used = [getattr(part, "__self__", part) for part in (network.denoiser, network.vae)]
    modules = [module for module in used if isinstance(module, nn.Module)]
    if not modules:
        return None
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    sizes = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
    return sum(sizes.values()) + rows * _largest_output(network)


def _largest_output(network: Network) -> int:
    """Bytes of the largest output of the denoiser's layers for one row; 0 where none is known."""
    shape = network.sample_shape()
    module: Any = getattr(network.denoiser, "__self__", network.denoiser)
    if shape is None or not isinstance(module, nn.Module):
        return 0
    sizes = [0]

    def measure(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * output.element_size())

    # What a network of any kind raises where there are no values.
    with contextlib.suppress(Exception), torch.no_grad():
        dtype = network.dtype(torch.empty(0))
        copied = _on_meta(getattr(module, "_orig_mod", module))
        for layer in copied.modules():
            layer.register_forward_hook(measure)
        called: Any = copied
        if inspect.ismethod(network.denoiser):
            called = getattr(copied, network.denoiser.__name__)
        zero = torch.zeros(1, dtype=torch.int64, device="meta")
        called(torch.empty(1, *shape, dtype=dtype, device="meta"), zero, zero)
    return max(sizes)


def _on_meta(module: nn.Module) -> nn.Module:
    """A copy without values."""
    memo: dict[int, Any] = {}
    for parameter in module.parameters():
        empty = torch.empty_like(parameter, device="meta")
        memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
    for buffer in module.buffers():
        memo[id(buffer)] = torch.empty_like(buffer, device="meta")
    return copy.deepcopy(module, memo)
