"""What is built, what loaded, and why the rest did not: `genrep_fast.info`."""

from __future__ import annotations

import os
import platform
import shlex
import sys
from importlib import metadata
from typing import Any

import torch

from .._version import __version__
from .libraries import build_information, build_record
from .selection import BACKENDS, operators_of, reason_unavailable


def info() -> dict[str, Any]:
    """Versions, and what is built, what loaded, and why the rest did not.

    Returns:
        A dictionary with the keys ``genrep_fast``, ``torch``, ``cuda`` (of torch, or None),
        ``triton`` (or None), ``python``, ``platform`` (strings), ``built`` (what the build noted
        down: libraries, torch of the headers and oldest torch, compilers, architectures, oldest
        NVIDIA driver; None for an installation without native code), ``backends`` and ``reproduce``
        (the command that prints the same in this environment). For each backend: ``available``
        (bool), ``operators`` (their names), ``reason`` (a string where it is not available, else
        None) and ``build`` (what the loaded library says of itself, for "cpu" the instruction set
        that it runs in too; None where there is none, or where the wheel's optional module is of
        another Python).
    """
    command = [*_settings(), shlex.quote(sys.executable), "-m", "genrep_fast", "info", "--json"]
    backends = {}
    for backend in BACKENDS:
        reason = reason_unavailable(backend)
        has_build = backend in ("cpu", "cuda") and reason is None
        backends[backend] = {
            "available": reason is None,
            "operators": operators_of(backend),
            "reason": reason,
            "build": build_information(backend) if has_build else None,
        }
    return {
        "genrep_fast": __version__,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _installed("triton"),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "built": build_record(),
        "backends": backends,
        "reproduce": " ".join(command),
    }


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _settings() -> list[str]:
    """NAME=value of every environment variable that changes what `info` tells."""
    settings = []
    for name, value in sorted(os.environ.items()):
        if name.startswith("GENREP_FAST_") or name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES"):
            settings.append(f"{name}={shlex.quote(value)}")
    return settings
