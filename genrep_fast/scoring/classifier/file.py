"""The folder of a saved `DiffusionClassifier`, of which nothing is trusted when it is read.

``classifier.json`` holds settings, prompts where there are any, and names the calibration's file.
It is written last, so that the folder holds all of the old classifier or all of the new one.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import save
from torch import Tensor

from ...checks import check_at_least, check_integer
from ...files import read_json, write_atomically
from .calibration import Calibration, CoarseErrors
from .noise import ForwardNoise
from .pipelines.denoiser import PipelineDenoiser
from .pipelines.prompts import Prompts
from .pipelines.registry import family_of

_SETTINGS = "classifier.json"
_FORMAT = 1
# Of a calibration, where there are any.
_OPTIONAL = ("labels", "scores", "offsets")
_SETTING_NAMES = ("num_classes", "null_class", "parameterization")


class SavedPipeline(NamedTuple):
    """The pipeline that a classifier was made from: the name of its class, and the prompts."""

    family: str
    prompts: Prompts

    @classmethod
    def of(cls, denoiser: Any) -> SavedPipeline | None:
        """That of a denoiser, None where it is of no pipeline."""
        if not isinstance(denoiser, PipelineDenoiser):
            return None
        return cls(denoiser.family, denoiser.prompts)


class SavedClassifier(NamedTuple):
    """What a folder holds.

    Attributes:
        settings: keyword arguments of the class.
        scheduler: of diffusers.
        calibration: or None.
        pipeline: or None, of a denoiser.
    """

    settings: dict[str, Any]
    scheduler: Any
    calibration: Calibration | None
    pipeline: SavedPipeline | None = None

    def check_source(self, denoiser: Any, pipe: Any, prompts: Any) -> None:
        """Check that a denoiser is given, or a pipeline of the saved family with its prompts.

        Raises:
            TypeError, ValueError: otherwise.
        """
        if self.pipeline is None:
            if denoiser is None or pipe is not None or prompts is not None:
                raise TypeError(
                    "denoiser must be given, and neither pipe nor prompts: the saved classifier "
                    "was not made from a pipeline"
                )
            return
        family, saved = self.pipeline
        if pipe is None or denoiser is not None:
            raise TypeError(
                f"pipe must be given, and no denoiser: the saved classifier is of a {family}"
            )
        if family_of(pipe) != family:
            raise ValueError(
                f"pipe must be a {family}, of which the classifier was saved, "
                f"got {type(pipe).__name__}"
            )
        if prompts is None:
            return
        if isinstance(prompts, str | bytes) or not isinstance(prompts, Iterable):
            raise TypeError(
                f"prompts must be those of the saved classifier, a list, got "
                f"{type(prompts).__name__}"
            )
        given = [list(each) if isinstance(each, list | tuple) else [each] for each in prompts]
        if given != [list(each) for each in saved.classes]:
            raise ValueError(
                "prompts must be those of the saved classifier, of which its calibration is: "
                "make and calibrate a classifier of others by from_pipeline"
            )

    def check_scheduler(self, scheduler: Any) -> None:
        """Check that a pipeline's scheduler has the saved one's noise levels.

        Raises:
            ValueError: otherwise.
        """
        steps = min(ForwardNoise.most_steps(each) for each in (scheduler, self.scheduler))
        saved, given = (ForwardNoise(each, steps) for each in (self.scheduler, scheduler))
        if not saved.agrees_with(given):
            raise ValueError(
                "pipe.scheduler must have the noise levels of the saved classifier's "
                f"{type(self.scheduler).__name__}, got others of {type(scheduler).__name__}"
            )


def write_classifier(path: str | os.PathLike[str], classifier: SavedClassifier) -> None:
    """Write a classifier into a folder.

    Raises:
        OSError: where it cannot be written.
    """
    folder = Path(path)
    folder.mkdir(parents=True, exist_ok=True)
    scheduler = classifier.scheduler
    file = None
    if classifier.calibration is not None:
        content = save(
            calibration_tensors(classifier.calibration), _prompts_of(classifier.pipeline)
        )
        file = f"calibration-{hashlib.sha256(content).hexdigest()[:16]}.safetensors"
        write_atomically(folder / file, content)
    config = {key: value for key, value in dict(scheduler.config).items() if key[0] != "_"}
    settings = {
        "format": _FORMAT,
        **classifier.settings,
        "scheduler": {"_class_name": type(scheduler).__name__, **config},
        "calibration": file,
        "pipeline": None,
    }
    if classifier.pipeline is not None:
        family, prompts = classifier.pipeline
        settings["pipeline"] = {
            "class": family,
            "prompts": prompts.classes,
            "null_prompt": prompts.null,
        }
    write_atomically(folder / _SETTINGS, json.dumps(settings, indent=2, default=_plain) + "\n")
    for other in folder.glob("calibration-*.safetensors"):
        if other.name != file:
            other.unlink(missing_ok=True)


def read_classifier(path: str | os.PathLike[str], scheduler: Any = None) -> SavedClassifier:
    """Read what `write_classifier` wrote.

    Args:
        scheduler: takes the place of the saved one.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: for a damaged file; the message names it.
    """
    file = Path(path) / _SETTINGS
    if not file.is_file():
        raise FileNotFoundError(
            f"path: {file} does not exist; a folder written by "
            "DiffusionClassifier.save_pretrained is wanted"
        )
    content = read_json(file)
    try:
        settings = _checked_settings(content)
        if scheduler is None:
            scheduler = _scheduler(content["scheduler"])
        pipeline = _pipeline(content.get("pipeline"), settings)
        name = content["calibration"]
        if name is not None and (not isinstance(name, str) or Path(name).name != name):
            raise ValueError(f"calibration must name a file of the folder, got {name!r}")
    except (TypeError, ValueError) as error:
        raise ValueError(f"{file} is not a saved classifier: {error}") from error
    calibration = None
    if name is not None:
        calibration = _read_calibration(file.parent / name, settings, scheduler, pipeline)
    return SavedClassifier(settings, scheduler, calibration, pipeline)


def _plain(value: Any) -> Any:
    """What JSON has no word for in a scheduler's configuration."""
    if isinstance(value, np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"scheduler: its configuration must be plain values, got {value!r}")


