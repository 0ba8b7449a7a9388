"""What a run shows beside history.jsonl: to a tracker of Accelerate's, and in pictures."""

from __future__ import annotations

import dataclasses
import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from PIL.Image import Image

from ..files import write_atomically
from ..models import GenRep, GenRepPipeline
from ..names import printable
from ..pictures import grid_of, save
from ..reporting.classes import shown_classes
from .config import TrainingConfig

# wandb's project, and tensorboard's folder in the output folder.
PROJECT = "genrep_fast"
SAMPLES = "samples"
_IMAGES_PER_CLASS = 4
_STEPS = 50
# Of the packages, where it is not the tracker's.
_INSTALL = {"tensorboard": '"genrep_fast[trackers]"', "comet_ml": "comet-ml"}


def check_tracker(name: str | None) -> None:
    """Check that Accelerate knows the tracker, and has it: it would leave a missing one out.

    Raises:
        ValueError: for an unknown name.
        ImportError: for a package that is not installed, with the command that does it.
    """
    if name is None:
        return
    if name not in LOGGER_TYPE_TO_CLASS:
        raise ValueError(f"log_with must be one of {', '.join(LOGGER_TYPE_TO_CLASS)}, got {name!r}")
    if name not in map(str, get_available_trackers()):
        package = _INSTALL.get(name, name)
        raise ImportError(
            f"log_with: {name} is not installed; it comes with: pip install {package}"
        )


class Tracking:
    """Tells the accelerator's trackers what a run writes to its history.

    Args:
        config: of the run.
        accelerator: whose trackers are started, unless they have been.
    """

    def __init__(self, config: TrainingConfig, accelerator: Accelerator) -> None:
        self.config = config
        self.accelerator = accelerator

    @contextmanager
    def started(self, step: int) -> Iterator[None]:
        """Start the trackers of a run that goes on after `step`, and end them with the block.

        What was logged of later steps, before the run was interrupted, gives way.
        """
        if not self.accelerator.log_with or self.accelerator.trackers:
            yield
            return
        with _failures_told_once():
            with self._naming_errors():
                self._start(step)
            try:
                yield
            except BaseException:
                # What failed first is told.
                with suppress(Exception):
                    self.accelerator.end_training()
                raise
            with self._naming_errors():
                self.accelerator.end_training()

    def _start(self, step: int) -> None:
        options: dict[str, dict[str, Any]] = {}
        if self.config.log_with == "tensorboard":
            options["tensorboard"] = {"purge_step": step + 1}
        if self.config.log_with == "wandb":
            run = {"id": self._id(), "resume": "allow", "dir": self.config.output}
            options["wandb"] = run
        # The run has its options from its start.
        told = None if step else self._options()
        self.accelerator.init_trackers(PROJECT, config=told, init_kwargs=options)

    def _id(self) -> str:
        """The run's name for wandb, which keeps it when it goes on."""
        path = Path(self.config.output) / "wandb-id"
        if not path.is_file():
            write_atomically(path, uuid.uuid4().hex)
        return path.read_text().strip()

    def _options(self) -> dict[str, Any]:
        options = dataclasses.asdict(self.config).items()
        simple = (bool, int, float, type(None))
        return {k: v if isinstance(v, simple) else printable(v) for k, v in options}

    def log(self, row: dict[str, float]) -> None:
        """Log a row of the history, under its step."""
        if self.accelerator.trackers:
            values = {name: value for name, value in row.items() if name != "step"}
            with self._naming_errors():
                self.accelerator.log(values, step=int(row["step"]))

    def show_samples(self, model: GenRep, scheduler: Any, step: int) -> None:
        """Draw some images a class with `model`, write them to the folder samples and log them.

        No random number of the training depends on it: the images' noise follows from the seed.
        """
        picture = draw_samples(model, scheduler, self.config.seed)
        folder = Path(self.config.output) / SAMPLES
        folder.mkdir(exist_ok=True)
        save(picture, folder / f"step-{step:07d}.png")
        for tracker in self.accelerator.trackers:
            with self._naming_errors():
                if tracker.name == "tensorboard":
                    pixels = np.asarray(picture.convert("RGB"))[None]
                    tracker.log_images({SAMPLES: pixels}, step=step, dataformats="NHWC")
                elif hasattr(tracker, "log_images"):
                    tracker.log_images({SAMPLES: [picture]}, step=step)

    @contextmanager
    def _naming_errors(self) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            reason = getattr(error, "strerror", None) or error
            message = f"log_with: {self.config.log_with} cannot log to {self.config.output}"
            raise OSError(f"{message} ({reason})") from error


@torch.no_grad()
def draw_samples(model: GenRep, scheduler: Any, seed: int) -> Image:
    """One picture of generated images, a class a row; of many classes, the `shown_classes`."""
    classes = shown_classes(model.config.num_classes)
    labels = [label for label in classes for _ in range(_IMAGES_PER_CLASS)]
    pipeline = GenRepPipeline(model=model, scheduler=scheduler)
    pipeline.set_progress_bar_config(disable=True)
    steps = min(_STEPS, scheduler.config.num_train_timesteps)
    images = pipeline.generate(labels, num_inference_steps=steps, seed=seed).images
    return grid_of(images, labels)


@contextmanager
def _failures_told_once() -> Iterator[None]:
    """Keep tensorboard's thread from telling what it raises in the main thread, too."""
    tell = threading.excepthook

    def tell_others(failure: threading.ExceptHookArgs) -> None:
        if "AsyncWriter" not in type(failure.thread).__name__:
            tell(failure)

    threading.excepthook = tell_others
    try:
        yield
    finally:
        threading.excepthook = tell
