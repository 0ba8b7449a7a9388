"""`genrep train`: data, time budget, training, evaluation, report, closing table."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from .._moved import forward
from ..data import DataRecord, load_data
from ..evaluation import (
    EvaluationSettings,
    described,
    evaluate,
    network_evaluations,
    settings_for,
)
from ..files import only_writer
from ..memory import require_memory
from ..models.footprint import footprint
from ..names import printable
from ..reporting.terminal import console, evaluation_progress, reading_progress, wall_clock
from .config import STAGES, TrainingConfig
from .state import TrainingState
from .teacher import planned_bank_bytes, planned_evaluations
from .trainer import Trainer

# Forward and backward passes of the backbone in a step of each stage; a forward pass alone counts a
# third.
_PASSES = {"diffusion": 1.0, "perception": 1.0, "joint": 2 + 1 / 3}
_FORWARD = 1 / 3
# Seconds of a teacher that are worth a word.
_LONG = 300
# What makes a teacher take less, by its name.
_CHEAPER = {
    "bank": "less with fewer teacher_chains or teacher_steps, teacher_refresh 0, or teacher none",
    "elbo": "less with fewer teacher_steps, teacher bank or teacher none",
    "image_chain": "less with fewer teacher_steps, teacher bank or teacher none",
}

_CLOSING_ROWS = (
    ("head top-1", ("head", "top1")),
    ("head calibration error", ("head", "ece")),
    ("posterior top-1 (elbo)", ("posterior", "top1")),
    ("posterior calibration error", ("posterior", "ece")),
    ("generated images recognised", ("generation", "recognition_rate")),
    ("Fréchet distance / that of training images", ("generation", "frechet_ratio")),
    (
        "distance to nearest training image / that of test images",
        ("generation", "nearest_training_ratio"),
    ),
    ("evidence AUROC, random images", ("out_of_distribution", "uniform_auroc")),
    ("evidence AUROC, shuffled images", ("out_of_distribution", "shuffled_auroc")),
)


def train_and_evaluate(
    config: TrainingConfig, settings: EvaluationSettings | None = None
) -> dict[str, Any] | None:
    """Train as `config` says and evaluate.

    Args:
        config: of the training.
        settings: sizes of the evaluation; None for those that fit the run's length.

    Returns:
        The metrics, or None where `config.evaluate` is False.

    Raises:
        BlockingIOError: where another run writes to the output folder.
        ValueError, OSError, FloatingPointError: as `Trainer` and its `run`.
        MemoryError: for batches and a teacher that cannot fit, before anything is trained.
    """
    with only_writer(Path(config.output)):
        return _train_and_evaluate(config.resumed() if config.resume else config, settings)


def _train_and_evaluate(
    config: TrainingConfig, settings: EvaluationSettings | None
) -> dict[str, Any] | None:
    # What was trained on stays so when the run goes on.
    record = DataRecord.read(Path(config.output)) if config.resume else None
    with reading_progress() as progress:
        splits = load_data(
            config.data,
            image_size=config.image_size,
            split=config.split,
            record=record,
            progress=progress,
        )
    trainer = Trainer(config, splits)
    _check_memory(trainer)
    settings = settings or settings_for(splits.num_classes, scale=config.scale, seed=config.seed)
    table, remarks = _budget(trainer, settings)
    console.print(table, *remarks, sep="\n", highlight=False)
    pipeline = trainer.run()
    metrics = None
    started = time.perf_counter()
    if config.evaluate:
        with evaluation_progress() as progress:
            metrics = evaluate(
                pipeline.model,
                pipeline.scheduler,
                splits,
                Path(config.output),
                settings=settings,
                history=trainer.state.history,
                stages=STAGES,
                timings=trainer.state.seconds,
                teacher=_teacher_facts(trainer.state),
                progress=progress,
            )
    console.print(closing_table(trainer, metrics, time.perf_counter() - started))
    written = "model/, history.jsonl"
    if metrics:
        written += ", metrics.json, report.html, figures/"
    console.print(f"wrote {printable(config.output)}: {written}")
    return metrics


def _check_memory(trainer: Trainer) -> None:
    config = trainer.config
    model = trainer.model
    available = None
    if model.device.type == "cuda":
        available, _ = torch.cuda.mem_get_info(model.device)
    batch = _batch_size(trainer)
    shape = " × ".join(map(str, model.sample_shape))
    needed = batch * footprint(model).training
    what = f"a training step on {batch} images of {shape}"
    require_memory("batch_size, image_size", needed, what, available)
    needed = planned_bank_bytes(config, model.config.num_classes, model.sample_shape)
    require_memory("teacher_chains, teacher_steps", needed, "the teacher's bank", available)


def _batch_size(trainer: Trainer) -> int:
    """Images of a micro-batch; there are no more than in the data set."""
    return min(trainer.config.batch_size, len(trainer.splits.train))


def _teacher_facts(state: TrainingState) -> dict[str, float]:
    teacher = state.teacher
    if teacher is None:
        return {}
    race = {}
    if state.race_facts is not None:
        race = state.race_facts._asdict()
    return {
        "percent_of_a_training_step": state.teacher_percent,
        "network_evaluations": teacher.evaluations,
        "seconds_in_steps": teacher.in_steps.seconds,
        "seconds_apart": teacher.apart.seconds,
        "temperature": teacher.temperature,
        "calibration_top1": teacher.accuracy,
        **race,
    }


def _budget(trainer: Trainer, settings: EvaluationSettings) -> tuple[Table, list[str]]:
    """What a run will take, as a table, and remarks on it."""
    config = trainer.config
    splits = trainer.splits
    seconds = _seconds_per_pass(trainer)
    batch_size = _batch_size(trainer)
    title = printable(f"{config.data} → {config.output}")
    table = Table("stage", "steps", "time budget", title=title, title_justify="left")
    in_steps = 0.0
    for stage, steps in zip(STAGES, config.stage_steps, strict=True):
        passes = steps * config.gradient_accumulation_steps * _PASSES[stage]
        in_steps += passes * seconds
        table.add_row(stage, str(steps), _minutes(passes * seconds))
    remarks = []
    if config.teacher != "none":
        evaluations = planned_evaluations(config, splits.num_classes)
        of_teacher = evaluations / batch_size * _FORWARD * seconds
        # How much sooner a race decides, its calibration will tell.
        most = "at most " if config.teacher == "elbo" else ""
        table.add_row("teacher", "", f"{most}{_minutes(of_teacher)}")
        if of_teacher > max(in_steps, _LONG):
            remarks.append(
                f"teacher: it may take longer than all steps; {_CHEAPER[config.teacher]}"
            )
    if config.evaluate:
        batches = network_evaluations(settings, splits) / batch_size
        table.add_row("evaluation", "", _minutes(batches * _FORWARD * seconds))
        remarks.append(f"evaluation: {described(settings, splits)}; more with genrep evaluate")
    return table, remarks


def _seconds_per_pass(trainer: Trainer) -> float:
    batch_size = _batch_size(trainer)
    model = trainer.model
    x = torch.zeros(batch_size, *model.sample_shape, device=model.device)
    labels = torch.zeros(batch_size, dtype=torch.int64, device=model.device)
    seconds = []
    for _ in range(3):
        started = wall_clock(model.device)
        with trainer.accelerator.autocast():
            loss, _ = trainer.generation_loss(model, x, labels, modulate=False)
        loss.backward()
        seconds.append(wall_clock(model.device) - started)
        model.zero_grad(set_to_none=True)
    return sorted(seconds)[1]


def result_table(metrics: dict[str, Any] | None) -> Table:
    """The main results of an evaluation, for a terminal; none where `metrics` is None."""
    table = Table("result", "value", title="Result", title_justify="left")
    if metrics is None:
        return table
    for name, (group, key) in _CLOSING_ROWS:
        value = metrics[group][key]
        table.add_row(name, "undefined" if value is None else f"{value:.4f}")
    return table


def closing_table(
    trainer: Trainer, metrics: dict[str, Any] | None, evaluation_seconds: float
) -> Table:
    """Results, where there are any, and the times of a finished run."""
    table = result_table(metrics)
    for stage in STAGES:
        table.add_row(f"time, {stage}", _minutes(trainer.state.seconds[stage]))
    teacher = trainer.state.teacher
    if teacher is not None:
        outside = f"time, teacher outside the steps ({teacher.evaluations} evaluations)"
        table.add_row(outside, _minutes(teacher.apart.seconds))
        table.add_row("teacher", f"{trainer.state.teacher_percent:.1f}% of a training step")
    race = trainer.state.race_facts
    if race is not None:
        evaluations = f"{race.evaluations_an_image:.1f}"
        full = f"{race.full_budget_evaluations_an_image:.0f}"
        table.add_row("teacher, evaluations an image", f"{evaluations} (full budget: {full})")
        seconds = f"{race.seconds_a_step:.3g} s"
        full = f"{race.full_budget_seconds_a_step:.3g} s"
        table.add_row("time, teacher, a taught step", f"{seconds} (full budget: {full})")
    if metrics:
        table.add_row("time, evaluation", _minutes(evaluation_seconds))
    return table


def _minutes(seconds: float) -> str:
    return f"{seconds / 60:.1f} min" if seconds >= 60 else f"{seconds:.0f} s"


__getattr__ = forward(__name__, ("training.run",), run="train_and_evaluate")
