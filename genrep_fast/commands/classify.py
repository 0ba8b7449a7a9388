"""`genrep classify`."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ..checks import check_at_least, check_seed
from ..names import printable, shortened
from .classifiers import Pictures, Source, calibrated, candidates_of, source_of

if TYPE_CHECKING:
    from ..scoring.classifier.result import ClassifierResult

ARGUMENTS: dict[str, dict[str, Any]] = {
    "images": {
        "nargs": "+",
        "required": True,
        "help": "image files, folders of them, and patterns such as 'photos/*.png'",
    },
    "labels": {
        "action": "store_true",
        "help": "tell the accuracy: the class of an image is the name of its folder",
    },
}

# Images that pass through the head at once.
_BATCH_SIZE = 64
# Of a class's name: any folder's fits.
_LONGEST_NAME = 255


def classify(
    images: list[str],
    checkpoint: str | None = None,
    pipeline: str | None = None,
    prompts: str | None = None,
    strategy: str | None = None,
    calibration: str | None = None,
    candidates: str | None = None,
    labels: bool = False,
    confidence: float = 0.99,
    seed: int = 0,
    output: str | None = None,
    batch_size: int = _BATCH_SIZE,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Print the most probable class of each image, with its probability, one line an image.

    Images are resized and cropped to the centre, as in training. The head of a checkpoint
    classifies, or with --strategy its denoiser; a pipeline of diffusers classifies by prompts.
    Denoisers print their evaluations of an image, too.

    Args:
        checkpoint: folder of the pipeline that `genrep train` left, or of the run that holds it.
        pipeline: folder of a pipeline of diffusers, of which nothing is run.
        prompts: of the pipeline: a text file, a class a line, "prompt" or "name<TAB>prompt", a name
            as often as it has prompts; or a JSON object of names and prompts, or lists of them.
        strategy: race, full, stratified or staged; a race for a pipeline where not given.
        calibration: folder that `genrep calibrate` wrote.
        candidates: folder of a checkpoint whose head chooses the classes that are compared.
        confidence: of a race, that the winner of the full budget is not dropped.
        seed: of the noise.
        output: folder for all that is known of each image, written as images finish; the same
            command goes on where it ended.
        batch_size: images, or evaluations of a denoiser, that pass through the network at once.
        device: of the network; a CUDA GPU where there is one.
        dtype: of a pipeline's weights: float32, bfloat16 or float16; float32 where not given.
    """
    check_at_least(1, batch_size=batch_size)
    check_seed(seed)
    denoises = pipeline is not None or strategy is not None
    of_denoiser = {"calibration": calibration, "candidates": candidates, "output": output}
    for name, value in of_denoiser.items():
        if value is not None and not denoises:
            raise ValueError(f"{name} needs --strategy: the head has none")
    source = source_of(checkpoint, pipeline, prompts, batch_size, device, dtype, output is not None)
    pictures = Pictures(images, source.image_shape, source.class_names if labels else None)
    if denoises:
        options = {
            "strategy": strategy or "race",
            "confidence": confidence,
            "seed": seed,
            "progress": sys.stderr.isatty(),
        }
        if candidates is not None:
            options["candidates"] = candidates_of(candidates, source)
        if calibration is not None:
            calibrated(source, calibration)
        lines = _by_denoiser(source, pictures, options, output)
    else:
        lines = _by_head(source, pictures, batch_size)
    for line in lines:
        print(line)
    remark = pictures.cropping()
    if remark is not None:
        print(f"genrep classify: {printable(remark)}", file=sys.stderr)


def _by_head(source: Source, pictures: Pictures, batch_size: int) -> list[str]:
    from .. import pictures as reading

    assert source.pipeline is not None
    model = source.pipeline.model
    reading.check_network_fits(model, "images", min(len(pictures), batch_size))
    lines = []
    correct = 0
    for batch in pictures.batches(batch_size):
        probabilities = source.pipeline(batch["images"].to(source.device)).probabilities.cpu()
        best, predictions = probabilities.max(1)
        if pictures.labels is not None:
            correct += int((predictions == batch["labels"]).sum())
        for name, label, probability in zip(batch["names"], predictions, best, strict=True):
            told = shortened(source.class_names[label], _LONGEST_NAME)
            lines.append(f"{printable(name)}\t{told}\t{probability:.4f}")
    if pictures.labels is not None:
        _tell_accuracy(correct, len(pictures))
    return lines


def _by_denoiser(
    source: Source, pictures: Pictures, options: dict[str, Any], output: str | None
) -> list[str]:
    found: Iterable[ClassifierResult]
    if output is None:
        found = [source.classifier(pictures.loader(), **options)]
    else:
        found = _saved(source, pictures, options, output)
    lines = [""] * len(pictures)
    correct = undecided = 0
    for result in found:
        for row in _rows(result):
            # A folder may hold more images, of a former call.
            if row.place < len(pictures):
                name = shortened(source.class_names[row.label], _LONGEST_NAME)
                path = printable(pictures.paths[row.place])
                lines[row.place] = f"{path}\t{name}\t{row.probability:.4f}\t{row.evaluations}"
                undecided += not row.decided
                if pictures.labels is not None:
                    correct += pictures.labels[row.place] == row.label
    if undecided:
        told = f"{undecided:,} of {len(pictures):,} images are undecided"
        print(f"genrep classify: {told}", file=sys.stderr)
    if pictures.labels is not None:
        _tell_accuracy(correct, len(pictures))
    return lines


def _saved(
    source: Source, pictures: Pictures, options: dict[str, Any], output: str
) -> Iterator[ClassifierResult]:
    """Parts of the results in the folder `output`."""
    if options["strategy"] == "race" and source.classifier.calibration is None:
        raise ValueError(
            "output: a race needs --calibration, which `genrep calibrate` makes; or choose another "
            "--strategy"
        )
    try:
        saved = source.classifier(pictures.loader(), output=output, **options)
    except KeyboardInterrupt as error:
        kept = "nothing has finished"
        if Path(output, "classification.json").exists():
            kept = f"what has finished is kept in {shlex.quote(output)}, the same command goes on"
        raise KeyboardInterrupt(f"interrupted; {kept}") from error
    told = f"wrote {printable(output)}: classification.json, parts/"
    print(f"genrep classify: {told}", file=sys.stderr)
    return iter(saved)


class _Row(NamedTuple):
    """What a line tells of an image, and its place among the images."""

    place: int
    label: int
    probability: float
    evaluations: int
    decided: bool


def _rows(result: ClassifierResult) -> Iterator[_Row]:
    assert result.image_ids is not None
    columns = (
        result.image_ids,
        result.prediction,
        result.posterior.amax(1).exp(),
        result.evaluations,
        result.decided,
    )
    yield from map(_Row, *(column.tolist() for column in columns))


def _tell_accuracy(correct: int, count: int) -> None:
    from ..scoring.classifier.progress import accuracy_interval

    low, high = accuracy_interval(correct, count)
    told = f"accuracy {correct / count:.1%} ({low:.1%} to {high:.1%})"
    print(f"genrep classify: {told}", file=sys.stderr)
