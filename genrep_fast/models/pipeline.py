"""GenRepPipeline: a trained GenRep and its noise scheduler, to classify and to generate images."""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import BaseOutput
from PIL import Image

from ..data import image_to_tensor
from ..scoring.chains import Prediction, ReverseChain, inference_scheduler, initial_noise
from .backbones import require_saved
from .genrep import GenRep


@dataclass
class PerceptionOutput(BaseOutput):
    """What the perception branch says of a batch of images.

    Attributes:
        probabilities: class probabilities [B, K].
        logits: [B, K].
    """

    probabilities: torch.Tensor
    logits: torch.Tensor


class GenRepPipeline(DiffusionPipeline):
    """Classify images with `pipeline(images)` and generate them with `pipeline.generate(labels)`.

    Args:
        model: GenRep.
        scheduler: DDPMScheduler, DDIMScheduler or FlowMatchEulerDiscreteScheduler that the model
            was trained with.
    """

    model_cpu_offload_seq = "model"

    def __init__(self, model: GenRep, scheduler: Any) -> None:
        super().__init__()
        self.register_modules(model=model, scheduler=scheduler)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], **kwargs: Any) -> GenRepPipeline:
        """Load a pipeline from a directory that `save_pretrained` wrote.

        Weights are read through safetensors only.

        Raises:
            FileNotFoundError: where the directory holds no pipeline.
            ValueError, OSError: as `GenRep.from_pretrained`.
        """
        require_saved("path", path, "model_index.json")
        options = {key: kwargs[key] for key in ("torch_dtype", "dtype", "variant") if key in kwargs}
        folder = os.path.join(path, "model")
        model = kwargs.pop("model", None) or GenRep.from_pretrained(folder, **options)
        return super().from_pretrained(path, model=model, **kwargs)

    @torch.no_grad()
    def __call__(
        self, images: Image.Image | Sequence[Image.Image] | torch.Tensor
    ) -> PerceptionOutput:
        """Classify images.

        Args:
            images: a PIL image or a list of them, prepared as in training (turned upright, resized,
                centre-cropped), or a float tensor [B, C, H, W] in [-1, 1].

        Returns:
            PerceptionOutput with probabilities [B, K].

        Raises:
            TypeError: for tensors of integers.
            ValueError: for tensors of another shape, and for no image.
        """
        self.model.eval()
        logits = self.model.perceive(self.model.encode(self._as_tensor(images)))
        return PerceptionOutput(probabilities=logits.softmax(1), logits=logits)

    @torch.no_grad()
    def generate(
        self,
        labels: Sequence[int] | torch.Tensor,
        *,
        num_inference_steps: int = 50,
        seed: int = 0,
        chain_ids: Sequence[int] | torch.Tensor | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Generate one image a label by the scheduler's own reverse chain.

        The network's own features modulate the chain's mean and variance.

        Args:
            labels: ints or int64 tensor [N] in [0, K).
            num_inference_steps: length of the reverse chain.
            seed: of the counter-based noise.
            chain_ids: ints or int64 tensor [N] in [0, 2³²) that tell the images' noise apart;
                0 … N − 1 where not given. An image follows from its label, its id and the seed,
                whatever the batch.
            eta: η of DDIM, 0 to 1; for DDIM schedulers alone.
            output_type: "pil", or "pt" for a tensor [N, C, H, W] in [-1, 1].

        Returns:
            ImagePipelineOutput with `.images`.

        Raises:
            TypeError: for labels that are not integers.
            ValueError: for labels out of range, no label, another number of ids than labels, fewer
                steps than one, another output_type, and a scheduler with clip_sample=True
                (diffusers' default: set it to False).
        """
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type must be 'pil' or 'pt', got {output_type!r}")
        if num_inference_steps < 1:
            raise ValueError(f"num_inference_steps must be at least 1, got {num_inference_steps}")
        labels = self._checked_labels(labels)
        self.model.eval()
        scheduler = inference_scheduler(self.scheduler, num_inference_steps)
        chain = ReverseChain.from_scheduler(scheduler, scheduler.timesteps, eta=eta)
        chain_ids = torch.arange(len(labels)) if chain_ids is None else torch.as_tensor(chain_ids)
        if chain_ids.shape != labels.shape:
            found = f"shape {tuple(chain_ids.shape)} for {len(labels)} labels"
            raise ValueError(f"chain_ids must be one id a label, got {found}")
        chain_ids = chain_ids.to(self.device)

        def predict(row: int, timestep: torch.Tensor, x_t: torch.Tensor) -> Prediction:
            output = self.model(x_t, timestep, labels)
            std_scale = output.log_std_shift.exp()[:, None, None, None]
            return Prediction(output.sample, std_scale=std_scale)

        x = chain.to(self.device).run(
            initial_noise(seed, chain_ids, self.model.sample_shape).to(self.model.dtype),
            predict,
            seed=seed,
            chain_ids=chain_ids,
            progress=self.progress_bar,
        )
        images = self.model.decode(x)
        if output_type == "pil":
            images = to_pil(images)
        return ImagePipelineOutput(images=images)

    def _checked_labels(self, labels: Sequence[int] | torch.Tensor) -> torch.Tensor:
        labels = torch.as_tensor(labels)
        num_classes = self.model.config.num_classes
        if labels.ndim != 1 or len(labels) == 0:
            found = f"shape {tuple(labels.shape)}"
            raise ValueError(f"labels must be a non-empty list of class indices, got {found}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"labels must be in [0, {num_classes}), got {labels.tolist()}")
        return labels.to(self.device, torch.int64)

    def _as_tensor(
        self, images: Image.Image | Sequence[Image.Image] | torch.Tensor
    ) -> torch.Tensor:
        channels, height, width = self.model.image_shape
        if not isinstance(images, torch.Tensor):
            images = [images] if isinstance(images, Image.Image) else list(images)
            images = self._stacked(images)
        if not images.is_floating_point():
            raise TypeError(
                f"images must be a floating-point tensor in [-1, 1], got {images.dtype}"
            )
        if images.ndim != 4 or images.shape[1:] != (channels, height, width):
            wanted = f"[B, {channels}, {height}, {width}]"
            raise ValueError(f"images must be {wanted}, got {list(images.shape)}")
        return images.to(self.device, self.model.dtype)

    def _stacked(self, images: list[Image.Image]) -> torch.Tensor:
        channels, height, width = self.model.image_shape
        if not images:
            raise ValueError("images must hold at least one image, got none")
        if not all(isinstance(image, Image.Image) for image in images):
            found = ", ".join(sorted({type(image).__name__ for image in images}))
            raise TypeError(f"images must be PIL images or one tensor, got {found}")
        mode = "L" if channels == 1 else "RGB"
        return torch.stack([image_to_tensor(image, (height, width), mode) for image in images])


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """PIL images of a float tensor [N, C, H, W] in [-1, 1], C = 1 or 3."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images / 2 + 0.5))
