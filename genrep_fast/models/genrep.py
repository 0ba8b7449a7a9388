"""GenRep (Li, Yang, Wang, ICLR 2026): one denoising network that perceives and generates."""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from diffusers.models.embeddings import get_timestep_embedding
from diffusers.utils import BaseOutput
from torch import nn

from .autoencoder import build_autoencoder, check_autoencoder, decode, encode, load_autoencoder
from .backbones import (
    Backbone,
    attention_blocks,
    block_channels,
    block_names,
    build_backbone,
    class_embeddings,
    keep_outputs,
    load_backbone,
    output_channels,
    run_backbone,
    with_null_class,
)
from .weights import load_complete, meta_tensors, named

_TIME_EMBEDDING = 64
# What torch.compile puts into the names of a part's tensors.
_COMPILED = "_orig_mod."


@dataclass
class GenRepOutput(BaseOutput):
    """What the network says of a noisy input.

    Attributes:
        sample: model output [B, C', H, W], the semantic-driven modulation of the mean included.
        log_std_shift: [B], within ±1, to be added to the logarithm of the reverse step's standard
            deviation.
        features: [B, F, h, w], the network's own features at the semantic block.
    """

    sample: torch.Tensor
    # Accelerate's mixed precision rebuilds an output from one dictionary, which diffusers takes
    # only where the other fields are None at first; `forward` gives all of them.
    log_std_shift: torch.Tensor = None  # type: ignore[assignment]
    features: torch.Tensor = None  # type: ignore[assignment]


