"""The commands of `genrep`, a module each: a function, and arguments that its signature lacks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from . import bench, calibrate, classify, evaluate, generate, info, train

COMMANDS: dict[str, Callable[..., None]] = {
    "train": train.train,
    "evaluate": evaluate.evaluate,
    "classify": classify.classify,
    "calibrate": calibrate.calibrate,
    "generate": generate.generate,
    "bench": bench.bench,
    "info": info.info,
}

# Flags and lists as shells have them; the rest follows from the signatures.
ARGUMENTS: dict[str, dict[str, dict[str, Any]]] = {
    "train": train.ARGUMENTS,
    "evaluate": {},
    "classify": classify.ARGUMENTS,
    "calibrate": calibrate.ARGUMENTS,
    "generate": generate.ARGUMENTS,
    "bench": bench.ARGUMENTS,
    "info": info.ARGUMENTS,
}
