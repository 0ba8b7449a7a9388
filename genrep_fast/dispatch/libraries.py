"""Loads the compiled libraries, and registers what they and the Triton kernels implement."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from .flat_memory import on_flat_memory, refusing_kernel
from .list_checks import LISTS_FIT, register_list_check
from .operators import schemas
from .selection import register_implementation, set_unavailable

_CAPABILITIES = ("default", "avx2", "avx512")

_FOLDER = Path(__file__).parent.parent

# File of kernels -> operators.
_TRITON_MODULES = {
    "alignment": ("gram", "group_gram", "alignment_coefficients", "tensor_coefficients", "combine"),
    "optimizer": ("adamw_step",),
    "scoring": ("log_likelihood", "score_update"),
    "scoring_backward": ("log_likelihood_backward",),
    "posterior": ("posterior", "distillation_loss", "distillation_loss_backward"),
    "reverse_step": ("reverse_step",),
}


def register_backends() -> None:
    """Register every implementation that can run with this torch.

    The reason of each one that cannot goes to `genrep_fast.info`.
    """
    for backend in ("cpu", "cuda"):
        reason = _load(backend)
        if reason is not None:
            set_unavailable(backend, reason)
    reason = _register_triton()
    if reason is not None:
        set_unavailable("triton", reason)


def build_information(backend: str) -> dict[str, Any] | None:
    """What the library of "cpu" or "cuda" was built with and runs as.

    None where it is not loaded or this Python cannot ask it.
    """
    try:
        introspection = import_module("genrep_fast._introspection")
        symbol = f"genrep_fast_{backend}_build_information"
        return json.loads(introspection.describe(str(_library(backend)), symbol))
    except (ImportError, RuntimeError):
        return None


def build_record() -> dict[str, Any] | None:
    """What the build (csrc/build.py) noted down.

    Libraries, torch of the headers and oldest torch, compilers, architectures, driver.
    """
    path = _FOLDER / "build.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _load(backend: str) -> str | None:
    """Load the library of `backend` and register its operators; the reason where that fails."""
    record = build_record() or {}
    if not _library(backend).is_file():
        return f"it was not built: {_library(backend).name} is not in {_FOLDER}"
    capability = os.environ.get("GENREP_FAST_CPU_CAPABILITY") or _CAPABILITIES[-1]
    if backend == "cpu" and capability not in _CAPABILITIES:
        allowed = ", ".join(_CAPABILITIES)
        return f"GENREP_FAST_CPU_CAPABILITY must be one of {allowed}, got {capability!r}"
    if backend == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    if backend == "cuda":
        driver = _driver()
        needed = record.get("minimum_driver")
        if driver and needed and driver < needed:
            return f"it needs NVIDIA's driver {needed} or newer, this is {driver}"
    namespace = f"genrep_fast_{backend}"
    definitions = torch.library.Library(namespace, "FRAGMENT")
    for schema in schemas.values():
        definitions.define(schema)
    if backend == "cpu":
        definitions.define(LISTS_FIT)
    try:
        torch.ops.load_library(_library(backend))
    except OSError as error:
        target = record.get("torch_target", "2.11")
        library = f"its library, built for torch {target} and newer"
        # The text alone: an exception that is kept keeps this frame, hence the definitions.
        why = str(error.__cause__ or error)
        return f"{library}, did not load in torch {torch.__version__}: {why}"
    _definitions.append(definitions)
    has_kernel = torch._C._dispatch_has_kernel_for_dispatch_key
    for name in schemas:
        if has_kernel(f"{namespace}::{name}", backend.upper()):
            kernel = getattr(getattr(torch.ops, namespace), name).default
            # The kernels of tensor lists in csrc/cpu check the layouts themselves.
            adapted = refusing_kernel if backend == "cpu" else on_flat_memory
            register_implementation(name, backend, adapted(name, kernel))
    if backend == "cpu" and has_kernel(f"{namespace}::lists_fit", "CPU"):
        register_list_check(torch.ops.genrep_fast_cpu.lists_fit.default)
    return None


# A library that is collected takes its definitions with it.
_definitions: list[torch.library.Library] = []


def _driver() -> int | None:
    """Major version of NVIDIA's driver, None where it is not told; asks no device."""
    try:
        found = re.search(r"(\d+)\.\d+", Path("/proc/driver/nvidia/version").read_text())
    except OSError:
        return None
    return int(found[1]) if found else None


def _library(backend: str) -> Path:
    return _FOLDER / f"_C_{backend}.so"


def _register_triton() -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    if torch.version.cuda is None and os.environ.get("TRITON_INTERPRET") != "1":
        return "this torch is built without CUDA"
    for module, names in _TRITON_MODULES.items():
        for name in names:
            kernel = _imported_at_first_call(module, name)
            register_implementation(name, "triton", on_flat_memory(name, kernel))
    return None


def _imported_at_first_call(module: str, name: str) -> Callable[..., Any]:
    """Function `name` of a module of kernels; importing one imports Triton."""

    def call(*arguments: Any) -> Any:
        return getattr(import_module(f"genrep_fast.kernels.{module}"), name)(*arguments)

    return call
