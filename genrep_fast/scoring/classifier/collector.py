"""Collects what a diffusion classifier finds: in memory, or in a folder as images finish."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...endings import interrupts_after
from ...files import only_writer
from .calibration import Calibration
from .contest import Contest, Outcome
from .description import described_results
from .engine import Plan
from .images import Images, ImageStream
from .network import Network
from .output_folder import OutputFolder
from .parts import NO_LABEL, Part
from .progress import Progress
from .result import ClassifierResult, filled_evidence, log_posterior
from .saved_results import SavedResults


class Collector:
    """The images of a call and their outcomes, by their place among the images.

    Args:
        num_classes: K.
        has_null: whether outcomes have a lift.
    """

    def __init__(self, num_classes: int, has_null: bool) -> None:
        self.images = 0
        self._num_classes = num_classes
        self._has_null = has_null
        self._device: torch.device | None = None
        self._labels: list[int] | None = []
        self._ids: list[int] = []
        self._names: list[str | None] = []
        self._found: dict[int, _Found] = {}

    def see(self, batch: Images, bar: Progress) -> list[int]:
        """Note a batch that was read; which of its images are to be evaluated."""
        if self._device is None:
            self._device = batch.images.device
        count = len(batch.images)
        self.images += count
        self._ids += batch.ids
        self._names += batch.names or [None] * count
        if batch.labels is None:
            self._labels = None
        elif self._labels is not None:
            self._labels += batch.labels.tolist()
        return list(range(count))

    def labels(self) -> Tensor | None:
        """Of all images that were read, int64 [B], or None."""
        return torch.tensor(self._labels) if self._labels else None

    def add(self, contest: Contest, plan: Plan, cut_off: bool) -> bool | None:
        """Keep the outcome of a contest, which the deadline cut off or not.

        Returns:
            Whether the prediction is right, None where not all images have labels.
        """
        found = self._found[contest.index] = _Found.of(contest, plan)
        return found.outcome.prediction == self._labels[contest.index] if self._labels else None

    def write_if_due(self) -> None:
        """Nothing is written."""

    def result(
        self, total: int | None, *, temperature: float, coarse_share: float
    ) -> ClassifierResult:
        """Of all images; `total` of them where the deadline left some unread.

        Raises:
            ValueError: where it left all of them, and their number is not known.
        """
        count = self.images if total is None else max(total, self.images)
        if count == 0:
            raise ValueError("deadline: it was over before the first image of the stream was read")
        nothing = _Found.nothing(self._num_classes)
        found = [self._found.get(index, nothing) for index in range(count)]
        result = _assembled(found, temperature, coarse_share, self._has_null)
        if self.images == count:
            result = _with_images(result, self._ids, self._names, self.labels())
        return result if self._device is None else result.to(self._device)


class Recorder:
    """Writes outcomes into a folder; keeps those of the newest part alone.

    Args:
        folder: where they are written.
        temperature: of the posterior.
        coarse_share: cost of a coarse evaluation, of a full one.

    Attributes:
        images: of the call, finished by former ones or not.
    """

    def __init__(self, folder: OutputFolder, temperature: float, coarse_share: float) -> None:
        self.images = 0
        self._folder = folder
        self._temperature = temperature
        self._coarse_share = coarse_share
        # By place: those that were read and have not finished.
        self._waiting: dict[int, _Identity] = {}
        # Of the newest part.
        self._rows: list[tuple[_Identity, _Found]] = []
        self._unwritten = 0

    def see(self, batch: Images, bar: Progress) -> list[int]:
        """Note a batch that was read; which of its images are to be evaluated.

        Raises:
            ValueError: for an image that is another one than that which has finished, or has
                another label.
        """
        finished = self._folder.finished
        batch = batch._replace(images=batch.images.detach().cpu().contiguous())
        left = []
        for row, place in enumerate(finished.places(batch.ids)):
            image = _Identity.of(batch, row)
            if place < 0:
                self._waiting[self.images + row] = image
                left.append(row)
                continue
            label = int(finished.labels[place])
            if image.digest != finished.digests[place]:
                raise ValueError(
                    f"images: the image with id {image.image_id} is not the one that "
                    f"{self._folder.path} holds under this id; give the same images in the same "
                    "order, or image_ids"
                )
            if image.label != label:
                raise ValueError(
                    f"labels: the image with id {image.image_id} has {_told(label)} in "
                    f"{self._folder.path} and {_told(image.label)} now"
                )
            correct = None if label == NO_LABEL else bool(finished.predictions[place] == label)
            bar.skip(int(finished.evaluations[place]), correct)
        self.images += len(batch.images)
        return left

    def labels(self) -> None:
        """None: they are not kept."""

    def add(self, contest: Contest, plan: Plan, cut_off: bool) -> bool | None:
        """Note the outcome of a contest, which is to be run again where the deadline cut it off.

        Returns:
            Whether the prediction is right, None where its image has no label.
        """
        image = self._waiting.pop(contest.index)
        found = _Found.of(contest, plan)
        if not cut_off:
            self._rows.append((image, found))
            self._unwritten += 1
            if len(self._rows) >= self._folder.layout.most_rows:
                self.write()
        return None if image.label == NO_LABEL else found.outcome.prediction == image.label

    def write_if_due(self) -> None:
        """Write what was added, where that takes little of the time since it was last done."""
        if self._unwritten and self._folder.is_due():
            self.write()

    def write(self) -> None:
        """Write what was added.

        Raises:
            OSError: where it cannot be written.
        """
        if not self._unwritten:
            return
        complete = len(self._rows) >= self._folder.layout.most_rows
        found = [outcome for _, outcome in self._rows]
        has_lift = self._folder.layout.has_lift
        result = _assembled(found, self._temperature, self._coarse_share, has_lift)
        images = [image for image, _ in self._rows]
        ids, names = [image.image_id for image in images], [image.name for image in images]
        result = _with_images(result, ids, names, None)
        labels = np.array([image.label for image in images], dtype=np.int64)
        # An interruption must not come between the file and what is known of it.
        with interrupts_after():
            part = Part(result, labels, [image.digest for image in images])
            self._folder.write(part, complete)
            self._unwritten = 0
            if complete:
                self._rows = []

    def result(self, total: int | None, *, temperature: float, coarse_share: float) -> SavedResults:
        """All images of the folder."""
        self._folder.begin()
        self.write()
        return SavedResults(self._folder.path)


@contextlib.contextmanager
def collecting(
    output: str | os.PathLike[str] | None,
    settings: dict[str, Any],
    network: Network,
    scheduler: Any,
    calibration: Calibration | None,
) -> Iterator[Collector | Recorder]:
    """What outcomes of a call go into: memory, or a folder, which has no other writer meanwhile.

    What has finished is written whatever ends the block.

    Args:
        output: the folder, or None.
        settings: of the classifier and the call, by name.
        network, scheduler, calibration: what results depend on beside them.

    Raises:
        TypeError: for what is no path.
        FileExistsError, ValueError, OSError: as `OutputFolder` and `only_writer`.
    """
    if output is None:
        yield Collector(settings["num_classes"], settings["null_class"] is not None)
        return
    if not isinstance(output, str | os.PathLike):
        raise TypeError(f"output must be the path of a folder, got {type(output).__name__}")
    with only_writer(Path(output)):
        found = described_results(network, scheduler, calibration, settings)
        folder = OutputFolder(Path(output), found)
        recorder = Recorder(folder, settings["temperature"], settings["coarse_share"])
        try:
            yield recorder
        finally:
            recorder.write()


def unread(stream: ImageStream, collector: Collector | Recorder) -> int | None:
    """Images of the call, where the deadline left some unread and their number is known."""
    if stream.exhausted:
        return None
    if stream.total is None:
        warnings.warn(
            f"deadline: the stream was left after {collector.images} images, of which alone "
            "the result tells",
            stacklevel=3,
        )
    return stream.total


def _told(label: int) -> str:
    return "no label" if label == NO_LABEL else f"the label {label}"


class _Identity(NamedTuple):
    """Which image it is."""

    image_id: int
    label: int
    name: str | None
    digest: str

    @classmethod
    def of(cls, batch: Images, row: int) -> _Identity:
        """Of a row of a batch on the CPU; the digest is that of its values."""
        label = NO_LABEL if batch.labels is None else int(batch.labels[row])
        name = None if batch.names is None else batch.names[row]
        content = batch.images[row].view(-1).view(torch.uint8)
        digest = hashlib.blake2b(content.numpy().data, digest_size=8).hexdigest()
        return cls(batch.ids[row], label, name, digest)


class _Found(NamedTuple):
    """What is kept of an image."""

    outcome: Outcome
    decided: bool
    evaluations: int
    coarse_evaluations: int

    @classmethod
    def of(cls, contest: Contest, plan: Plan) -> _Found:
        outcome = contest.outcome(plan.steps, plan.rule)
        decided = plan.rule.ended(contest, plan.steps)
        coarse = contest.screened.coarse_evaluations
        return cls(_in_float32(outcome), decided, contest.evaluations, coarse)

    @classmethod
    def nothing(cls, num_classes: int) -> _Found:
        """Of an image that the deadline left."""
        unknown = np.full(num_classes, np.nan, dtype=np.float32)
        no_steps = np.zeros(num_classes, dtype=np.int64)
        no_mass = np.full(num_classes, -np.inf, dtype=np.float32)
        outcome = Outcome(-1, unknown, unknown, no_steps, unknown, unknown, no_mass)
        return cls(outcome, False, 0, 0)


def _in_float32(outcome: Outcome) -> Outcome:
    names = ("log_likelihood", "evidence", "standard_error", "lift", "log_mass")
    return outcome._replace(**{name: getattr(outcome, name).astype(np.float32) for name in names})


def _assembled(
    images: list[_Found], temperature: float, coarse_share: float, has_null: bool
) -> ClassifierResult:
    """The result of images, of whose ids and labels it does not tell."""
    prediction = torch.tensor([image.outcome.prediction for image in images])
    names = ("log_likelihood", "evidence", "steps", "standard_error", "lift", "log_mass")
    scores, evidence, steps, error, lift, log_mass = (
        torch.from_numpy(np.stack([getattr(image.outcome, name) for image in images]))
        for name in names
    )
    posterior = log_posterior(evidence, log_mass, temperature)
    best = scores.nan_to_num(-torch.inf).topk(2, 1).values
    margin = best[:, 0] - best[:, 1]
    margin = margin.masked_fill(margin == torch.inf, torch.nan)
    return ClassifierResult(
        prediction=prediction,
        decided=torch.tensor([image.decided for image in images]),
        posterior=posterior,
        evidence=filled_evidence(evidence, posterior, temperature),
        log_likelihood=scores,
        steps=steps,
        evaluations=torch.tensor([image.evaluations for image in images]),
        margin=torch.where(prediction >= 0, margin, 0.0),
        standard_error=error,
        lift=lift if has_null else None,
        temperature=temperature,
        coarse_evaluations=torch.tensor([image.coarse_evaluations for image in images]),
        coarse_share=coarse_share,
    )


def _with_images(
    result: ClassifierResult, ids: list[int], names: list[str | None], labels: Tensor | None
) -> ClassifierResult:
    """The result with what is known of its images."""
    return dataclasses.replace(
        result,
        labels=labels,
        image_ids=torch.tensor(ids),
        names=None if all(name is None for name in names) else names,
    )
