"""The VAE of a latent model: what is refused, and latents as diffusers' pipelines make them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from ..files import read_json
from ..latents import decoded, flat_numbers, posterior_mode, scaled, unscaled
from .backbones import require_saved
from .weights import load_complete

_CLASS = AutoencoderKL.__name__


def load_autoencoder(path: str | Path) -> AutoencoderKL:
    """Load an AutoencoderKL from a directory that diffusers' `save_pretrained` wrote.

    Raises:
        FileNotFoundError: without a config.json there.
        ValueError: for a VAE of another class, a damaged config.json, and other weights.
        OSError: where there are no weights, or none that can be read.
    """
    file = require_saved("vae", path, "config.json")
    config = read_json(file)
    if not isinstance(config, dict):
        raise ValueError(f"vae: {file} must hold a configuration, got {type(config).__name__}")
    _require_class(config.get("_class_name"))
    return load_complete(AutoencoderKL.from_pretrained, path)


def check_autoencoder(vae: Any) -> None:
    """Raise TypeError for anything but an AutoencoderKL; a subclass could encode otherwise."""
    if type(vae) is not AutoencoderKL:
        raise TypeError(f"vae must be an {_CLASS}, got {type(vae).__name__}")


def build_autoencoder(config: Mapping[str, Any]) -> AutoencoderKL:
    """A frozen, randomly initialised AutoencoderKL of `config`.

    Raises:
        ValueError: for the configuration of another class, and for a scale of latents that is none:
            see `_check_scale`.
    """
    _require_class(config.get("_class_name", _CLASS))
    vae = AutoencoderKL.from_config(config).requires_grad_(False)
    _check_scale(vae.config)
    return vae


def encode(vae: AutoencoderKL, images: Tensor) -> Tensor:
    """Latents [B, C, h, w] of images [B, C', H, W]: the mode of the posterior, scaled.

    (z − shift_factor)·scaling_factor, or (z − latents_mean)·scaling_factor / latents_std. Half
    precision is scaled in float32. A VAE with force_upcast never runs in float16.

    Raises:
        FloatingPointError: for latents that are not finite; asked on the CPU alone, where that
            waits for nothing.
    """
    latents = posterior_mode(vae, images)
    if _may_read(latents):
        require_finite_latents(vae, images, latents)
    return scaled(vae, latents)


def decode(vae: AutoencoderKL, latents: Tensor) -> Tensor:
    """Images [B, C', H, W], not clamped, of latents [B, C, h, w]; the inverse of `encode`.

    Raises:
        FloatingPointError: for images that are not finite; asked on the CPU alone.
    """
    images = decoded(vae, unscaled(vae, latents))
    if _may_read(images):
        require_finite_images(vae, latents, images)
    return images


def require_finite_latents(vae: AutoencoderKL, images: Tensor, latents: Tensor) -> None:
    """Raise FloatingPointError where finite images have latents that are not.

    Raises ValueError where the images are to blame. Waits for the device.
    """
    if latents.isfinite().all():
        return
    require_finite_pixels(images)
    raise FloatingPointError(f"{_named(vae)} gives latents that are not finite{_advice(vae)}")


def require_finite_pixels(images: Tensor) -> None:
    """Raise ValueError for images with NaN or infinity in them. Waits for the device."""
    if not images.isfinite().all():
        raise ValueError("images must be finite, got NaN or infinity")


def require_finite_images(vae: AutoencoderKL | None, latents: Tensor, images: Tensor) -> None:
    """Raise FloatingPointError where generated images are not finite. Waits for the device."""
    if images.isfinite().all():
        return
    if vae is None or not latents.isfinite().all():
        raise FloatingPointError(
            f"the samples that the network generates in {short_name(latents.dtype)} are not finite"
        )
    raise FloatingPointError(f"{_named(vae)} gives images that are not finite{_advice(vae)}")


def _may_read(x: Tensor) -> bool:
    """Whether values can be read without waiting for a device or breaking a graph."""
    return x.device.type == "cpu" and not torch.compiler.is_compiling()


def _require_class(class_name: Any) -> None:
    if class_name != _CLASS:
        raise ValueError(f"vae must be an {_CLASS}, got {class_name!r}")


def _check_scale(config: Any) -> None:
    """Refuse scales of latents that diffusers' pipelines would ignore or divide by."""
    scale, shift = config.scaling_factor, config.shift_factor
    if not _is_finite(scale) or scale <= 0:
        raise ValueError(f"vae: scaling_factor must be a positive number, got {scale!r}")
    if shift is not None and not _is_finite(shift):
        raise ValueError(f"vae: shift_factor must be a number or None, got {shift!r}")
    given = [name for name in ("latents_mean", "latents_std") if config[name] is not None]
    if not given:
        return
    if len(given) == 1:
        raise ValueError(f"vae: latents_mean and latents_std go together, got {given[0]} alone")
    if shift:
        raise ValueError(
            f"vae: shift_factor or latents_mean shifts latents, got both, shift_factor {shift!r}"
        )
    for name in given:
        try:
            values = flat_numbers(config[name])
        except (TypeError, ValueError, RuntimeError):
            values = []
        fits = len(values) == config.latent_channels and all(map(math.isfinite, values))
        if not fits or (name == "latents_std" and min(values) <= 0):
            sign = " above 0" if name == "latents_std" else ""
            wanted = f"{config.latent_channels} numbers{sign}, one a channel"
            raise ValueError(f"vae: {name} must be {wanted}, got {config[name]!r}")


def _is_finite(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value)


def _named(vae: AutoencoderKL) -> str:
    name = vae.config.get("_name_or_path")
    where = f" of {name}" if name else ""
    return f"vae: {_CLASS}{where} in {short_name(vae.dtype)}"


def _advice(vae: AutoencoderKL) -> str:
    if vae.dtype != torch.float16:
        return ""
    return "; set its force_upcast=True, or keep it in float32"


def short_name(dtype: torch.dtype) -> str:
    """ "float16" of torch.float16."""
    return str(dtype).removeprefix("torch.")
