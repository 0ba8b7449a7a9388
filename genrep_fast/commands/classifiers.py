"""What `genrep classify` and `genrep calibrate` share: classifiers of folders, images of paths."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from ..checks import check_choice
from ..files import loading, read_json
from .prompts import read_prompts

if TYPE_CHECKING:
    from ..models import GenRepPipeline
    from ..scoring.classifier.diffusion_classifier import DiffusionClassifier

# Libraries whose classes a pipeline's folder may name; a class of another one could be anything.
_LIBRARIES = ("diffusers", "transformers")
_DTYPES = ("float32", "bfloat16", "float16")
# Images that are read together.
_READ = 16


class Source(NamedTuple):
    """A classifier and what its images and classes are.

    Attributes:
        classifier: that compares denoising errors.
        class_names: one a class.
        image_shape: (C, H, W) of its images in pixels.
        channels: of what the denoiser gets, latents or pixels.
        device: where it runs.
        pipeline: of a checkpoint, whose head classifies; None for a pipeline of diffusers.
    """

    classifier: DiffusionClassifier
    class_names: list[str]
    image_shape: tuple[int, int, int]
    channels: int
    device: torch.device
    pipeline: GenRepPipeline | None


def source_of(
    checkpoint: str | None,
    pipeline: str | None,
    prompts: str | None,
    batch_size: int,
    device: str | None,
    dtype: str | None,
    pads: bool = False,
) -> Source:
    """The classifier of a checkpoint or of a pipeline with prompts.

    Args:
        checkpoint, pipeline, prompts: folders and a file, as of `genrep classify`.
        batch_size: of the denoiser.
        device, dtype: words, or None.
        pads: whether batches have one size, so that an interrupted run ends with the same bits.

    Raises:
        ValueError: for arguments that do not go together.
        FileNotFoundError, OSError: where something is missing or damaged; the message names it.
    """
    if (checkpoint is None) == (pipeline is None):
        both = "both" if checkpoint is not None else "neither"
        raise ValueError(f"checkpoint or pipeline must be given, got {both}")
    if (pipeline is None) != (prompts is None):
        raise ValueError("pipeline and prompts must be given together")
    if dtype is not None:
        if pipeline is None:
            raise ValueError("dtype is that of a pipeline; a checkpoint keeps its own")
        check_choice(dtype, "dtype", _DTYPES)
    try:
        place = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device: {device!r} cannot be used ({error})") from error
    pad_to = batch_size if pads else None
    if checkpoint is not None:
        return _of_checkpoint(checkpoint, place, batch_size, pad_to)
    assert pipeline is not None and prompts is not None
    named = read_prompts(prompts)
    loaded = load_diffusers_pipeline(pipeline, dtype)
    return _of_pipeline(loaded.to(place), named, place, batch_size, pad_to)


def calibrated(source: Source, path: str) -> None:
    """Give the classifier the calibration of a folder that `genrep calibrate` wrote.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is damaged, or of another classifier.
    """
    from ..scoring.classifier.description import described, differences
    from ..scoring.classifier.file import read_classifier

    if not (Path(path) / "classifier.json").is_file():
        raise FileNotFoundError(
            f"calibration: {path} holds no classifier.json; `genrep calibrate` writes one"
        )
    saved = read_classifier(path)
    prompts = None if saved.pipeline is None else saved.pipeline.prompts.classes
    if prompts != source.classifier.prompts:
        raise ValueError(f"calibration: {path} is of another denoiser, or of other prompts")
    if saved.calibration is None:
        raise ValueError(f"calibration: {path} holds a classifier that was not calibrated")
    configs = (
        {"class": type(scheduler).__name__, **scheduler.config}
        for scheduler in (saved.scheduler, source.classifier.scheduler)
    )
    former, now = (
        {key: described(value) for key, value in config.items() if key[0] != "_"}
        for config in configs
    )
    found = list(differences(former, now, "scheduler"))
    if found:
        raise ValueError(f"calibration: {path} is of another denoiser: {'; '.join(found[:3])}")
    try:
        source.classifier.calibration = saved.calibration
    except ValueError as error:
        raise ValueError(f"calibration: {path} is of another denoiser: {error}") from error


def candidates_of(path: str, source: Source) -> Callable[[torch.Tensor], torch.Tensor]:
    """The head of a checkpoint, as a scorer of the classifier's images.

    Raises:
        FileNotFoundError, ValueError, OSError: as `pictures.load_pipeline`; also for other classes
            than the classifier's, and for a head that looks at something else.
    """
    from .. import pictures
    from ..data import check_class_names

    model = pictures.load_pipeline(path).model.eval()
    if model.config.class_names is None:
        names = [str(index) for index in range(len(source.class_names))]
        check_class_names(model.class_names, names, f"candidates: {path}")
    else:
        check_class_names(model.class_names, source.class_names, f"candidates: {path}")
    channels = model.sample_shape[0]
    if channels != source.channels:
        raise ValueError(
            f"candidates: {path} must look at what the denoiser gets, pixels or latents of "
            f"{source.channels} channels, got a model of {channels}"
        )
    return model.to(source.device).perceive


class Pictures(Dataset[dict[str, Any]]):
    """Image files, prepared for a model.

    Args:
        images: files, folders and patterns.
        image_shape: (C, H, W) to which they are resized and cropped.
        class_names: by which their folders are called, for labels; None: there are no labels.

    Attributes:
        paths: of the files.
        labels: one an image, or None.

    Raises:
        ValueError: as `pictures.image_paths` and `pictures.folder_labels`.
    """

    def __init__(
        self,
        images: Sequence[str],
        image_shape: tuple[int, int, int],
        class_names: Sequence[str] | None,
    ) -> None:
        from ..pictures import folder_labels, image_paths

        self.paths = image_paths(images)
        self.labels = None if class_names is None else folder_labels(self.paths, class_names)
        self._shape = image_shape
        # Of the images that were read.
        self._seen: list[float] = []

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, Any]:
        from ..pictures import prepared

        if index >= len(self):
            raise IndexError(index)
        image = prepared(self.paths[index], self._shape)
        self._seen.append(image.seen)
        item = {"images": image.pixels, "names": self.paths[index]}
        return item if self.labels is None else {**item, "labels": self.labels[index]}

    def loader(self) -> DataLoader:
        """Batches in order, read as they are needed."""
        return self.batches(_READ)

    def batches(self, batch_size: int) -> DataLoader:
        """Batches of so many images in order, with names and labels."""
        return DataLoader(self, batch_size=batch_size)

    def cropping(self) -> str | None:
        """A sentence on images that were read, of which the model sees little, or None."""
        from ..pictures import cropping

        return cropping(self._seen, self.paths[: len(self._seen)], self._shape)


def load_diffusers_pipeline(folder: str, dtype: str | None) -> Any:
    """The pipeline of diffusers in a folder; no code in it is run, and no pickle is read.

    Raises:
        FileNotFoundError: where there is none.
        ValueError, OSError: for a pipeline, or a part of one, whose class is in no library that is
            known, for weights that are not in safetensors, and for damaged files.
    """
    import diffusers

    index = Path(folder) / "model_index.json"
    if not index.is_file():
        raise FileNotFoundError(f"pipeline: {folder} holds no pipeline (no model_index.json)")
    parts = read_json(index)
    if not isinstance(parts, dict):
        raise ValueError(f"pipeline: {index} is damaged: it holds no object")
    _check_parts(folder, parts)
    # The name that diffusers below 1.0 have for it; late ones of them warn of it.
    name = "torch_dtype" if diffusers.__version__.startswith("0.") else "dtype"
    options: dict[str, Any] = {name: getattr(torch, dtype or "float32")}
    if "safety_checker" in parts:
        # It looks at what is generated.
        options.update(safety_checker=None, requires_safety_checker=False)
    with loading(f"pipeline: {folder}"), _quiet():
        return diffusers.DiffusionPipeline.from_pretrained(
            folder, local_files_only=True, use_safetensors=True, **options
        )


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Nothing on standard error but the one line of what is raised."""
    from diffusers.utils import logging

    loggers = [logging]
    # Of pipelines without text encoders it is not needed.
    with contextlib.suppress(ImportError):
        from transformers.utils import logging as of_transformers

        loggers.append(of_transformers)
    former = [logger.get_verbosity() for logger in loggers]
    try:
        for logger in loggers:
            logger.set_verbosity(logger.CRITICAL)
            # Loading takes little of the time.
            logger.disable_progress_bar()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for logger, verbosity in zip(loggers, former, strict=True):
            logger.set_verbosity(verbosity)