def _checked_settings(content: Any) -> dict[str, Any]:
    if not isinstance(content, dict):
        raise TypeError(f"a dictionary is wanted, got {type(content).__name__}")
    wanted = ("format", *_SETTING_NAMES, "scheduler", "calibration")
    missing = [name for name in wanted if name not in content]
    if missing:
        raise ValueError(f"it lacks {', '.join(missing)}")
    if content["format"] != _FORMAT:
        raise ValueError(f"format must be {_FORMAT}, got {content['format']!r}")
    check_at_least(2, num_classes=content["num_classes"])
    if content["null_class"] is not None:
        check_integer(content["null_class"], "null_class")
    if content["parameterization"] is not None and not isinstance(content["parameterization"], str):
        raise TypeError(f"parameterization must be a word, got {content['parameterization']!r}")
    return {name: content[name] for name in _SETTING_NAMES}


def _pipeline(content: Any, settings: dict[str, Any]) -> SavedPipeline | None:
    """Of the saved pipeline, whose prompts are checked when they are encoded."""
    if content is None:
        return None
    fits = isinstance(content, dict) and {"class", "prompts", "null_prompt"} <= set(content)
    prompts = content["prompts"] if fits else None
    if not isinstance(prompts, list) or not all(isinstance(each, list) for each in prompts):
        raise ValueError("pipeline must have a class, lists of prompts and a null_prompt")
    if len(prompts) != settings["num_classes"]:
        raise ValueError(
            f"pipeline must have prompts of {settings['num_classes']} classes, got {len(prompts)}"
        )
    classes = tuple(tuple(each) for each in prompts)
    return SavedPipeline(content["class"], Prompts(classes, content["null_prompt"]))


def _prompts_of(pipeline: SavedPipeline | None) -> dict[str, str] | None:
    """What a calibration's file says of the prompts that it was measured with."""
    return None if pipeline is None else {"prompts": pipeline.prompts.digest}


def _scheduler(config: Any) -> Any:
    """A scheduler of diffusers, of the saved configuration."""
    import diffusers

    if not isinstance(config, dict) or not isinstance(config.get("_class_name"), str):
        raise ValueError("scheduler must be a configuration with its _class_name")
    found: Any = getattr(diffusers, config["_class_name"], None)
    is_scheduler = isinstance(found, type) and issubclass(found, diffusers.SchedulerMixin)
    if not is_scheduler:
        raise ValueError(
            f"scheduler {config['_class_name']!r} is none of diffusers: pass it as scheduler"
        )
    values = {key: value for key, value in config.items() if key != "_class_name"}
    try:
        return found.from_config(values)
    # What a scheduler raises depends on which of its values is wrong.
    except Exception as error:
        raise ValueError(
            f"scheduler: {found.__name__} refuses its configuration: {error}"
        ) from error