class GenRep(ModelMixin, ConfigMixin):
    """A denoiser over a diffusers backbone with a perception branch and semantic-driven generation.

    Build it with `from_backbone` or `from_pretrained`. All inputs named `x` are clean or noisy
    latents [B, C, H, W] in the backbone's own space: images in [-1, 1] where there is no VAE,
    `encode(images)` where there is one.

    Args:
        backbone_config: config of the backbone with its ``_class_name``; its class embedding ends
            with the null class.
        num_classes: number of classes K, the null class not counted.
        vae_config: config of the AutoencoderKL of a latent model, or None.
        perception_blocks: paths of the backbone's blocks whose outputs the head reads.
        semantic_block: path of the block whose output is x_sem.
        pool_size: the head reads every feature map averaged to pool_size × pool_size.
        class_names: one name a class, for people.

    Raises:
        ValueError: for an unknown backbone class, and for a block that the backbone does not have.
    """

    @register_to_config
    def __init__(
        self,
        backbone_config: dict[str, Any],
        num_classes: int,
        vae_config: dict[str, Any] | None = None,
        perception_blocks: list[str] | None = None,
        semantic_block: str | None = None,
        pool_size: int = 2,
        class_names: list[str] | None = None,
    ) -> None:
        super().__init__()
        self.backbone = build_backbone(backbone_config)
        self.vae = None
        if vae_config is not None:
            self.vae = build_autoencoder(vae_config)
            _require_latent_channels(self.vae, self.backbone)
        names = block_names(self.backbone)
        perception_blocks = list(perception_blocks or names)
        semantic_block = semantic_block or names[len(names) // 2]
        for name in (*perception_blocks, semantic_block):
            if name not in names:
                wanted = f"among {', '.join(names)}"
                raise ValueError(
                    f"perception_blocks and semantic_block must be {wanted}, got {name!r}"
                )
        self.register_to_config(perception_blocks=perception_blocks, semantic_block=semantic_block)
        keep_outputs(self.backbone, self._kept_blocks)
        self.register_state_dict_post_hook(_with_plain_names)
        self.register_load_state_dict_pre_hook(_with_own_names)

        in_channels = self.backbone.config.in_channels
        out_channels = output_channels(self.backbone)
        semantic_channels = block_channels(self.backbone, semantic_block)
        widths = [block_channels(self.backbone, name) * pool_size**2 for name in perception_blocks]
        self.head = nn.Sequential(nn.LayerNorm(sum(widths)), nn.Linear(sum(widths), num_classes))
        # W(t) of o = o_base + W(t)·concat(x_t, x_sem), zero at the start: a 1×1 convolution, its
        # weights linear in the time embedding.
        self.mean_modulation = nn.Linear(
            _TIME_EMBEDDING, out_channels * (in_channels + semantic_channels)
        )
        hidden = nn.Linear(semantic_channels, semantic_channels)
        log_std_shift = nn.Linear(semantic_channels, 1)
        self.log_std_modulation = nn.Sequential(hidden, nn.SiLU(), log_std_shift)
        for layer in (self.mean_modulation, log_std_shift):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def from_backbone(
        cls,
        backbone: Backbone | str | Path,
        num_classes: int,
        vae: AutoencoderKL | str | Path | None = None,
        **kwargs: Any,
    ) -> GenRep:
        """Build a GenRep over a UNet2DModel or DiTTransformer2DModel.

        Args:
            backbone: the model (its weights are copied), or a directory that diffusers'
                `save_pretrained` wrote.
            num_classes: number of classes; a null class is appended where the backbone has none.
            vae: AutoencoderKL of a latent model, or its directory; other classes of VAEs are
                refused.
            kwargs: perception_blocks, semantic_block, pool_size, class_names.

        Raises:
            TypeError: for a VAE of another class.
            ValueError: for an unknown backbone class, another number of classes, an unknown block,
                a VAE directory of another class, a VAE of other latents than the backbone's, a
                Fourier time embedding (NaN at t = 0), and for weights that are not those of the
                configured network: keys missing or unexpected, other shapes.
            FileNotFoundError: where a directory holds no model.
            OSError: where a directory's weights cannot be read.
        """
        network = load_backbone(backbone) if isinstance(backbone, (str, Path)) else backbone
        autoencoder = load_autoencoder(vae) if isinstance(vae, (str, Path)) else vae
        if autoencoder is not None:
            check_autoencoder(autoencoder)
        for name, module in (("backbone", network), ("vae", autoencoder)):
            empty = set() if module is None else meta_tensors(module)
            if empty:
                without = named(sorted(empty))
                raise ValueError(f"{name} must have values for all weights, got none for {without}")
        config, state = with_null_class(network, num_classes)
        vae_config = None if autoencoder is None else dict(autoencoder.config)
        model = cls(config, num_classes, vae_config, **kwargs)
        model.backbone.load_state_dict(state)
        if autoencoder is not None:
            model.vae.load_state_dict(autoencoder.state_dict())
        return model

    @classmethod
    def from_pretrained(cls, path: str | Path, **kwargs: Any) -> GenRep:
        """Load a model from a directory that `save_pretrained` wrote, or from the hub.

        Weights are read through safetensors only. Arguments are those of diffusers'
        `ModelMixin.from_pretrained`.

        Raises:
            ValueError: for weights that are not those of the model, with the keys that are missing,
                unexpected or of another shape.
            OSError: where there are no weights, or none that can be read.
        """
        return load_complete(super().from_pretrained, path, **kwargs)

    # The variant by its name, which is how diffusers' pipelines find out that there may be one.
    def save_pretrained(
        self, path: str | Path, *, variant: str | None = None, **kwargs: Any
    ) -> None:
        """Write config.json and the weights, as safetensors.

        Arguments are those of diffusers' `ModelMixin.save_pretrained`.
        """
        if not kwargs.get("safe_serialization", True):
            raise ValueError(
                "safe_serialization must be True: weights are written as safetensors only"
            )
        super().save_pretrained(path, variant=variant, **kwargs)

    @property
    def null_class(self) -> int:
        """The label of the null class, which the perception branch sees in place of every label."""
        return self.config.num_classes

    @property
    def class_names(self) -> list[str]:
        """The name of each of the K classes: those that were saved, or "0" … "K − 1" without any.

        Raises:
            ValueError: where the saved names are not one a class.
        """
        num_classes = self.config.num_classes
        names = self.config.class_names
        if names is None:
            return [str(index) for index in range(num_classes)]
        if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) for name in names):
            raise ValueError(f"class_names must be a list of strings, got {names!r}")
        if len(names) != num_classes:
            raise ValueError(
                f"class_names must be one name a class, got {len(names)} for {num_classes} classes"
            )
        return list(names)

    @property
    def sample_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one latent."""
        config = self.backbone.config
        size = config.sample_size
        if size is None:
            raise ValueError("backbone: sample_size must be the side of its inputs, got None")
        height, width = (size, size) if isinstance(size, int) else size
        return config.in_channels, height, width

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image: `sample_shape` without a VAE."""
        if self.vae is None:
            return self.sample_shape
        scale = 2 ** (len(self.vae.config.block_out_channels) - 1)
        return self.vae.config.in_channels, *(side * scale for side in self.sample_shape[1:])

    def forward(
        self,
        x_t: torch.Tensor,
        timestep: torch.Tensor | int | float,
        class_labels: torch.Tensor,
        semantic: torch.Tensor | None = None,
        modulate: bool = True,
    ) -> GenRepOutput:
        """Denoise x_t under the given classes: o = o_base + W(t)·concat(x_t, x_sem).

        This is GenRep's semantic-driven generation.

        Args:
            x_t: noisy latents [B, C, H, W].
            timestep: a number or [B].
            class_labels: int64 [B] in [0, num_classes]; num_classes is the null class.
            semantic: x_sem [B, F, h, w]; None takes the network's own features, as at inference.
            modulate: False gives the plain denoiser o_base (the paper's rows without
                semantic-driven generation).

        Returns:
            GenRepOutput.
        """
        timesteps = self._timesteps(x_t, timestep)
        output, (features,) = run_backbone(
            self.backbone,
            x_t,
            timesteps,
            class_labels,
            [self.config.semantic_block],
            self._kept_blocks,
        )
        if not modulate:
            no_shift = output.new_zeros(len(output))
            return GenRepOutput(sample=output, log_std_shift=no_shift, features=features)
        semantic = _normalise(features if semantic is None else semantic)
        resized = F.interpolate(semantic, x_t.shape[-2:])
        inputs = torch.cat([x_t, resized], dim=1)  # [B, C + F, H, W]
        time = get_timestep_embedding(timesteps, _TIME_EMBEDDING).to(inputs.dtype)
        weight = self.mean_modulation(time)
        weight = weight.unflatten(1, (output.shape[1], inputs.shape[1]))  # [B, C', C + F]
        # Detached: the variational bound trains this network alone, not the features that it reads.
        shift = self.log_std_modulation(semantic.detach().mean((2, 3))).squeeze(1).clamp(-1, 1)
        return GenRepOutput(
            sample=output + torch.einsum("boc,bchw->bohw", weight, inputs),
            log_std_shift=shift,
            features=features,
        )

    def denoise(
        self, x_t: torch.Tensor, timestep: torch.Tensor | int | float, class_labels: torch.Tensor
    ) -> torch.Tensor:
        """Model output [B, C', H, W] as at inference; the `denoiser` that the estimators call."""
        return self(x_t, timestep, class_labels).sample

    def perceive(self, x: torch.Tensor) -> torch.Tensor:
        """Class logits [B, K] of clean latents x [B, C, H, W].

        They take one pass at t = 0 under the null class.
        """
        return self.head(self._pooled(self._clean_features(x, self.config.perception_blocks)))

    def semantic_features(self, x: torch.Tensor) -> torch.Tensor:
        """x_sem [B, F, h, w] of clean latents x [B, C, H, W].

        It is the semantic block's output at t = 0 under the null class.
        """
        return self._clean_features(x, [self.config.semantic_block])[0]

    @torch.no_grad()
    def encode(self, images: torch.Tensor) -> torch.Tensor:
        """Latents of images [B, C, H, W] in [-1, 1].

        The images themselves without a VAE. With one, the mode of its posterior as the backbone
        sees it: (z − shift_factor)·scaling_factor, or (z − latents_mean)·scaling_factor /
        latents_std, in the model's dtype. A VAE with force_upcast runs in float32 where it would
        run in float16.

        Raises:
            FloatingPointError: on the CPU, where the VAE gives latents that are not finite.
        """
        if self.vae is None:
            return images
        return encode(self.vae, images).to(self.dtype)

    @torch.no_grad()
    def decode(self, x: torch.Tensor) -> torch.Tensor:
        """Images in [-1, 1] of latents; the inverse of `encode`.

        Raises:
            FloatingPointError: on the CPU, where the VAE gives images that are not finite.
        """
        if self.vae is not None:
            x = decode(self.vae, x).to(self.dtype)
        return x.clamp(-1, 1)

    @torch.no_grad()
    def reset_null_class(self) -> None:
        """Set the null class to the mean of the others, its start in a backbone that had none."""
        for table in class_embeddings(self.backbone):
            table[-1] = table[:-1].mean(0)

    def frozen_copy(self) -> GenRep:
        """An independent copy without gradients, in eval mode; the frozen VAE is shared."""
        return copy.deepcopy(self, {id(self.vae): self.vae}).requires_grad_(False).eval()

    def trained_state(self) -> dict[str, torch.Tensor]:
        """The state dict without the frozen VAE."""
        state = self.state_dict().items()
        return {name: tensor for name, tensor in state if not name.startswith("vae.")}

    def alignment_groups(self) -> list[int | None]:
        """For each trained parameter the index of its attention block, or None outside of them."""
        groups: dict[int, int] = {}
        for index, block in enumerate(attention_blocks(self.backbone)):
            groups |= dict.fromkeys(map(id, block.parameters()), index)
        return [groups.get(id(p)) for p in self.parameters() if p.requires_grad]

    def _clean_features(self, x: torch.Tensor, blocks: list[str]) -> list[torch.Tensor]:
        labels = torch.full((len(x),), self.null_class, device=x.device)
        timesteps = self._timesteps(x, 0)
        return run_backbone(self.backbone, x, timesteps, labels, blocks, self._kept_blocks)[1]

    @property
    def _kept_blocks(self) -> tuple[str, ...]:
        """Blocks whose outputs some call asks for."""
        return (*self.config.perception_blocks, self.config.semantic_block)

    def _pooled(self, features: list[torch.Tensor]) -> torch.Tensor:
        size = self.config.pool_size
        pooled = [F.adaptive_avg_pool2d(feature_map, size).flatten(1) for feature_map in features]
        return torch.cat(pooled, dim=1)

    def _timesteps(self, x: torch.Tensor, timestep: torch.Tensor | int | float) -> torch.Tensor:
        return torch.as_tensor(timestep, device=x.device).expand(len(x))


