"""Training of GenRep on Hugging Face Accelerate; `Trainer` imports it when it is first used."""

from __future__ import annotations

from importlib import import_module

from .config import TrainingConfig

__all__ = ["TrainingConfig", "Trainer"]


def __getattr__(name: str):
    if name == "Trainer":
        return import_module("genrep_fast.training.trainer").Trainer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
