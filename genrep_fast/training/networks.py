"""The networks and the noise schedule that a training configuration asks for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DDPMScheduler, DiTTransformer2DModel, UNet2DModel

from ..data import DataSplits
from ..files import loading, read_configuration
from ..models import GenRep
from ..models.backbones import require_fitting, require_saved
from .config import TrainingConfig

# Schedulers of diffusers that add noise as DDPMScheduler does. They sample otherwise, and pipelines
# are saved with any of them: Stable Diffusion with PNDM, DiT with DDIM.
_SAME_NOISE = (
    "DDPMScheduler",
    "DDIMScheduler",
    "PNDMScheduler",
    "EulerDiscreteScheduler",
    "EulerAncestralDiscreteScheduler",
    "HeunDiscreteScheduler",
    "KDPM2DiscreteScheduler",
    "KDPM2AncestralDiscreteScheduler",
    "DPMSolverMultistepScheduler",
    "DPMSolverSinglestepScheduler",
    "DEISMultistepScheduler",
    "UniPCMultistepScheduler",
)
# What DDPMScheduler takes over of them.
_SHARED = (
    "num_train_timesteps",
    "beta_start",
    "beta_end",
    "beta_schedule",
    "trained_betas",
    "prediction_type",
    "rescale_betas_zero_snr",
    "timestep_spacing",
    "steps_offset",
    "variance_type",
)
_ALLOWED = {
    "prediction_type": ("epsilon", "v_prediction", "sample"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", "learned_range"),
    "timestep_spacing": ("leading", "trailing", "linspace"),
}
# What makes another chain of the same betas, or one that no table can express.
_REFUSED = {"thresholding": True, "use_flow_sigmas": True, "timestep_type": "continuous"}
# Some schedulers keep the last ᾱ of a zero terminal SNR at 2⁻²⁴ and not at 0.
_SAME_LEVEL = 2.0**-23


# Widths of the small UNet over data of which many images have to be scored, a level each.
_WIDTHS = {
    "digit-strings:2": (16, 32, 64),
    "digit-strings:3": (16, 32, 64),
    "mnist5k": (16, 32, 64),
}
_DEFAULT_WIDTHS = (32, 64)


def build_scheduler(config: TrainingConfig) -> DDPMScheduler:
    """The noise schedule that a pretrained backbone came with, else the linear one of DDPM.

    DDPM is that of Ho et al. 2020. A folder of another scheduler that adds noise as DDPMScheduler
    does gives a DDPMScheduler of its betas and prediction type; clip_sample is always False.

    Raises:
        FileNotFoundError: where the folder has no scheduler_config.json.
        ValueError: for a damaged scheduler_config.json, a class whose noise is not DDPM's, and
            options that training does not have; the message names the file.
    """
    if config.scheduler is None:
        return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)
    path = require_saved("scheduler", config.scheduler, DDPMScheduler.config_name)
    saved = read_configuration(path)
    name = saved.get("_class_name")
    if name not in _SAME_NOISE:
        raise ValueError(
            f"scheduler: {path} is of a {name!r}; training adds noise as DDPMScheduler does, so "
            f"one of {', '.join(_SAME_NOISE)} is wanted"
        )
    for option, value in _REFUSED.items():
        if saved.get(option) == value:
            raise ValueError(f"scheduler: {path} has {option}={value!r}, which training does not")
    # Its own class knows the defaults of what the file leaves out.
    source = _from_config(path, getattr(diffusers, name), saved)
    given = {option: source.config.get(option) for option in _SHARED}
    options = {option: value for option, value in given.items() if value is not None}
    scheduler = _from_config(path, DDPMScheduler, {**options, "clip_sample": False})
    for option, allowed in _ALLOWED.items():
        found = scheduler.config[option]
        if found not in allowed:
            wanted = f"one of {', '.join(allowed)}"
            raise ValueError(f"scheduler: {option} in {path} must be {wanted}, got {found!r}")
    _check_levels(path, source, scheduler)
    return scheduler


def _from_config(path: Path, scheduler_class: Any, options: dict[str, Any]) -> Any:
    try:
        return scheduler_class.from_config(options)
    except (TypeError, ValueError, RuntimeError, IndexError, ArithmeticError) as error:
        raise ValueError(
            f"scheduler: {path} has no noise schedule that diffusers can build: {error}"
        ) from error


def _check_levels(path: Path, source: Any, scheduler: DDPMScheduler) -> None:
    """Refuse a schedule that is none, and one that DDPMScheduler makes of other betas."""
    levels, betas = scheduler.alphas_cumprod, scheduler.betas
    steps = scheduler.config.num_train_timesteps
    if len(levels) != steps or steps < 2 or not bool(((betas >= 0) & (betas <= 1)).all()):
        raise ValueError(
            f"scheduler: {path} must have {steps} noise levels, two at least, of betas from 0 to 1"
        )
    own = source.alphas_cumprod
    if own.shape != levels.shape or not torch.allclose(own, levels, rtol=1e-5, atol=_SAME_LEVEL):
        name = type(source).__name__
        raise ValueError(f"scheduler: {path} has noise levels of {name} that DDPMScheduler has not")


def build_model(config: TrainingConfig, splits: DataSplits) -> GenRep:
    """GenRep over the configured backbone, or over a small UNet of the images' size.

    Raises:
        ValueError: where the images, the VAE or the scheduler do not fit.
    """
    if config.backbone is None and config.vae is not None:
        raise ValueError("vae: a latent model needs a backbone, got none")
    backbone: UNet2DModel | str
    if config.backbone is None:
        backbone = _small_unet(splits.image_shape, _WIDTHS.get(config.data, _DEFAULT_WIDTHS))
    else:
        backbone = config.backbone
    for argument, folder in (("backbone", config.backbone), ("vae", config.vae)):
        if folder is not None:
            read_configuration(require_saved(argument, folder, "config.json"))
    with loading(f"backbone: {config.backbone or 'a small UNet'}"):
        model = GenRep.from_backbone(
            backbone, splits.num_classes, vae=config.vae, class_names=splits.class_names
        )
    require_fitting(model.backbone, build_scheduler(config))
    image, _ = splits.train[0]
    latent = model.encode(image[None]).shape[1:]
    if tuple(latent) != model.sample_shape:
        raise ValueError(
            f"data: images {list(image.shape)} give inputs {list(latent)}, "
            f"the backbone wants {list(model.sample_shape)}; {_remedy(model, tuple(latent))}"
        )
    return model


def _remedy(model: GenRep, latent: tuple[int, ...]) -> str:
    """What helps where images and backbone do not fit."""
    _, height, width = latent
    if height * model.sample_shape[2] == width * model.sample_shape[1]:
        return "see image_size"
    wanted = f"a UNet2DModel with sample_size=({height}, {width}) is wanted"
    if isinstance(model.backbone, DiTTransformer2DModel):
        return f"a DiTTransformer2DModel takes squares alone, so {wanted}"
    return wanted


def _small_unet(image_shape: tuple[int, int, int], widths: tuple[int, ...]) -> UNet2DModel:
    """A UNet of a level a width, each half as large as the one before, with attention in the last.

    Raises:
        ValueError: for images whose sides cannot be halved so often.
    """
    channels, height, width = image_shape
    halvings = len(widths) - 1
    if height % 2**halvings or width % 2**halvings:
        wanted = "even" if halvings == 1 else f"a multiple of {2**halvings}"
        raise ValueError(f"image_size must be {wanted}, got {height} × {width}")
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=widths,
        down_block_types=(*["DownBlock2D"] * halvings, "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", *["UpBlock2D"] * halvings),
        norm_num_groups=8,
        attention_head_dim=16,
    )
