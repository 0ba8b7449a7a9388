"""`genrep evaluate`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..checks import check_seed
from ..files import only_writer
from ..memory import require_memory
from ..names import printable
from ..training.config import STAGES, SavedData, saved_data

if TYPE_CHECKING:
    from ..models import GenRep

# Tensors of all samples that an evaluation holds at a time, at least.
_COPIES_OF_SAMPLES = 3


def evaluate(
    checkpoint: str,
    data: str | None = None,
    output: str | None = None,
    elbo_steps: int | None = None,
    samples_per_class: int | None = None,
    scored_images: int | None = None,
    seed: int = 0,
) -> None:
    """Evaluate a trained pipeline: metrics.json, figures and report.html.

    Args:
        checkpoint: folder of the pipeline, or of the run that holds it.
        data: as of `genrep train`; that of the run where not given.
        output: folder for the results; `evaluation` in the checkpoint's where not given.
        elbo_steps: timesteps that the generative posterior scores; 32, or 8 with more than 25
            classes, where not given.
        samples_per_class: generated images a class; 50, or 5,000 for all of more than 100 classes,
            where not given.
        scored_images: test images, and as many calibration images, whose generative posterior is
            measured, a network evaluation a class and step; all, or with more than 25 classes as
            many as make two million evaluations, where not given.
        seed: of the noise.
    """
    from .. import pictures
    from ..data import load_data
    from ..evaluation import check_splits, described, settings_for
    from ..evaluation import evaluate as run_evaluation
    from ..reporting.terminal import console, evaluation_progress, reading_progress
    from ..training.run import result_table
    from ..training.state import read_history

    check_seed(seed)
    pipeline = pictures.load_pipeline(checkpoint)
    settings = settings_for(
        pipeline.model.config.num_classes,
        elbo_steps=elbo_steps,
        samples_per_class=samples_per_class,
        scored_images=scored_images,
        seed=seed,
    )
    pictures.check_steps(pipeline, elbo_steps=settings.elbo_steps)
    _check_samples_fit(pipeline.model, settings.samples_per_class)
    trained_on = saved_data(Path(checkpoint)) or SavedData()
    log = Path(checkpoint) / "history.jsonl"
    history = read_history(log) if log.is_file() else None
    with reading_progress() as reading:
        splits = load_data(
            data or trained_on.name,
            image_size=pipeline.model.image_shape[1],
            split=trained_on.split,
            record=trained_on.record,
            progress=reading,
        )
    folder = Path(output or Path(checkpoint) / "evaluation")
    with only_writer(folder):
        check_splits(pipeline.model, splits)
        console.print(described(settings, splits), highlight=False)
        with evaluation_progress() as progress:
            metrics = run_evaluation(
                pipeline.model,
                pipeline.scheduler,
                splits,
                folder,
                settings=settings,
                history=history,
                stages=STAGES,
                progress=progress,
            )
    console.print(result_table(metrics))
    console.print(f"wrote {printable(folder)}: metrics.json, report.html, figures/")


def _check_samples_fit(model: GenRep, samples_per_class: int) -> None:
    channels, height, width = model.image_shape
    count = samples_per_class * model.config.num_classes
    # In float32.
    needed = _COPIES_OF_SAMPLES * 4 * count * channels * height * width
    require_memory("samples_per_class", needed, f"{count} samples")
