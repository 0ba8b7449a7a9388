"""Checkpoints of a run: folders ``checkpoints/step-N`` that appear whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from accelerate import Accelerator

if TYPE_CHECKING:
    from .trainer import TrainingState

_KEPT = 2


def save_checkpoint(output: Path, accelerator: Accelerator, state: TrainingState) -> Path:
    """Write a checkpoint next to the others, let it appear under its name in one rename, and drop all but the newest two."""
    folder = output / "checkpoints"
    temporary, final = folder / "unfinished", folder / f"step-{state.step:07d}"
    shutil.rmtree(temporary, ignore_errors=True)
    accelerator.save_state(temporary)
    if state.teacher is not None:
        state.teacher.save(temporary)
    temporary.rename(final)
    for old in _checkpoints(output)[:-_KEPT]:
        shutil.rmtree(old)
    return final


def load_checkpoint(checkpoint: Path, accelerator: Accelerator, state: TrainingState) -> None:
    """Restore model, optimizer, schedule and `state`; raises ValueError with the folder's name where it is damaged."""
    try:
        accelerator.load_state(checkpoint)
        if state.teacher is not None:
            state.teacher.load(checkpoint)
    except Exception as error:
        raise ValueError(
            f"checkpoint {checkpoint} cannot be read ({type(error).__name__}: {error}); delete it to resume from the one before"
        ) from error


def newest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint in the output folder of a run, or None."""
    found = _checkpoints(output)
    return found[-1] if found else None


def _checkpoints(output: Path) -> list[Path]:
    return sorted((output / "checkpoints").glob("step-*"))
