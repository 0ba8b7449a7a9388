"""Memory that a diffusion classifier's networks take, told without running them."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from .network import Network, module_of
from .pipelines.denoiser import PipelineDenoiser


def least_memory(network: Network, rows: int) -> int | None:
    """Bytes of all weights and of the largest output of a layer; None without a module.

    Outputs are those of the denoiser for a batch of `rows`, and for a pipeline those of its VAE.
    Where a pipeline does not say the size of its images, it is the weights alone. Attention,
    temporary memory and what an allocator keeps come on top.
    """
    used = map(module_of, (network.denoiser, network.vae))
    modules = [module for module in used if module is not None]
    if not modules:
        return None
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    sizes = {id(tensor): tensor.numel() * tensor.element_size() for tensor in tensors}
    shape, outputs = network.sample_shape(), 0
    denoiser = network.denoiser
    size = denoiser.adapter.image_size if isinstance(denoiser, PipelineDenoiser) else None
    if isinstance(denoiser, PipelineDenoiser) and network.vae is not None and size is not None:
        adapter, (height, width) = denoiser.adapter, size
        images = torch.empty(1, 3, height, width, device="meta")
        of_image = _largest_output(network.vae, lambda vae: vae.encode(images.to(vae.dtype)))
        outputs = network.encoded_together(images) * of_image
        channels = network.vae.config.latent_channels
        shape = (channels, height // adapter.pixels, width // adapter.pixels)
    if shape is not None:
        dtype = network.dtype(torch.empty(0))
        x_t = torch.empty(1, *shape, dtype=dtype, device="meta")
        zero = torch.zeros(1, dtype=torch.int64, device="meta")
        of_row = _largest_output(network.denoiser, lambda denoiser: denoiser(x_t, zero, zero))
        outputs = max(outputs, rows * of_row)
    return sum(sizes.values()) + outputs


def _largest_output(network: Any, call: Callable[[Any], Any]) -> int:
    """Bytes of the largest output of a layer, those up to where the network needs values.

    Args:
        network: a module, a method of one, or a pipeline's denoiser.
        call: runs a copy of it that has no values.
    """
    sizes = [0]

    def measure(layer: nn.Module, inputs: Any, output: Any) -> None:
        if isinstance(output, Tensor):
            sizes.append(output.numel() * output.element_size())

    network = getattr(network, "_orig_mod", network)
    module: Any = module_of(network)
    # Networks of any kind raise anything.
    with contextlib.suppress(Exception), torch.no_grad():
        memo: dict[int, Any] = {}
        for parameter in module.parameters():
            empty = torch.empty_like(parameter, device="meta")
            memo[id(parameter)] = nn.Parameter(empty, requires_grad=False)
        conditioning = network.conditioning if isinstance(network, PipelineDenoiser) else {}
        for tensor in (*module.buffers(), *conditioning.values()):
            memo[id(tensor)] = torch.empty_like(tensor, device="meta")
        copied = copy.deepcopy(network, memo)
        copied_module: Any = module_of(copied)
        for layer in copied_module.modules():
            layer.register_forward_hook(measure)
        call(copied)
    return max(sizes)
