"""`genrep calibrate`."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from ..checks import check_at_least, check_seed
from ..files import only_writer
from ..names import printable
from .classifiers import Pictures, candidates_of, source_of

ARGUMENTS: dict[str, dict[str, Any]] = {
    "images": {
        "nargs": "+",
        "required": True,
        "help": "image files, folders of them, and patterns such as 'photos/*.png'; some 50 to 200 "
        "that the denoiser was not trained on",
    },
    "labels": {
        "action": "store_true",
        "help": "the class of an image is the name of its folder; else the winners of the full "
        "budget serve",
    },
}


def calibrate(
    images: list[str],
    output: str,
    checkpoint: str | None = None,
    pipeline: str | None = None,
    prompts: str | None = None,
    candidates: str | None = None,
    labels: bool = False,
    steps: int | None = None,
    seed: int = 1,
    batch_size: int = 64,
    device: str | None = None,
    dtype: str | None = None,
) -> None:
    """Measure what a race needs to know of a denoiser, for `genrep classify --calibration`.

    It takes all classes at all steps of each image, once for a model.

    Args:
        output: folder for the calibration.
        checkpoint: folder of the pipeline that `genrep train` left, or of the run that holds it.
        pipeline: folder of a pipeline of diffusers, of which nothing is run.
        prompts: of the pipeline, as of `genrep classify`.
        candidates: folder of a checkpoint whose head is to choose the classes that are compared.
        steps: timesteps of the full budget; 24 where not given.
        seed: of the noise; another one than that of `genrep classify`.
        batch_size: evaluations of the denoiser that pass through the network at once.
        device: of the network; a CUDA GPU where there is one.
        dtype: of a pipeline's weights, as of `genrep classify`.
    """
    check_at_least(1, batch_size=batch_size)
    check_seed(seed)
    source = source_of(checkpoint, pipeline, prompts, batch_size, device, dtype)
    pictures = Pictures(images, source.image_shape, source.class_names if labels else None)
    options: dict[str, Any] = {"steps": steps, "seed": seed, "progress": sys.stderr.isatty()}
    if candidates is not None:
        options["candidates"] = candidates_of(candidates, source)
    with only_writer(Path(output)):
        found = source.classifier.calibrate(pictures.loader(), **options)
        source.classifier.save_pretrained(output)
    remark = pictures.cropping()
    if remark is not None:
        print(f"genrep calibrate: {printable(remark)}", file=sys.stderr)
    print(found)
    print(f"wrote {printable(output)}: classifier.json")
