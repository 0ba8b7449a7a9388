"""What a diffusion classifier asks of a family of diffusers' pipelines.

A family is a subclass of `Adapter`. It encodes prompts by the pipeline's own `encode_prompt` and
calls the network as the pipeline's `__call__` does, without guidance.
"""

from __future__ import annotations

import inspect
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor, nn

from ..modules import execution_device


class Tokens(NamedTuple):
    """Prompts as one tokenizer reads them.

    Attributes:
        tokenizer: its name in the pipeline.
        ids: of each prompt, uncut.
        limit: tokens that its encoder takes.
        is_cut_silently: False where another encoder gets the whole prompt.
    """

    tokenizer: str
    ids: list[list[int]]
    limit: int
    is_cut_silently: bool = True


class Adapter:
    """How one family encodes prompts and calls its network.

    It keeps the network and not the pipeline, whose text encoders may be freed once prompts are
    encoded.

    Args:
        pipe: a pipeline of the family.

    Attributes:
        network: the UNet or transformer.
        pixels: of an image, to a side of a latent.
        image_size: (height, width) of the images that the pipeline makes by default, in pixels;
            None where the network's configuration does not say.

    Raises:
        ValueError: where a component is missing or belongs to another kind of model.
    """

    # Names of the pipeline's components.
    network_name: ClassVar[str] = "transformer"
    text_encoders: ClassVar[tuple[str, ...]] = ("text_encoder",)
    # Latents go into the network in squares of this side, and into this many channels each.
    patch: int = 1
    packing: ClassVar[int] = 1

    def __init__(self, pipe: Any) -> None:
        for name in (self.network_name, "vae", *self.text_encoders):
            if getattr(pipe, name, None) is None:
                raise ValueError(
                    f"pipe.{name} is None: load it; text encoders may be freed once the classifier "
                    "is made"
                )
        self.network: nn.Module = getattr(pipe, self.network_name)
        self.patch = getattr(self.config, "patch_size", None) or self.patch
        self.pixels = _pixels_of_latent(pipe)
        self.image_size = self._image_size()
        self._check_network(pipe.vae.config.latent_channels * self.packing)

    @property
    def config(self) -> Any:
        """Of the network."""
        return self.network.config

    def check_prompt(self, prompt: Any, where: str) -> Any:
        """The prompt, where it is one.

        Args:
            where: the argument that holds it.

        Raises:
            TypeError, ValueError: for what is no text.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"{where} must be a string, got {type(prompt).__name__}")
        if not prompt.strip():
            raise ValueError(f"{where} is empty; null_prompt stands for no class")
        return prompt

    def check_null_prompt(self, prompt: Any) -> None:
        """Check what `null_prompt` is, unless it is None.

        Raises:
            TypeError, ValueError: for what is none.
        """
        if not isinstance(prompt, str):
            raise TypeError(f"null_prompt must be a string or None, got {type(prompt).__name__}")

    def tokens(self, pipe: Any, prompts: list[Any]) -> list[Tokens]:
        """The prompts as each of the pipeline's tokenizers reads them."""
        raise NotImplementedError

    def encode(self, pipe: Any, prompts: list[Any], device: torch.device) -> dict[str, Tensor]:
        """What the network gets of each prompt, tensors of one row a prompt."""
        raise NotImplementedError

    def encode_null(self, pipe: Any, prompt: str, device: torch.device) -> dict[str, Tensor]:
        """What the network gets of no class, tensors of one row: the pipeline's negative prompt."""
        return self.encode(pipe, [prompt], device)

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Any:
        """The network's output.

        Args:
            x_t: noisy latents [N, C, h, w].
            timesteps: [N], of the scheduler.
            conditioning: of `encode`, a row a latent, in the dtype of x_t.
        """
        raise NotImplementedError

    def scheduler(self, scheduler: Any) -> Any:
        """The scheduler whose noise levels count."""
        return scheduler

    def check_image_size(self, height: int, width: int) -> None:
        """Raise ValueError for images in pixels that the VAE or the network would cut."""
        multiple = self.pixels * self.patch
        if height % multiple or width % multiple:
            own = ""
            if self.image_size is not None:
                own = f"; the pipeline's own size is {' x '.join(map(str, self.image_size))}"
            raise ValueError(
                f"images must have sides that are multiples of {multiple}, got {height} x {width}"
                f"{own}"
            )

    def sample_shape(self) -> tuple[int, int, int] | None:
        """(C, h, w) of latents, None where the network takes several sizes."""
        return None

    def _check_network(self, channels: int) -> None:
        """Refuse a network that takes more than latents of these channels and prompts."""
        name, config = f"pipe.{self.network_name}", self.config
        if config.in_channels != channels:
            raise ValueError(
                f"{name} takes {config.in_channels} channels, not the {channels} of the VAE's "
                "latents: it needs further inputs, as for inpainting"
            )
        if getattr(self.network, "is_cache_enabled", False):
            raise ValueError(
                f"{name} caches from step to step, where a classifier takes steps and images in "
                "any order: call its disable_cache() first"
            )
        is_adapted = getattr(config, "encoder_hid_dim_type", None) == "ip_image_proj"
        if self.network_name == "transformer":
            adapters = (
                getattr(self.network, of, None) for of in ("image_proj", "encoder_hid_proj")
            )
            is_adapted = any(adapter is not None for adapter in adapters)
        if is_adapted:
            raise ValueError("pipe has an IP-Adapter: call pipe.unload_ip_adapter() first")

    def _image_size(self) -> tuple[int, int] | None:
        size = self._sample_size()
        if size is None:
            return None
        height, width = (size, size) if isinstance(size, int) else size
        return height * self.pixels, width * self.pixels

    def _sample_size(self) -> Any:
        """Of the latents that the pipeline makes by default: a side, or both."""
        return self.config.sample_size


def default_of_call(pipe: Any, name: str) -> Any:
    """What the pipeline's ``__call__`` takes where `name` is not given."""
    # That of a user's subclass may hand its arguments on.
    for ancestor in type(pipe).__mro__:
        parameters = inspect.signature(ancestor.__call__).parameters
        if name in parameters:
            return parameters[name].default
    raise TypeError(f"pipe must be called with {name}, got {type(pipe).__name__}")


def token_ids(pipe: Any, tokenizer: str, prompts: list[str]) -> list[list[int]]:
    """Of each prompt, uncut."""
    convert = getattr(pipe, "maybe_convert_prompt", None)
    if convert is not None:
        # Tokens of several vectors, as textual inversion learns them.
        prompts = convert(prompts, getattr(pipe, tokenizer))
    return getattr(pipe, tokenizer)(prompts).input_ids


def text_device(pipe: Any, encoders: tuple[str, ...]) -> torch.device:
    """Where the tokens of prompts have to be.

    Raises:
        ValueError: for encoders on several devices, between which no hook moves anything.
    """
    modules = {name: getattr(pipe, name, None) for name in encoders}
    found = {
        name: (execution_device(module), hasattr(module, "_hf_hook"))
        for name, module in modules.items()
        if module is not None
    }
    devices = {device for device, _ in found.values() if device is not None}
    if len(devices) > 1 and not all(is_hooked for _, is_hooked in found.values()):
        places = ", ".join(f"{name} on {device}" for name, (device, _) in found.items())
        raise ValueError(f"pipe must have its text encoders on one device, got {places}")
    return next(iter(devices), torch.device("cpu"))


def _pixels_of_latent(pipe: Any) -> int:
    """Pixels to a side of a latent."""
    found = getattr(pipe, "vae_scale_factor", None)
    return found or 2 ** (len(pipe.vae.config.block_out_channels) - 1)
