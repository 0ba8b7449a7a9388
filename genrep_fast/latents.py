"""Latents as diffusers' pipelines make them of images, and images of latents, by any VAE of theirs.

A leaf: every room may use it.
"""

from __future__ import annotations

import contextlib
import copy
import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn


def posterior_mode(vae: Any, images: Tensor) -> Tensor:
    """What a VAE makes of images [B, C', H, W]: the mode of its posterior, [B, C, h, w], unscaled.

    In float32, or float64. A VAE with force_upcast never runs in float16. An autoencoder without a
    posterior returns its latents themselves.

    Raises:
        TypeError: where the VAE returns neither.
    """
    return _run(vae, images, _encoded)


def finite_posterior_mode(vae: Any, images: Tensor) -> Tensor:
    """`posterior_mode`, and once more in float32 of the images that overflow in float16.

    Some VAEs do, whatever their configuration says (SDXL's, Sana's). It waits for the device.
    """
    latents = posterior_mode(vae, images)
    overflow = ~latents.flatten(1).isfinite().all(1)
    if overflow.any() and _runs_in_float16(vae, images):
        again = _run(vae, images[overflow], _encoded, upcast=True)
        latents = latents.index_copy(0, overflow.nonzero()[:, 0], again.to(latents))
    return latents


def decoded(vae: Any, latents: Tensor) -> Tensor:
    """Images [B, C', H, W], not clamped, of unscaled latents, in the precision of
    `posterior_mode`.
    """
    return _run(vae, latents, lambda network, z: network.decode(z).sample)


def scaled(vae: Any, latents: Tensor) -> Tensor:
    """(z − shift_factor)·scaling_factor, or (z − latents_mean)·scaling_factor / latents_std.

    As the VAE's config holds them; what it lacks changes nothing.
    """
    scale = _setting(vae, "scaling_factor", 1.0)
    if _setting(vae, "latents_mean") is not None:
        mean, std = _channels(vae, "latents_mean", latents), _channels(vae, "latents_std", latents)
        return (latents - mean) * scale / std
    shift = _setting(vae, "shift_factor")
    return (latents - shift) * scale if shift else latents * scale


def unscaled(vae: Any, latents: Tensor) -> Tensor:
    """The inverse of `scaled`, in float32 or float64."""
    x = _at_least_float32(latents)
    scale = _setting(vae, "scaling_factor", 1.0)
    if _setting(vae, "latents_mean") is not None:
        mean, std = _channels(vae, "latents_mean", x), _channels(vae, "latents_std", x)
        return x * std / scale + mean
    shift = _setting(vae, "shift_factor")
    return x / scale + shift if shift else x / scale


def _setting(vae: Any, name: str, default: Any = None) -> Any:
    found = getattr(getattr(vae, "config", None), name, None)
    return default if found is None else found


def _encoded(vae: Any, images: Tensor) -> Tensor:
    output = vae.encode(images)
    latents = output
    if hasattr(output, "latent_dist"):
        latents = output.latent_dist.mode()
    elif not isinstance(output, Tensor):
        latents = getattr(output, "latent", getattr(output, "latents", None))
    if not isinstance(latents, Tensor):
        found = type(output).__name__
        raise TypeError(f"vae.encode must return a latent_dist, latents or a tensor, got {found}")
    return latents


def _run(
    vae: Any, x: Tensor, call: Callable[[Any, Tensor], Tensor], *, upcast: bool = False
) -> Tensor:
    """What `call` makes of the VAE and x, in float32 at least.

    With `upcast`, or where its configuration asks for it, the VAE does not run in float16.
    """
    autocast: contextlib.AbstractContextManager = contextlib.nullcontext()
    if (upcast or _setting(vae, "force_upcast")) and _runs_in_float16(vae, x):
        vae = _in_float32(vae)
        autocast = torch.autocast(x.device.type, enabled=False)
    with autocast:
        return _at_least_float32(call(vae, x.to(getattr(vae, "dtype", x.dtype))))


def _runs_in_float16(vae: Any, x: Tensor) -> bool:
    device = x.device.type
    half = torch.is_autocast_enabled(device)
    half = half and torch.get_autocast_dtype(device) == torch.float16
    return half or getattr(vae, "dtype", None) == torch.float16


def _in_float32(vae: Any) -> Any:
    """The VAE in float32; itself where it is, else a copy that lives for one call.

    Weights that were converted in place would be those of other threads and of frozen copies, too.

    Raises:
        ValueError: for a VAE that is offloaded, whose hooks a copy would share.
    """
    if vae.dtype != torch.float16:
        return vae
    if any(hasattr(part, "_hf_hook") or hasattr(part, "_diffusers_hook") for part in vae.modules()):
        raise ValueError(
            "vae overflows in float16, and is offloaded: convert it by vae.to(torch.float32) "
            "before it is offloaded"
        )
    vae = getattr(vae, "_orig_mod", vae)
    memo: dict[int, Any] = {}
    for tensor in (*vae.parameters(), *vae.buffers()):
        converted = tensor.detach()
        if tensor.dtype == torch.float16:
            converted = converted.float()
        if isinstance(tensor, nn.Parameter):
            converted = nn.Parameter(converted, requires_grad=False)
        memo[id(tensor)] = converted
    copied = copy.deepcopy(vae, memo)
    # Compiled by users, they would run the half-precision weights.
    for name in ("encode", "decode"):
        copied.__dict__.pop(name, None)
    return copied


def _at_least_float32(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


def _channels(vae: Any, name: str, like: Tensor) -> Tensor:
    """latents_mean or latents_std [C, 1, 1], on the device of `like`."""
    return _on_device(tuple(flat_numbers(_setting(vae, name))), like.device, like.dtype)


@functools.lru_cache(maxsize=64)
def _on_device(values: tuple[float, ...], device: torch.device, dtype: torch.dtype) -> Tensor:
    # Kept: a training step would wait for the device to copy them once more.
    return torch.tensor(values, device=device, dtype=dtype)[:, None, None]


def flat_numbers(values: Any) -> list[float]:
    """All numbers of a sequence, nested or not."""
    return torch.as_tensor(values, dtype=torch.float64).flatten().tolist()