def calibration_tensors(calibration: Calibration) -> dict[str, Tensor]:
    """What `restored_calibration` takes, by name."""
    arrays = {
        "timesteps": calibration.timesteps,
        "errors": calibration.errors,
        "roots": calibration.roots,
    }
    for name in _OPTIONAL:
        array = getattr(calibration, name)
        if array is not None:
            arrays[name] = array
    if calibration.coarse is not None:
        arrays |= calibration.coarse.arrays()
    return {name: torch.from_numpy(np.ascontiguousarray(array)) for name, array in arrays.items()}


def _read_calibration(
    file: Path, settings: dict[str, Any], scheduler: Any, pipeline: SavedPipeline | None
) -> Calibration:
    try:
        with safe_open(file, "pt") as opened:
            if opened.metadata() != _prompts_of(pipeline):
                raise ValueError(f"it was measured with other prompts than those in {_SETTINGS}")
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        return restored_calibration(
            tensors, settings["num_classes"], scheduler, settings["parameterization"]
        )
    except FileNotFoundError as error:
        raise ValueError(f"{file} is missing, which {_SETTINGS} names") from error
    # What the reader raises depends on where a file is broken.
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(f"{file} is truncated or not a calibration: {reason}") from error


def restored_calibration(
    tensors: dict[str, Tensor], num_classes: int, scheduler: Any, parameterization: str | None
) -> Calibration:
    """The calibration whose tensors `calibration_tensors` gave.

    Raises:
        TypeError, ValueError: for tensors that are none of K = `num_classes` and the scheduler, and
            for a calibration of which nothing can be learnt.
    """
    calibration = _checked_calibration(tensors, num_classes)
    noise = ForwardNoise(scheduler, len(calibration.timesteps), parameterization)
    expected = noise.timesteps.double().numpy()
    if not np.allclose(expected, calibration.timesteps, rtol=1e-6, atol=0):
        raise ValueError(
            f"timesteps must be the scheduler's {expected.tolist()}, "
            f"got {calibration.timesteps.tolist()}"
        )
    # Raises where nothing can be learnt from it.
    _ = calibration.variance
    return calibration


def _checked_calibration(tensors: dict[str, Tensor], num_classes: int) -> Calibration:
    coarse = {name: tensors[name].numpy() for name in tensors if name.startswith("coarse_")}
    tensors = {name: tensor for name, tensor in tensors.items() if name not in coarse}
    names = set(tensors)
    required = {"timesteps", "errors", "roots"}
    if not required <= names <= required | set(_OPTIONAL):
        raise ValueError(f"it must hold {', '.join(sorted(required))}, got {sorted(names)}")
    errors = tensors["errors"]
    if errors.ndim != 3 or errors.shape[2] != num_classes or min(errors.shape) == 0:
        raise ValueError(f"errors must be [N, S, {num_classes}], got {list(errors.shape)}")
    count, steps, _ = errors.shape
    expected = {
        "timesteps": (torch.float64, (steps,)),
        "errors": (torch.float32, tuple(errors.shape)),
        "roots": (torch.float32, tuple(errors.shape)),
        "labels": (torch.int64, (count,)),
        "scores": (torch.float32, (count, num_classes)),
        "offsets": (torch.float64, (num_classes,)),
    }
    for name, tensor in tensors.items():
        dtype, shape = expected[name]
        if tensor.dtype != dtype or tuple(tensor.shape) != shape:
            found = f"{tensor.dtype} {list(tensor.shape)}"
            raise ValueError(f"{name} must be {dtype} {list(shape)}, got {found}")
        if name == "scores":
            # −inf rules a class out.
            if tensor.isnan().any() or tensor.isposinf().any():
                raise ValueError("scores must lie below infinity")
            continue
        # Timesteps may be logarithms, and offsets have the mean 0.
        signed = name in ("timesteps", "offsets")
        if not tensor.isfinite().all() or (not signed and (tensor < 0).any()):
            raise ValueError(f"{name} must be finite and not negative")
    labels = tensors.get("labels")
    if labels is not None and (labels >= num_classes).any():
        raise ValueError(f"labels must lie in [0, {num_classes}), got {labels.max().item()}")
    if count < 2:
        raise ValueError(f"errors must be of at least two images, got {count}")
    return Calibration(
        tensors["timesteps"].numpy(),
        errors.numpy(),
        tensors["roots"].numpy(),
        None if labels is None else labels.numpy(),
        tensors["scores"].numpy() if "scores" in tensors else None,
        CoarseErrors.of_arrays(coarse, tuple(errors.shape)),
        tensors["offsets"].numpy() if "offsets" in tensors else None,
    )
