"""GenRepPipeline: a trained GenRep and its noise scheduler, to classify and to generate images."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import torch
from diffusers import DiffusionPipeline
from diffusers.image_processor import VaeImageProcessor
from diffusers.pipelines.pipeline_utils import ImagePipelineOutput
from diffusers.utils import BaseOutput
from PIL import Image
from torch import nn

from ..checks import check_at_least, check_dense, check_in_range, check_not_negative
from ..data import image_to_tensor
from ..files import loading, read_configuration
from ..scoring.chains import Prediction, ReverseChain, inference_scheduler, initial_noise
from .autoencoder import (
    require_finite_images,
    require_finite_latents,
    require_finite_pixels,
    short_name,
)
from .backbones import require_fitting, require_saved
from .genrep import GenRep, GenRepOutput

Images: TypeAlias = Image.Image | Sequence[Image.Image] | torch.Tensor


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
            was trained with; `generate` refuses others.
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
        _check_configurations(Path(path))
        options = {key: kwargs[key] for key in ("torch_dtype", "dtype", "variant") if key in kwargs}
        folder = os.path.join(path, "model")
        with loading(f"path: {path}"):
            model = kwargs.pop("model", None) or GenRep.from_pretrained(folder, **options)
            return super().from_pretrained(path, model=model, **kwargs)

    @torch.no_grad()
    def __call__(self, images: Images, *, batch_size: int | None = None) -> PerceptionOutput:
        """Classify images.

        The model's modules are in eval mode meanwhile, and then in the modes that they were in.

        Args:
            images: a PIL image or a list of them, prepared as in training (turned upright, resized,
                centre-cropped), or a float tensor [B, C, H, W] in [-1, 1].
            batch_size: images that go through the network at a time; all where not given.

        Returns:
            PerceptionOutput with probabilities [B, K].

        Raises:
            TypeError: for tensors of integers.
            ValueError: for tensors of another shape, no image, pixels that are not finite, and a
                batch_size below one.
            FloatingPointError: for a VAE's latents, or logits, that are not finite.
        """
        if isinstance(images, Image.Image):
            images = [images]
        elif not isinstance(images, torch.Tensor):
            images = list(images)
            self._check_pictures(images)
        else:
            self._check_tensor(images)
        with eval_mode(self.model):
            logits = [
                self._logits(self._as_tensor(images[start:end]))
                for start, end in _batches(len(images), batch_size)
            ]
        joined = logits[0] if len(logits) == 1 else torch.cat(logits)
        return PerceptionOutput(probabilities=joined.softmax(1), logits=joined)

    @torch.no_grad()
    def generate(
        self,
        labels: Sequence[int] | Sequence[str] | torch.Tensor,
        *,
        num_inference_steps: int = 50,
        guidance_scale: float = 1.0,
        seed: int | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        chain_ids: Sequence[int] | torch.Tensor | None = None,
        batch_size: int | None = None,
        eta: float = 0.0,
        output_type: str = "pil",
    ) -> ImagePipelineOutput:
        """Generate one image a label by the scheduler's own reverse chain.

        The network's own features modulate the chain's mean and variance. The model's modules are
        in eval mode meanwhile, and then in the modes that they were in.

        Args:
            labels: ints or int64 tensor [N] in [0, K), or names among `GenRep.class_names`. An
                integer is always an index, a string always a name.
            num_inference_steps: length of the reverse chain.
            guidance_scale: s of classifier-free guidance against the null class (Ho & Salimans
                2022): null + s·(class − null) takes the place of the network's prediction. A
                learned variance, and the modulation of the standard deviation, are the class's
                own. 1 is no guidance, and one network evaluation a step instead of two.
            seed: of the counter-based noise, in [0, 2⁶⁴); 0 where neither it nor `generator` is
                given.
            generator: draws the seed, one number a call. A list of them, one a label, draws a seed
                an image: each image is then the one that a call with its label and generator alone
                gives, and they run one after the other.
            chain_ids: ints or int64 tensor [N] in [0, 2³²) that tell the images' noise apart;
                0 … N − 1 where not given, and 0 for each generator of a list. An image follows
                from its label, its id and the seed, whatever the batch.
            batch_size: images that go through the network at a time; all where not given.
            eta: η of DDIM, 0 to 1; for DDIM schedulers alone.
            output_type: "pil", or "pt" for a tensor [N, C, H, W] in [-1, 1].

        Returns:
            ImagePipelineOutput with `.images`.

        Raises:
            TypeError: for labels that are neither integers nor names, a generator that is none,
                numbers of other types, and a scheduler of another class.
            ValueError: for labels out of range, unknown and ambiguous names, no label, another
                number of ids or generators than labels, `seed` and `generator` together, a
                guidance_scale that is negative or not finite, fewer steps than one, another
                output_type, a scheduler that does not fit the backbone, and one with
                clip_sample=True (diffusers' default: set it to False).
            FloatingPointError: for images that are not finite.
        """
        if output_type not in ("pil", "pt"):
            raise ValueError(f"output_type must be 'pil' or 'pt', got {output_type!r}")
        check_at_least(1, num_inference_steps=num_inference_steps)
        check_not_negative(guidance_scale, "guidance_scale")
        labels = self._checked_labels(labels)
        batches = _batches(len(labels), batch_size)
        if isinstance(generator, Sequence):
            batches = _batches(len(labels), 1)
        chain_ids = _checked_ids(chain_ids, len(labels), alone=isinstance(generator, Sequence))
        require_fitting(self.model.backbone, self.scheduler)
        scheduler = inference_scheduler(self.scheduler, num_inference_steps)
        chain = ReverseChain.from_scheduler(scheduler, scheduler.timesteps, eta=eta)
        chain = chain.to(self.device)
        seeds = _seeds(seed, generator, len(labels))
        chain_ids = chain_ids.to(self.device)
        images = []
        total = len(chain) * len(batches)
        with eval_mode(self.model), self.progress_bar(total=total) as bar:

            def progress(timesteps: torch.Tensor) -> Iterator[torch.Tensor]:
                for timestep in timesteps:
                    yield timestep
                    bar.update()

            for start, end in batches:
                ids = chain_ids[start:end]
                noise = initial_noise(seeds[start], ids, self.model.sample_shape)
                x = chain.run(
                    noise.to(self.model.dtype),
                    self._predictor(labels[start:end], guidance_scale),
                    seed=seeds[start],
                    chain_ids=ids,
                    progress=progress,
                )
                decoded = self.model.decode(x)
                require_finite_images(self.model.vae, x, decoded)
                images.append(decoded)
        joined = images[0] if len(images) == 1 else torch.cat(images)
        return ImagePipelineOutput(images=to_pil(joined) if output_type == "pil" else joined)

    def _predictor(
        self, labels: torch.Tensor, guidance_scale: float
    ) -> Callable[[int, torch.Tensor, torch.Tensor], Prediction]:
        """What `ReverseChain.run` asks of the network for images of these labels."""

        def predict(row: int, timestep: torch.Tensor, x_t: torch.Tensor) -> Prediction:
            output = self._denoise(x_t, timestep, labels)
            std_scale = output.log_std_shift.exp()[:, None, None, None]
            return Prediction(output.sample, std_scale=std_scale)

        if guidance_scale == 1:
            return predict
        both = torch.cat([labels, torch.full_like(labels, self.model.null_class)])

        def predict_guided(row: int, timestep: torch.Tensor, x_t: torch.Tensor) -> Prediction:
            output = self._denoise(torch.cat([x_t, x_t]), timestep, both)
            sample, null = output.sample.chunk(2)
            channels = x_t.shape[1]
            null = null[:, :channels]
            guided = null + guidance_scale * (sample[:, :channels] - null)
            std_scale = output.log_std_shift[: len(labels)].exp()[:, None, None, None]
            return Prediction(torch.cat([guided, sample[:, channels:]], 1), std_scale=std_scale)

        return predict_guided

    def _denoise(
        self, x_t: torch.Tensor, timestep: torch.Tensor, labels: torch.Tensor
    ) -> GenRepOutput:
        """The model's output, whose values are looked at where that waits for no device."""
        output = self.model(x_t, timestep, labels)
        shift = output.log_std_shift
        if shift.device.type == "cpu" and not (_finite(shift) and _finite(output.sample)):
            dtype = short_name(output.sample.dtype)
            raise FloatingPointError(
                f"the network's output in {dtype} is not finite at timestep {timestep.item():g}"
            )
        return output

    def _logits(self, images: torch.Tensor) -> torch.Tensor:
        """Logits [B, K] of images, which waits for the device to tell whether they are finite."""
        latents = self.model.encode(images)
        logits = self.model.perceive(latents)
        if not logits.isfinite().all():
            require_finite_pixels(images)
            if self.model.vae is not None:
                require_finite_latents(self.model.vae, images, latents)
            dtype = short_name(self.model.dtype)
            raise FloatingPointError(f"the model's logits in {dtype} are not finite")
        return logits

    def _checked_labels(self, labels: Sequence[int] | Sequence[str] | torch.Tensor) -> torch.Tensor:
        if isinstance(labels, (list, tuple)) and labels and isinstance(labels[0], str):
            labels = [self._class_of(name) for name in labels]
        try:
            labels = torch.as_tensor(labels)
        except (TypeError, ValueError, RuntimeError) as error:
            wanted = "labels must be class indices, or names of classes"
            raise TypeError(f"{wanted}, got {labels!r}") from error
        _check_values(labels, "labels")
        num_classes = self.model.config.num_classes
        if labels.ndim != 1 or len(labels) == 0:
            found = f"shape {tuple(labels.shape)}"
            raise ValueError(f"labels must be a non-empty list of class indices, got {found}")
        if labels.is_floating_point() or labels.is_complex() or labels.dtype == torch.bool:
            raise TypeError(f"labels must be integers, got {labels.dtype}")
        if labels.min() < 0 or labels.max() >= num_classes:
            raise ValueError(f"labels must be in [0, {num_classes}), got {labels.tolist()}")
        return labels.to(self.device, torch.int64)

    def _class_of(self, name: Any) -> int:
        if not isinstance(name, str):
            raise TypeError(f"labels must be all integers or all names, got {name!r} among names")
        places = [index for index, own in enumerate(self.model.class_names) if own == name]
        if len(places) != 1:
            found = "is no class" if not places else f"names {len(places)} classes, {places}"
            raise ValueError(f"labels must be names of one class each: {name!r} {found}")
        return places[0]

    def _check_tensor(self, images: torch.Tensor) -> None:
        _check_values(images, "images")
        channels, height, width = self.model.image_shape
        if not images.is_floating_point():
            raise TypeError(
                f"images must be a floating-point tensor in [-1, 1], got {images.dtype}"
            )
        if images.ndim != 4 or images.shape[1:] != (channels, height, width):
            wanted = f"[B, {channels}, {height}, {width}]"
            raise ValueError(f"images must be {wanted}, got {list(images.shape)}")
        if len(images) == 0:
            raise ValueError("images must hold at least one image, got none")

    def _check_pictures(self, images: list[Any]) -> None:
        if not images:
            raise ValueError("images must hold at least one image, got none")
        if not all(isinstance(image, Image.Image) for image in images):
            found = ", ".join(sorted({type(image).__name__ for image in images}))
            raise TypeError(f"images must be PIL images or one tensor, got {found}")

    def _as_tensor(self, images: list[Image.Image] | torch.Tensor) -> torch.Tensor:
        """Images [B, C, H, W] on the model's device, in its dtype; a VAE takes them in any."""
        if not isinstance(images, torch.Tensor):
            channels, *size = self.model.image_shape
            mode = "L" if channels == 1 else "RGB"
            images = torch.stack([image_to_tensor(image, tuple(size), mode) for image in images])
        dtype = self.model.dtype if self.model.vae is None else images.dtype
        return images.to(self.device, dtype)


@contextlib.contextmanager
def eval_mode(model: nn.Module) -> Iterator[None]:
    """Put every module into eval mode until the block ends, however it ends."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _finite(x: torch.Tensor) -> bool:
    return bool(x.isfinite().all())


def _batches(length: int, batch_size: int | None) -> list[tuple[int, int]]:
    """Beginning and end of each batch."""
    if batch_size is None:
        return [(0, length)]
    check_at_least(1, batch_size=batch_size)
    return [(start, min(start + batch_size, length)) for start in range(0, length, batch_size)]


def _checked_ids(
    chain_ids: Sequence[int] | torch.Tensor | None, length: int, *, alone: bool
) -> torch.Tensor:
    if chain_ids is None:
        return torch.zeros(length, dtype=torch.int64) if alone else torch.arange(length)
    ids = torch.as_tensor(chain_ids)
    if ids.shape != (length,):
        found = f"shape {tuple(ids.shape)} for {length} labels"
        raise ValueError(f"chain_ids must be one id a label, got {found}")
    return ids


def _seeds(
    seed: int | None,
    generator: torch.Generator | Sequence[torch.Generator] | None,
    length: int,
) -> list[int]:
    """The seed of each image's noise."""
    if generator is None:
        seed = 0 if seed is None else seed
        check_in_range(seed, "seed", 2**64, "2**64")
        return [seed] * length
    if seed is not None:
        raise ValueError(f"seed and generator both decide the noise: give one, got seed {seed}")
    if isinstance(generator, torch.Generator):
        return [_drawn_seed(generator)] * length
    if not isinstance(generator, Sequence) or not all(
        isinstance(one, torch.Generator) for one in generator
    ):
        wanted = "generator must be a torch.Generator, or a list of them"
        raise TypeError(f"{wanted}, got {type(generator).__name__}")
    if len(generator) != length:
        raise ValueError(
            f"generator must be one generator, or one a label: got {len(generator)} for "
            f"{length} labels"
        )
    return [_drawn_seed(one) for one in generator]


def _drawn_seed(generator: torch.Generator) -> int:
    """The next 64 bits of a generator."""
    halves = torch.randint(2**32, (2,), generator=generator, device=generator.device).tolist()
    return halves[0] * 2**32 + halves[1]


def _check_values(tensor: torch.Tensor, name: str) -> None:
    """Check that a tensor is dense and has values, which it has not on the meta device."""
    check_dense(tensor, name)
    if tensor.is_meta:
        raise ValueError(f"{name} must have values, got a tensor on the meta device")


def _check_configurations(folder: Path) -> None:
    """Refuse damaged configurations, for which diffusers would look on the hub.

    Raises ValueError with the file in it.
    """
    for name in ("model_index.json", "scheduler/scheduler_config.json", "model/config.json"):
        path = folder / name
        config = read_configuration(path) if path.is_file() else {}
        for option in ("backbone_config", "vae_config"):
            network = config.get(option)
            if network is not None and not isinstance(network, dict):
                raise ValueError(f"{path} is damaged: {option} must be an object, got {network!r}")


def to_pil(images: torch.Tensor) -> list[Image.Image]:
    """PIL images of a float tensor [N, C, H, W] in [-1, 1], C = 1 or 3."""
    return VaeImageProcessor.numpy_to_pil(VaeImageProcessor.pt_to_numpy(images / 2 + 0.5))
