"""`genrep train`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

from ..training.config import TrainingConfig

ARGUMENTS: dict[str, dict[str, Any]] = {
    "ablation": {
        "action": "store_true",
        "help": "run the five rows of the paper's ablation, each with as many seeds, "
        "and write the table",
    },
    "resume": {
        "action": "store_true",
        "help": "go on from the newest checkpoint in the output folder, "
        "with the options of its run; start where there is none",
    },
}


def train(ablation: bool = False, seeds: int = 3, **options: Any) -> None:
    """Train a GenRep in three stages, evaluate it and write a report.

    Args:
        seeds: of the ablation.
    """
    config = TrainingConfig(**options)
    try:
        if ablation:
            from ..training.ablation import run_ablation

            run_ablation(config, seeds)
        else:
            from ..training.run import train_and_evaluate

            train_and_evaluate(config)
    except KeyboardInterrupt as error:
        raise KeyboardInterrupt(_kept(config, ablation)) from error


def _kept(config: TrainingConfig, ablation: bool) -> str:
    """What an interrupted run leaves, and how it goes on."""
    from ..training.checkpoints import newest_checkpoint

    output = shlex.quote(config.output)
    if ablation:
        return f"interrupted; what is complete is kept in {output}, the same command goes on"
    newest = newest_checkpoint(Path(config.output))
    if newest is None:
        return f"interrupted before the first step; nothing is kept in {output}"
    kept = f"interrupted; the run is kept in {output} up to {newest.name}"
    return f"{kept}, go on with: genrep train --resume --output {output}"
