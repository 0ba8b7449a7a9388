"""What GenRep needs to know of each diffusers backbone.

How to add a null class, which blocks there are, and what their outputs look like.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable
from os import PathLike
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiTTransformer2DModel, UNet2DModel
from diffusers.models.attention_processor import Attention
from torch import nn

from ..coefficients.schedulers import scheduler_family
from ..files import read_json
from .weights import load_complete

Backbone: TypeAlias = UNet2DModel | DiTTransformer2DModel

BACKBONES: dict[str, type[Backbone]] = {
    "UNet2DModel": UNet2DModel,
    "DiTTransformer2DModel": DiTTransformer2DModel,
}

_CLASS_COUNT = {UNet2DModel: "num_class_embeds", DiTTransformer2DModel: "num_embeds_ada_norm"}


def load_backbone(path: str | Path) -> Backbone:
    """Load a backbone from a directory that diffusers' `save_pretrained` wrote.

    Raises:
        FileNotFoundError: without a config.json there.
        ValueError: for a class that is not one of `BACKBONES`, a damaged config.json, and weights
            that are not those of the backbone, with the keys that are missing, unexpected or of
            another shape.
        OSError: where there are no weights, or none that can be read.
    """
    config_path = require_saved("backbone", path, "config.json")
    config = read_json(config_path)
    if not isinstance(config, dict):
        found = type(config).__name__
        raise ValueError(f"backbone: {config_path} must hold a configuration, got {found}")
    return load_complete(backbone_class(config.get("_class_name")).from_pretrained, path)


def require_saved(argument: str, path: str | PathLike[str], file: str) -> Path:
    """Path of `file` in the directory `path`.

    Raises:
        FileNotFoundError: where there is none, and diffusers would ask the hub for a name like
            `path`.
    """
    found = Path(path) / file
    if not found.is_file():
        wanted = "a directory written by diffusers' save_pretrained"
        raise FileNotFoundError(f"{argument}: {found} does not exist; {wanted} is wanted")
    return found


def backbone_class(class_name: str | None) -> type[Backbone]:
    """Return the backbone class of that name, or raise ValueError with the names that exist."""
    if class_name not in BACKBONES:
        raise ValueError(f"backbone must be one of {', '.join(BACKBONES)}, got {class_name!r}")
    return BACKBONES[class_name]


def build_backbone(config: dict[str, Any]) -> Backbone:
    """Build a randomly initialised backbone from ``{"_class_name": ..., **config}``.

    Raises:
        ValueError: for another class than those of `BACKBONES`, and for a Fourier time embedding:
            perception looks at t = 0, which training and every chain meet, too; and for a DiT whose
            inputs are no squares of whole patches.
    """
    if config.get("time_embedding_type") == "fourier":
        raise ValueError(
            "backbone: time_embedding_type must be 'positional' or 'learned', got 'fourier', which "
            "takes the logarithm of t and divides by it: t = 0 gives NaN"
        )
    cls = backbone_class(config["_class_name"])
    if cls is DiTTransformer2DModel:
        _check_dit_size(config)
    backbone = cls.from_config({k: v for k, v in config.items() if not k.startswith("_")})
    if isinstance(backbone, DiTTransformer2DModel):
        for block in backbone.transformer_blocks:
            # In train mode DiT replaces labels by the null class at random. GenRep alone decides
            # which label a network sees.
            block.norm1.emb.class_embedder.dropout_prob = 0.0
    return backbone


def _check_dit_size(config: dict[str, Any]) -> None:
    """Refuse sizes of which diffusers' DiT would put the patches together in another order."""
    size, patch = config.get("sample_size", 32), config.get("patch_size", 2)
    if not isinstance(size, int) or size % patch:
        raise ValueError(
            "backbone: sample_size of a DiTTransformer2DModel must be one side of a square and a "
            f"multiple of its patch_size = {patch}, got {size}; a UNet2DModel takes rectangles"
        )