def _with_plain_names(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Name tensors of a state dict as if no part of the model were compiled."""
    for own, plain in _compiled_names(model, prefix):
        if own in state:
            state[plain] = state.pop(own)


def _with_own_names(model: nn.Module, state: dict[str, Any], prefix: str, *_: Any) -> None:
    """Undo `_with_plain_names` in what a model with compiled parts loads."""
    for own, plain in _compiled_names(model, prefix):
        if plain in state:
            state[own] = state.pop(plain)


def _compiled_names(model: nn.Module, prefix: str) -> list[tuple[str, str]]:
    """Names of tensors in parts that torch.compile wrapped, with and without its mark."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    own = [name for name, _ in tensors if _COMPILED in name]
    return [(prefix + name, prefix + name.replace(_COMPILED, "")) for name in own]


def _require_latent_channels(vae: AutoencoderKL, backbone: Backbone) -> None:
    latent, own = vae.config.latent_channels, backbone.config.in_channels
    if latent != own:
        raise ValueError(
            f"vae: latent_channels must be the backbone's in_channels = {own}, got {latent}"
        )


def _normalise(features: torch.Tensor) -> torch.Tensor:
    # L_rep_align makes directions agree, not lengths: only the direction of a location's features
    # may enter the modulation.
    return F.normalize(features, dim=1) * features.shape[1] ** 0.5