def _check_parts(folder: str, parts: dict[str, Any]) -> None:
    """Refuse what would run code of the folder, and classes that are not of diffusers."""
    import diffusers

    name = parts.get("_class_name")
    if name == "GenRepPipeline":
        raise ValueError(f"pipeline: {folder} is a trained GenRep: pass it as --checkpoint")
    kind = getattr(diffusers, name, None) if isinstance(name, str) else None
    if not isinstance(kind, type) or not issubclass(kind, diffusers.DiffusionPipeline):
        raise ValueError(f"pipeline: {folder} must be of a pipeline of diffusers, got {name!r}")
    # Diffusers would take it for a part of the pipeline.
    code = next(Path(folder).rglob("*.py"), None)
    if code is not None:
        raise ValueError(f"pipeline: {folder} holds code, which is not run: {code}")
    for part, named in parts.items():
        if part == "safety_checker" or not isinstance(named, list) or named[:1] == [None]:
            continue
        if named[0] not in _LIBRARIES:
            raise ValueError(
                f"pipeline: {folder}: {part} must be of {' or '.join(_LIBRARIES)}, got {named[0]!r}"
            )


def _of_checkpoint(
    checkpoint: str, device: torch.device, batch_size: int, pad_to: int | None
) -> Source:
    from ..pictures import load_pipeline
    from ..scoring.classifier.diffusion_classifier import DiffusionClassifier

    pipeline = load_pipeline(checkpoint).to(device)
    model = pipeline.model
    classifier = DiffusionClassifier(
        model.denoise,
        pipeline.scheduler,
        model.config.num_classes,
        vae=None if model.vae is None else model.encode,
        batch_size=batch_size,
        pad_to=pad_to,
    )
    channels = model.sample_shape[0]
    return Source(classifier, model.class_names, model.image_shape, channels, device, pipeline)


def _of_pipeline(
    pipe: Any,
    prompts: dict[str, list[str]],
    device: torch.device,
    batch_size: int,
    pad_to: int | None,
) -> Source:
    from ..scoring.classifier.diffusion_classifier import DiffusionClassifier

    classifier = DiffusionClassifier.from_pipeline(
        pipe, list(prompts.values()), null_prompt=None, batch_size=batch_size, pad_to=pad_to
    )
    if classifier.image_size is None:
        raise ValueError(
            "pipeline: its network's configuration has no sample_size, which images are resized to"
        )
    channels = pipe.vae.config.latent_channels
    shape = (3, *classifier.image_size)
    return Source(classifier, list(prompts), shape, channels, device, None)
