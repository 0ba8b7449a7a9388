"""The network of a diffusion classifier, whatever its kind, and its VAE."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from ...checks import DTYPES
from ...latents import finite_posterior_mode, scaled
from ..chains import network_output
from .modules import eval_mode, execution_device, first_parameter
from .pipelines.denoiser import PipelineDenoiser

# Images that go through a VAE together, at most, and their pixels: two images of 1024 × 1024.
_ENCODED, _ENCODED_PIXELS = 8, 2 * 1024**2


class Network:
    """A denoiser ``denoiser(x_t, t, labels)`` and a VAE, in eval mode while they are used.

    Args:
        denoiser: a function, a bound method, a module (diffusers' models with class labels, GenRep)
            or a pipeline's. What it returns may be a tensor, an output object with ``sample``, or
            a tuple.
        vae: None; diffusers' autoencoder; or a function of images that returns latents.
        num_labels: rows of the class embedding that are used, the null class included.
        device, dtype: of the noisy inputs; None takes those of the denoiser's parameters, and for
            a function without any those of the images.

    Raises:
        TypeError, ValueError: for what cannot be called so.
    """

    def __init__(
        self,
        denoiser: Callable[..., Any],
        vae: Any,
        num_labels: int,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        if not callable(denoiser):
            found = type(denoiser).__name__
            raise TypeError(f"denoiser must be callable as denoiser(x_t, t, labels), got {found}")
        if dtype is not None and dtype not in DTYPES:
            raise TypeError(f"dtype must be float32, bfloat16, float16 or float64, got {dtype}")
        _check_signature(denoiser)
        _check_class_embedding(denoiser, num_labels)
        if vae is not None and not (callable(vae) or hasattr(vae, "encode")):
            found = type(vae).__name__
            raise TypeError(f"vae must have encode, or be a function of images, got {found}")
        self.denoiser = denoiser
        self.vae = vae
        self._device = None if device is None else torch.device(device)
        self._dtype = dtype

    def device(self, images: Tensor) -> torch.device:
        """Where noisy inputs of `images` are put."""
        if self._device is not None:
            return self._device
        module = module_of(self.denoiser)
        device = None if module is None else execution_device(module)
        return images.device if device is None else device

    def dtype(self, images: Tensor) -> torch.dtype:
        """Of the noisy inputs of `images`."""
        if self._dtype is not None:
            return self._dtype
        module = module_of(self.denoiser)
        parameter = None if module is None else first_parameter(module)
        return images.dtype if parameter is None else parameter.dtype

    @contextlib.contextmanager
    def evaluating(self, *others: Any) -> Iterator[None]:
        """Eval mode without gradients, of `others` too; every module gets its own mode back."""
        modules = (module_of(used) for used in (self.denoiser, self.vae, *others))
        with eval_mode(module for module in modules if module is not None):
            yield

    def __call__(self, x_t: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        """Model output [N, C', *spatial] of noisy inputs [N, C, *spatial], with C' ≥ C.

        Raises:
            TypeError, ValueError: for an output of another kind or shape.
        """
        return network_output(self.denoiser, x_t, timesteps, labels)

    def encoded_together(self, images: Tensor) -> int:
        """How many of these images [B, C, H, W] memory allows to be encoded at a time."""
        return max(1, min(_ENCODED, _ENCODED_PIXELS // images.shape[2:].numel()))

    def encode(self, images: Tensor) -> Tensor:
        """Latents of images in −1…1, scaled as diffusers' pipelines do; the images without a VAE.

        Diffusers' autoencoders give the mode of their posterior, which is then shifted and scaled
        by what their config holds (`latents_mean` and `latents_std`, else `shift_factor`, and
        `scaling_factor`). Images that overflow in float16 are encoded once more in float32.

        Raises:
            TypeError, ValueError: for a VAE that returns no latents, images of other channels than
                the VAE's, and of a size that a pipeline does not take.
        """
        if self.vae is None:
            return images
        if isinstance(self.denoiser, PipelineDenoiser):
            self.denoiser.adapter.check_image_size(*images.shape[2:])
        if not hasattr(self.vae, "encode"):
            latents = self.vae(images)
            if not isinstance(latents, Tensor):
                raise TypeError(f"vae must return a tensor, got {type(latents).__name__}")
            return latents
        channels = getattr(getattr(self.vae, "config", None), "in_channels", None)
        if channels is not None and images.shape[1] != channels:
            raise ValueError(
                f"images must have the {channels} channels of the VAE, got {images.shape[1]}"
            )
        device = execution_device(self.vae) if isinstance(self.vae, nn.Module) else None
        images = images if device is None else images.to(device)
        return scaled(self.vae, finite_posterior_mode(self.vae, images))

    def check_latents(self, latents: Tensor, ids: Sequence[int], places: Sequence[int]) -> None:
        """Check what `encode` made of images.

        Args:
            ids: of the images' noise.
            places: of the images among those of the call.

        Raises:
            ValueError: for another shape than the denoiser's, and NaN or infinity.
        """
        shape = self.sample_shape()
        fits = len(latents) == len(ids) and (shape is None or latents.shape[1:] == shape)
        if not fits:
            wanted = "one an image" if shape is None else f"{[len(ids), *shape]}"
            raise ValueError(
                f"images must give latents {wanted}, got {list(latents.shape)}: "
                "another size of images, or another VAE, than the denoiser's"
            )
        # Images that go through no VAE were checked when they were read.
        if self.vae is None:
            return
        finite = latents.flatten(1).isfinite().all(1).tolist()
        if not all(finite):
            bad = finite.index(False)
            raise ValueError(
                f"vae must return finite latents, got NaN or infinity for image {places[bad]} "
                f"(id {ids[bad]})"
            )

    def sample_shape(self) -> tuple[int, int, int] | None:
        """(C, H, W) of a noisy input, where the denoiser's config tells it."""
        if isinstance(self.denoiser, PipelineDenoiser):
            return self.denoiser.adapter.sample_shape()
        module = module_of(self.denoiser)
        shape = getattr(module, "sample_shape", None)
        if isinstance(shape, tuple):
            return shape
        config = getattr(module, "config", None)
        size = getattr(config, "sample_size", None)
        channels = getattr(config, "in_channels", None)
        if size is None or channels is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return channels, height, width


def module_of(function: Any) -> nn.Module | None:
    """The module that is called, itself, by one of its methods or by a pipeline's denoiser."""
    if isinstance(function, nn.Module):
        return function
    if isinstance(function, PipelineDenoiser):
        return function.module
    owner = getattr(function, "__self__", None)
    return owner if isinstance(owner, nn.Module) else None


def _check_signature(denoiser: Any) -> None:
    """Raise TypeError for diffusers' models whose third argument is no class label."""
    called = denoiser.forward if isinstance(denoiser, nn.Module) else denoiser
    try:
        names = list(inspect.signature(called).parameters)
    except (TypeError, ValueError):
        return
    if "encoder_hidden_states" in names[:3]:
        raise TypeError(
            f"denoiser: {type(denoiser).__name__} takes encoder_hidden_states, not class labels: "
            "wrap it in a function of (x_t, t, labels)"
        )


def _check_class_embedding(denoiser: Any, num_labels: int) -> None:
    """Raise ValueError for labels beyond the class embedding of one of diffusers' models."""
    config = getattr(denoiser, "config", None) if isinstance(denoiser, nn.Module) else None
    rows = getattr(config, "num_class_embeds", None)
    embedded = getattr(config, "num_embeds_ada_norm", None)
    if rows is None and embedded is not None:
        # The last row is the null class.
        rows = embedded + 1
    if rows is not None and num_labels > rows:
        raise ValueError(
            f"num_classes and null_class must fit the {rows} rows of the denoiser's class "
            f"embedding, got labels up to {num_labels - 1}"
        )