def with_null_class(
    backbone: Backbone, num_classes: int
) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Give `backbone` `num_classes` classes and a null class, the last row of its class embedding.

    A missing null row is initialised to the mean of the others. A UNet without a class embedding
    receives a zero one.

    Returns:
        The config and the state dict of the extended backbone; `backbone` itself is left as it is.

    Raises:
        ValueError: where the backbone was trained for another number of classes.
    """
    cls = backbone_class(type(backbone).__name__)
    public = {k: v for k, v in backbone.config.items() if not k.startswith("_")}
    config = {"_class_name": cls.__name__, **public}
    state = dict(backbone.state_dict())
    count_key = _CLASS_COUNT[cls]
    found = config[count_key]
    if cls is DiTTransformer2DModel:
        if found != num_classes:
            raise ValueError(
                f"num_classes must be the backbone's {count_key} = {found}, got {num_classes}"
            )
        # DiT's table already ends with the null class.
        return config, state
    config[count_key] = num_classes + 1
    if found is None:
        if config["class_embed_type"] is not None:
            raise ValueError(
                f"backbone: class_embed_type must be None, got {config['class_embed_type']!r}"
            )
        width = backbone.time_embedding.linear_2.out_features
        state["class_embedding.weight"] = torch.zeros(num_classes + 1, width)
    elif found == num_classes:
        weight = state["class_embedding.weight"]
        state["class_embedding.weight"] = torch.cat([weight, weight.mean(0, keepdim=True)])
    elif found != num_classes + 1:
        wanted = f"the backbone's {count_key} = {found} (or one less, with a null class)"
        raise ValueError(f"num_classes must be {wanted}, got {num_classes}")
    return config, state


def class_embeddings(backbone: Backbone) -> list[nn.Parameter]:
    """The parameters that hold one row a class, the null class last."""
    names = ("class_embedding.weight", "class_embedder.embedding_table.weight")
    return [parameter for name, parameter in backbone.named_parameters() if name.endswith(names)]


class _Output:
    """What one thread keeps of one block: its output, while `active`."""

    active = False
    value: torch.Tensor | None = None


class _Outputs(threading.local):
    def __init__(self) -> None:
        self.of_thread = _Output()


class _KeepOutput:
    """Forward hook of a block, which stays there.

    torch.compile sees hooks when it compiles and never again, so none may come and go between two
    calls. Threads share modules, and replicas share their hooks: each thread keeps its own output.
    """

    def __init__(self) -> None:
        self.outputs = _Outputs()

    def __call__(self, module: nn.Module, inputs: Any, output: Any) -> None:
        kept = self.outputs.of_thread
        if kept.active:
            kept.value = output[0] if isinstance(output, (tuple, list)) else output

    def __reduce__(self) -> tuple[type[_KeepOutput], tuple[()]]:
        # What threads keep is not copied, nor pickled.
        return _KeepOutput, ()


def keep_outputs(backbone: nn.Module, blocks: Iterable[str]) -> list[_Output]:
    """Where this thread finds the outputs of `blocks`; each gets its hook, once.

    Args:
        blocks: module paths inside the backbone.
    """
    return [_hook(get_block(backbone, name)).outputs.of_thread for name in blocks]


def _hook(block: nn.Module) -> _KeepOutput:
    for hook in block._forward_hooks.values():
        if isinstance(hook, _KeepOutput):
            return hook
    hook = _KeepOutput()
    block.register_forward_hook(hook)
    return hook


def get_block(backbone: nn.Module, name: str) -> nn.Module:
    """The block at a path, inside of what torch.compile made of it and of the backbone."""
    module = uncompiled(backbone)
    for part in name.split("."):
        module = uncompiled(getattr(module, part))
    return module


def uncompiled(module: Any) -> Any:
    """The module that torch.compile wrapped, or itself."""
    return getattr(module, "_orig_mod", module)


def run_backbone(
    backbone: Backbone,
    x: torch.Tensor,
    timesteps: torch.Tensor,
    labels: torch.Tensor,
    blocks: list[str],
    kept: Iterable[str] = (),
) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """Run `backbone` and capture the outputs of `blocks`.

    Args:
        x: [B, C, H, W].
        timesteps: [B].
        labels: [B] int64.
        blocks: module paths inside the backbone.
        kept: all blocks that any call asks for; a compiled backbone then has one graph for all.

    Returns:
        The raw output [B, C', H, W] and, in the order of `blocks`, feature maps [B, F, h, w].

    Raises:
        ValueError: for a DiT and inputs that are no squares of whole patches, which it would put
            together in another order.
        RuntimeError: for a backbone that was compiled, and ran, before it was given to GenRep.
    """
    plain = uncompiled(backbone)
    if isinstance(plain, DiTTransformer2DModel):
        _check_square(x, plain.config.patch_size)
    names = list(dict.fromkeys((*blocks, *kept)))
    outputs = dict(zip(names, keep_outputs(backbone, names), strict=True))
    for output in outputs.values():
        output.active = True
    try:
        sample = backbone(x, timesteps, class_labels=labels, return_dict=False)[0]
        values = [outputs[name].value for name in blocks]
    finally:
        for output in outputs.values():
            output.active = False
            output.value = None
    return sample, [_as_map(value) for value in values]


def _check_square(x: torch.Tensor, patch: int) -> None:
    height, width = x.shape[-2:]
    if height != width or height % patch:
        wanted = f"squares whose side is a multiple of {patch}"
        raise ValueError(f"x: a DiTTransformer2DModel takes {wanted}, got {height} × {width}")


def _as_map(features: torch.Tensor | None) -> torch.Tensor:
    if features is None:
        raise RuntimeError(
            "the backbone does not show the outputs of its blocks: it was compiled before GenRep "
            "had it; compile it afterwards"
        )
    if features.ndim == 4:
        return features
    # Tokens [B, h·w, F] of a square image.
    side = int(features.shape[1] ** 0.5)
    return features.transpose(1, 2).unflatten(2, (side, side))


def block_names(backbone: Backbone) -> list[str]:
    """Paths of the blocks whose outputs can serve as features, in the order in which they run."""
    if isinstance(backbone, DiTTransformer2DModel):
        return [f"transformer_blocks.{i}" for i in range(len(backbone.transformer_blocks))]
    middle = ["mid_block"] if backbone.mid_block is not None else []
    return middle + [f"up_blocks.{i}" for i in range(len(backbone.up_blocks))]


def block_channels(backbone: Backbone, name: str) -> int:
    """Number of channels of the feature map of one block."""
    if isinstance(backbone, DiTTransformer2DModel):
        return backbone.inner_dim
    return backbone.get_submodule(name).resnets[-1].out_channels


def output_channels(backbone: Backbone) -> int:
    """Number of channels C' of the model output, learned-variance channels included."""
    if isinstance(backbone, DiTTransformer2DModel):
        return backbone.out_channels
    return backbone.config.out_channels


def require_fitting(backbone: Backbone, scheduler: Any) -> None:
    """Check that reverse chains of `scheduler` can run `backbone`.

    Raises:
        TypeError: for another class than DDPM, DDIM and FlowMatchEulerDiscrete.
        ValueError: for a learned variance that the backbone does not predict, and for timesteps
            that its learned time embedding does not have.
    """
    family = scheduler_family(scheduler)
    channels, outputs = backbone.config.in_channels, output_channels(uncompiled(backbone))
    if scheduler.config.get("variance_type") == "learned_range" and outputs < 2 * channels:
        raise ValueError(
            f"scheduler has variance_type='learned_range', for which the backbone must have "
            f"{2 * channels} output channels, got {outputs}: set variance_type='fixed_small'"
        )
    if backbone.config.get("time_embedding_type") != "learned":
        return
    embedded = backbone.config.num_train_timesteps
    steps = scheduler.config.num_train_timesteps
    if family == "flow" or steps > embedded:
        found = "fractional ones" if family == "flow" else f"{steps}"
        raise ValueError(
            f"scheduler: the backbone's learned time embedding has {embedded} timesteps, "
            f"got {found} of {type(scheduler).__name__}"
        )


def attention_blocks(backbone: Backbone) -> list[nn.Module]:
    """The modules whose gradients are aligned: attention layers of a UNet, blocks of a DiT."""
    backbone = uncompiled(backbone)
    if isinstance(backbone, DiTTransformer2DModel):
        return list(backbone.transformer_blocks)
    return [module for module in backbone.modules() if isinstance(module, Attention)]
