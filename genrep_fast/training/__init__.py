"""Training of GenRep on Hugging Face Accelerate; `Trainer` imports it when it is first used."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from .config import TrainingConfig

if TYPE_CHECKING:
    from .trainer import Trainer

__all__ = ["TrainingConfig", "Trainer"]


def __getattr__(name: str) -> type[Trainer]:
    if name == "Trainer":
        return import_module("genrep_fast.training.trainer").Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
