"""Loads the compiled libraries, and registers what they and the Triton kernels implement.

Kernels see flat memory. The tensors that belong together (gradients of one parameter, its output, its optimizer state) are therefore
handed on as they are where they share one dense memory layout, and through contiguous copies where they do not.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .backends import register_implementation, schemas, set_unavailable

_CAPABILITIES = ("default", "avx2", "avx512")
_FOLDER = Path(__file__).parent


class _TensorLists(NamedTuple):
    """Positions of the arguments that hold T tensors, or T for each loss."""

    inputs: tuple[int, ...]
    outputs: tuple[int, ...]
    groups: int  # position of an argument of length T


_LISTS = {
    "gram": _TensorLists(inputs=(0,), outputs=(), groups=2),
    "combine": _TensorLists(inputs=(0,), outputs=(4,), groups=2),
    "adamw_step": _TensorLists(inputs=(4,), outputs=(0, 1, 2, 3), groups=6),
}
_TRITON_MODULES = {  # file of kernels -> operators
    "alignment": ("gram", "group_gram", "alignment_coefficients", "tensor_coefficients", "combine"),
    "optimizer": ("adamw_step",),
    "scoring": ("log_likelihood", "log_likelihood_backward", "score_update"),
    "posterior": ("posterior", "distillation_loss", "distillation_loss_backward"),
    "reverse_step": ("reverse_step",),
}


def register_backends() -> None:
    """Register every implementation that can run with this torch; the reason of each one that cannot goes to `genrep_fast.info`."""
    for backend in ("cpu", "cuda"):
        reason = _load(backend)
        if reason is not None:
            set_unavailable(backend, reason)
    reason = _register_triton()
    if reason is not None:
        set_unavailable("triton", reason)


def build_information(backend: str) -> dict[str, Any] | None:
    """What the library of "cpu" or "cuda" was built with and runs as; None where it is not loaded or this Python cannot ask it."""
    try:
        introspection = import_module("genrep_fast._introspection")
        return json.loads(introspection.describe(str(_library(backend)), f"genrep_fast_{backend}_build_information"))
    except (ImportError, RuntimeError):
        return None


def build_record() -> dict[str, Any] | None:
    """What the build (csrc/build.py) noted down: libraries, torch of the headers and oldest torch, compilers, architectures, driver."""
    path = _FOLDER / "build.json"
    return json.loads(path.read_text()) if path.is_file() else None


def _load(backend: str) -> str | None:
    """Load the library of `backend` and register its operators; the reason why not, where that fails."""
    record = build_record() or {}
    if not _library(backend).is_file():
        return f"it was not built: {_library(backend).name} is not in {_FOLDER}"
    capability = os.environ.get("GENREP_FAST_CPU_CAPABILITY") or _CAPABILITIES[-1]
    if backend == "cpu" and capability not in _CAPABILITIES:
        return f"GENREP_FAST_CPU_CAPABILITY must be one of {', '.join(_CAPABILITIES)}, got {capability!r}"
    if backend == "cuda" and torch.version.cuda is None:
        return "this torch is built without CUDA"
    if backend == "cuda" and (driver := _driver()) and driver < (record.get("minimum_driver") or 0):
        return f"it needs NVIDIA's driver {record['minimum_driver']} or newer, this is {driver}"
    namespace = f"genrep_fast_{backend}"
    definitions = torch.library.Library(namespace, "FRAGMENT")
    for schema in schemas.values():
        definitions.define(schema)
    try:
        torch.ops.load_library(_library(backend))
    except OSError as error:
        target = record.get("torch_target", "2.11")
        return f"its library, built for torch {target} and newer, did not load in torch {torch.__version__}: {error.__cause__ or error}"
    _definitions.append(definitions)
    for name in schemas:
        if torch._C._dispatch_has_kernel_for_dispatch_key(f"{namespace}::{name}", backend.upper()):
            register_implementation(name, backend, _on_flat_memory(name, getattr(getattr(torch.ops, namespace), name).default))
    return None


_definitions: list[torch.library.Library] = []  # a library that is collected takes its definitions with it


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
            register_implementation(name, "triton", _on_flat_memory(name, _imported_at_first_call(module, name)))
    return None


def _imported_at_first_call(module: str, name: str) -> Callable:
    """Function `name` of a module of kernels; importing one imports Triton."""

    def call(*arguments):
        return getattr(import_module(f"genrep_fast.kernels.{module}"), name)(*arguments)

    return call


def _on_flat_memory(name: str, kernel: Callable) -> Callable:
    lists = _LISTS.get(name)
    if lists is None:
        return kernel

    def call(*arguments):
        positions = (*lists.inputs, *lists.outputs)
        written = [tensor for position in lists.outputs for tensor in arguments[position]]
        copies: list[tuple[Tensor, Tensor]] = []
        if not all(tensor is None or tensor.is_contiguous() for position in positions for tensor in arguments[position]):
            arguments, copies = _flatten(list(arguments), lists)
        result = kernel(*arguments)
        for tensor, copy in copies:
            tensor.copy_(copy)
        if written:  # autograd is to see changes of tensors that it saved, as after any operation in place
            torch.autograd.graph.increment_version(written)
        return result

    return call


def _flatten(arguments: list, lists: _TensorLists) -> tuple[list, list[tuple[Tensor, Tensor]]]:
    """Arguments in which tensors that belong together have one dense layout, and the outputs that are copies, behind their originals."""
    positions, num_tensors = (*lists.inputs, *lists.outputs), len(arguments[lists.groups])
    for position in positions:
        arguments[position] = list(arguments[position])
    copies = []
    for t in range(num_tensors):
        places = [(p, i) for p in positions for i in range(t, len(arguments[p]), num_tensors) if arguments[p][i] is not None]
        if _share_dense_layout([arguments[p][i] for p, i in places]):
            continue
        for p, i in places:
            original = arguments[p][i]
            arguments[p][i] = original.contiguous()
            if p in lists.outputs and not original.is_contiguous():
                copies.append((original, arguments[p][i]))
    return arguments, copies


def _share_dense_layout(tensors: list[Tensor]) -> bool:
    if all(tensor.is_contiguous() for tensor in tensors):
        return True
    strides = tensors[0].stride()
    # empty_like keeps the strides of dense tensors, and no others.
    return all(tensor.stride() == strides for tensor in tensors) and torch.empty_like(tensors[0], device="meta").stride() == strides
