"""The denoiser of a run, its data and its calibration, for `bench_evaluations`."""

import argparse
import dataclasses
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch.utils.flop_counter import FlopCounterMode

import genrep_fast as gf
from genrep_fast.data import LabelledImages, as_tensors, load_data
from genrep_fast.scoring.classifier.calibration import Calibration
from genrep_fast.scoring.classifier.engine import Arrival, Engines
from genrep_fast.scoring.classifier.funnel import Funnel
from genrep_fast.scoring.classifier.members import Members
from genrep_fast.scoring.classifier.network import Network
from genrep_fast.scoring.classifier.noise import ForwardNoise
from genrep_fast.training.config import saved_data

from .measurement import DEVICE

CALIBRATION_SEED = 1
# How the names of rules begin that have something before the race.
AFTER = "race after "


class CountedDenoiser:
    """A denoiser that counts the rows that it is given, and the time that they take."""

    def __init__(self, denoiser):
        self.denoiser = denoiser
        self.rows = 0
        self.seconds = 0.0

    def __call__(self, x_t, timesteps, labels):
        start = time.perf_counter()
        output = self.denoiser(x_t, timesteps, labels)
        if x_t.is_cuda:
            torch.cuda.synchronize()
        self.seconds += time.perf_counter() - start
        self.rows += len(x_t)
        return output


class Setting:
    """The denoiser of a run with its data, calibrated."""

    def __init__(self, run: Path, options: argparse.Namespace) -> None:
        pipeline = gf.GenRepPipeline.from_pretrained(run / "model")
        self.model = pipeline.model.to(DEVICE).eval()
        self.confidence = options.confidence
        # Path() stands for RUN itself.
        self.scorer = None
        if options.head is not None:
            self.scorer = self.model
            if options.head != Path():
                other = gf.GenRepPipeline.from_pretrained(options.head / "model")
                self.scorer = other.model.to(DEVICE).eval()
        self.scheduler = pipeline.scheduler
        self.data = saved_data(run)
        splits = load_data(self.data.name, split=self.data.split, record=self.data.record)
        self.classes = splits.num_classes
        self.images, self.labels = some_of(splits.test, options.images)
        self.calibration_images = some_of(splits.calibration, options.calibration)
        denoiser = torch.compile(self.model.denoise) if options.compile else self.model.denoise
        self.denoiser = CountedDenoiser(denoiser)
        self.batch_size = options.batch_size
        self.steps = options.steps
        self.classifier = self.new_classifier()

    def new_classifier(self) -> gf.DiffusionClassifier:
        return gf.DiffusionClassifier(
            self.denoiser,
            self.scheduler,
            self.classes,
            batch_size=self.batch_size,
            # Networks that were compiled want batches of one size.
            pad_to=self.batch_size,
        )

    def flops(self) -> float:
        """Of an evaluation."""
        zero = torch.zeros(1, dtype=torch.int64, device=DEVICE)
        return counted_flops(lambda: self.model.denoise(self.images[:1], zero, zero))

    def head_flops(self) -> float:
        """Of the head, for an image."""
        return counted_flops(lambda: self.scorer.perceive(self.images[:1]))

    def calibrate_before(self, options: argparse.Namespace) -> dict[str, dict]:
        """Rows with something before the race, and the arguments of their calls."""
        images, _ = self.calibration_images
        calibration = self.classifier.calibration
        found: dict[str, dict] = {}
        if self.scorer is not None:
            with torch.no_grad():
                scores = torch.cat([self.scorer.perceive(part) for part in images.split(64)])
            scores = scores.float().cpu().numpy()
            calibration = dataclasses.replace(calibration, scores=scores)
            found["head"] = {"candidates": self.scorer}
        if options.tree:
            digits = len(str(self.classes)) - 1
            found["tree"] = {"tree": tree_of_digits(0, digits)}
        if options.coarse:
            funnel = Funnel.of(self.classes, coarse=True)
            noise = ForwardNoise(self.scheduler, len(calibration.timesteps))
            network = Network(self.denoiser, None, self.classes, None, None)
            members = Members((1,) * self.classes)
            size = self.batch_size
            engines = Engines(network, members, size, size, CALIBRATION_SEED)
            arrivals = [Arrival(place, place, image) for place, image in enumerate(images)]
            with torch.no_grad():
                calibration = funnel.measured(calibration, noise, arrivals, engines)
            found["coarse"] = {"coarse": True}
        if self.scorer is not None and options.tree:
            found["head and tree"] = found["head"] | found["tree"]
        if options.tree and options.coarse:
            found["tree and coarse"] = found["tree"] | found["coarse"]
        self.classifier.calibration = calibration
        return {AFTER + name: call for name, call in found.items()}

    def full(self, images, labels, seed: int, path: Path) -> Calibration:
        """Errors of every class at every step; read from `path` where they lie there."""
        if not path.exists():
            found = self.new_classifier().calibrate(images, labels, steps=self.steps, seed=seed)
            path.parent.mkdir(parents=True, exist_ok=True)
            unfinished = path.with_suffix(".unfinished.npz")
            np.savez(
                unfinished,
                timesteps=found.timesteps,
                errors=found.errors,
                roots=found.roots,
                labels=found.labels,
            )
            unfinished.rename(path)
        with np.load(path) as saved:
            return Calibration(**saved)


def counted_flops(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        run()
    return counter.get_total_flops()


def tree_of_digits(first: int, digits: int) -> list:
    """The numbers of so many digits after those before, nested by their digits."""
    if digits == 0:
        return first
    return [tree_of_digits(10 * first + digit, digits - 1) for digit in range(10)]


def some_of(split: LabelledImages, count: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Images and labels drawn at random; of fewer the first ones are the same."""
    images, labels = as_tensors(split)
    order = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))
    return images[order[:count]].to(DEVICE), labels[order[:count]]
