"""The networks and the noise schedule that a training configuration asks for."""

from __future__ import annotations

from diffusers import DDPMScheduler, UNet2DModel

from ..data import DataSplits
from ..models import GenRep
from ..models.backbones import require_saved
from .config import TrainingConfig


def build_scheduler(config: TrainingConfig) -> DDPMScheduler:
    """The noise schedule that a pretrained backbone came with, else the linear one of DDPM.

    DDPM is that of Ho et al. 2020.
    """
    if config.scheduler is not None:
        require_saved("scheduler", config.scheduler, DDPMScheduler.config_name)
        return DDPMScheduler.from_pretrained(config.scheduler, clip_sample=False)
    return DDPMScheduler(num_train_timesteps=1000, beta_schedule="linear", clip_sample=False)


def build_model(config: TrainingConfig, splits: DataSplits) -> GenRep:
    """GenRep over the configured backbone, or over a small UNet of the images' size.

    Raises:
        ValueError: where the images do not fit.
    """
    if config.backbone is None and config.vae is not None:
        raise ValueError("vae: a latent model needs a backbone, got none")
    backbone = _small_unet(*splits.image_shape) if config.backbone is None else config.backbone
    model = GenRep.from_backbone(
        backbone, splits.num_classes, vae=config.vae, class_names=splits.class_names
    )
    image, _ = splits.train[0]
    latent = model.encode(image[None]).shape[1:]
    if tuple(latent) != model.sample_shape:
        raise ValueError(
            f"data: images {list(image.shape)} give inputs {list(latent)}, "
            f"the backbone wants {list(model.sample_shape)}; see image_size"
        )
    return model


def _small_unet(channels: int, height: int, width: int) -> UNet2DModel:
    if height % 2 or width % 2:
        raise ValueError(f"image_size must be even, got {height} × {width}")
    return UNet2DModel(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        layers_per_block=1,
        block_out_channels=(32, 64),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
        attention_head_dim=16,
    )
