"""`genrep train --ablation`: the five rows of the paper's table (GenRep, ICLR 2026).

Labels are few, so that the rows can differ.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
from pathlib import Path
from typing import Any

from ..checks import check_at_least, check_seed
from ..evaluation import EvaluationSettings
from ..files import only_writer, read_json, replacing, write_atomically
from ..models import GenRep
from ..reporting.terminal import console
from .config import SavedData, TrainingConfig, saved_data
from .run import train_and_evaluate

LABELLED_PER_CLASS = 10

# What is switched on in each row; everything else, the budget of steps included, is the same.
ROWS: dict[str, dict[str, Any]] = {
    "none": {"teacher": "none", "semantic": False, "align": False},
    "+ distillation": {"semantic": False, "align": False},
    "+ semantic-driven generation": {"teacher": "none", "align": False},
    "both": {"align": False},
    "both + alignment": {},
}

# Column -> value; None where a metric is not defined.
_Metrics = dict[str, float | None]

COLUMNS = {
    "head top-1 ↑": ("head", "top1"),
    "head ECE ↓": ("head", "ece"),
    "posterior top-1 ↑": ("posterior", "top1"),
    "Fréchet ratio ↓": ("generation", "frechet_ratio"),
    "recognition ↑": ("generation", "recognition_rate"),
}


def run_ablation(config: TrainingConfig, seeds: int) -> str:
    """Run every row with `seeds` seeds, from `config.seed` on.

    Writes ablation.md and ablation.json to the output folder. Stage 0 is shared by the rows of a
    seed. A row that is complete is not run again, one that was interrupted goes on.

    Args:
        config: the run that the rows vary.
        seeds: at least 1.

    Returns:
        The table, mean ± standard deviation over the seeds, in Markdown.

    Raises:
        ValueError: for fewer than one seed, `config.evaluate` = False, and for options other than
            those of the rows that the folder holds already.
        BlockingIOError: where another run writes to the folder.
    """
    check_at_least(1, seeds=seeds)
    check_seed(config.seed + seeds - 1)
    if not config.evaluate:
        raise ValueError("evaluate must be True: the ablation's table is made of evaluations")
    with only_writer(Path(config.output)):
        return _run_ablation(config, seeds)


def _run_ablation(config: TrainingConfig, seeds: int) -> str:
    results: dict[str, list[_Metrics]] = {row: [] for row in ROWS}
    labelled = config.labelled_per_class or LABELLED_PER_CLASS
    for seed in range(config.seed, config.seed + seeds):
        base = dataclasses.replace(config, seed=seed, resume=True, labelled_per_class=labelled)
        backbone = _shared_backbone(base)
        # What the backbone was trained on is tested in no row.
        shared = saved_data(backbone.parent) or SavedData()
        base = dataclasses.replace(base, split=shared.split)
        _, perception_steps, joint_steps = base.stage_steps
        for row, switches in ROWS.items():
            folder = Path(config.output) / f"seed-{seed}" / row.replace(" ", "-")
            varied = dataclasses.replace(
                base,
                output=str(folder),
                backbone=str(backbone),
                diffusion_steps=0,
                perception_steps=perception_steps,
                joint_steps=joint_steps,
                steps=None,
                **switches,
            )
            if shared.record is not None:
                folder.mkdir(parents=True, exist_ok=True)
                shared.record.save(folder)
            console.print(f"seed {seed}: {row}")
            results[row].append(_metrics(varied))
    table = _table(results)
    folder = Path(config.output)
    write_atomically(folder / "ablation.json", json.dumps(results, indent=2))
    write_atomically(folder / "ablation.md", table)
    console.print(table, soft_wrap=True)
    return table


def _shared_backbone(config: TrainingConfig) -> Path:
    """Stage 0 of one seed; returns the folder of its backbone."""
    output = Path(config.output) / f"seed-{config.seed}" / "diffusion"
    config = dataclasses.replace(
        config,
        output=str(output),
        teacher="none",
        evaluate=False,
        diffusion_steps=config.stage_steps[0],
        perception_steps=0,
        joint_steps=0,
        steps=None,
    ).resumed()
    backbone = output / "backbone"
    if not backbone.is_dir():
        train_and_evaluate(config)
        with replacing(backbone) as unfinished:
            GenRep.from_pretrained(output / "model" / "model").backbone.save_pretrained(unfinished)
    return backbone


def _metrics(config: TrainingConfig) -> _Metrics:
    config = config.resumed()
    path = Path(config.output) / "metrics.json"
    if not path.is_file():
        train_and_evaluate(config, EvaluationSettings(elbo_steps=8, seed=config.seed))
    metrics = read_json(path)
    try:
        return {column: metrics[group][key] for column, (group, key) in COLUMNS.items()}
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path} is damaged: it lacks {error}") from error


def _table(results: dict[str, list[_Metrics]]) -> str:
    lines = ["| parts | " + " | ".join(COLUMNS) + " |", "| --- |" + " --- |" * len(COLUMNS)]
    for row, of_seeds in results.items():
        columns = [[metrics[column] for metrics in of_seeds] for column in COLUMNS]
        cells = map(_mean_and_deviation, columns)
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def _mean_and_deviation(values: list[float | None]) -> str:
    defined = [value for value in values if value is not None]
    if len(defined) < len(values):
        return "undefined"
    deviation = f" ± {statistics.stdev(defined):.4f}" if len(defined) > 1 else ""
    return f"{statistics.mean(defined):.4f}{deviation}"
