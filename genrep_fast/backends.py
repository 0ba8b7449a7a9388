"""The choice of the implementation that an operator runs.

Every operator is defined once, as ``torch.ops.genrep_fast.<name>`` (`define_operator`), with its plain-PyTorch reference. Other backends
add themselves with `register_implementation`; callers never name one. At each call the tensors' device picks the fastest backend that holds
the operator, unless `use_backend` or the environment variable ``GENREP_FAST_BACKEND`` insists on one. Which one is the fastest on a GPU was
measured: gpu_backends.json holds, by compute capability and operator, up to how many elements of the largest argument which one is.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import os
import platform
import shlex
import sys
from collections.abc import Callable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

_OLDEST_TORCH = "2.11"
if [int(part) for part in torch.__version__.split(".")[:2]] < [int(part) for part in _OLDEST_TORCH.split(".")]:
    raise ImportError(f"genrep_fast needs torch {_OLDEST_TORCH} or newer, this is torch {torch.__version__}")

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Fastest first, where nothing was measured; "reference" runs on every device and stands behind all of them.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# Why a backend holds no operator at all; a backend that registers one leaves this table.
_unavailable: dict[str, str] = {}

_PLAIN_TENSORS = (torch.Tensor, torch.nn.Parameter)
schemas: dict[str, str] = {}  # operator -> schema, as given to `define_operator`
_implementations: dict[str, dict[str, Callable]] = {}  # operator -> backend -> function
_insisted: contextvars.ContextVar[str | None] = contextvars.ContextVar("genrep_fast_backend", default=None)
# A fragment, so that an import that failed halfway can be tried again.
_library = torch.library.Library("genrep_fast", "FRAGMENT")


class BackendUnavailableError(RuntimeError):
    """A backend was insisted on that cannot run the operator; the message says why."""


def define_operator(
    schema: str,
    *,
    reference: Callable,
    fake: Callable,
    backward: Callable | None = None,
    setup_context: Callable | None = None,
    data: tuple[int, ...] = (0,),
) -> Callable:
    """Define ``genrep_fast::<schema>`` once: schema, fake, autograd, and `reference` as its first implementation.

    Args:
        schema: the operator's schema without the namespace, e.g. ``"gram(Tensor[] gradients, int n) -> Tensor"``.
        reference: plain-PyTorch function with the schema's arguments; the operator's definition.
        fake: function of the same arguments that returns empty outputs of the right shape, dtype and device.
        backward: ``backward(ctx, *grads)`` as `torch.library.register_autograd` wants it; None where no gradient flows.
        setup_context: ``setup_context(ctx, inputs, output)``, required with `backward`.
        data: positions of the tensor arguments that hold the user's data: where one of their tensors is float64, the reference runs.

    Returns:
        The operator: a function of the overload's positional arguments that calls ``torch.ops.genrep_fast.<name>.default``, or goes around
        the dispatcher where neither autograd nor tracing needs it.
    """
    name = schema.partition("(")[0]
    schemas[name] = schema
    _library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
    register_implementation(name, "reference", reference)

    def run(*args: Any, **kwargs: Any) -> Any:
        arguments = (*args, *kwargs.values())
        device = _first_tensor(arguments).device
        device_type, float64 = device.type, any(_holds_float64(arguments[position]) for position in data)
        fastest = _fastest_measured(name, device, arguments) if device_type == "cuda" else None
        implementation = select_implementation(name, device_type, float64, fastest)
        if not torch.is_autocast_enabled(device_type):
            return implementation(*args, **kwargs)
        # Autocast would run the inner matrix products of an operator in bfloat16, whatever its inputs.
        with torch.autocast(device_type, enabled=False):
            return implementation(*args, **kwargs)

    _library.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"genrep_fast::{name}", fake, lib=_library)
    if backward is not None:
        torch.library.register_autograd(f"genrep_fast::{name}", backward, setup_context=setup_context, lib=_library)
    overload = getattr(torch.ops.genrep_fast, name).default

    def call(*args: Any) -> Any:
        # The dispatcher, and autograd's part in Python, take longer than a small operator: only tracing and gradients need them.
        if _is_traced(args) or backward is not None and torch.is_grad_enabled() and any(map(_requires_grad, args)):
            return overload(*args)
        return run(*args)

    return call


def register_implementation(name: str, backend: str, implementation: Callable) -> None:
    """Add `implementation` of the operator `name` for `backend`, one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    _implementations.setdefault(name, {})[backend] = implementation
    _unavailable.pop(backend, None)


def set_unavailable(backend: str, reason: str) -> None:
    """Say why `backend`, which has registered nothing, cannot run; the reason continues "backend 'cuda' was asked for, but"."""
    _unavailable[backend] = reason


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Insist on one backend for every operator called inside the block.

    Args:
        backend: "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: for any other name.
        BackendUnavailableError: where the backend is not built or did not load; operators raise it where the backend lacks just them.
    """
    _require_backend(backend, "backend")
    token = _insisted.set(backend)
    try:
        yield
    finally:
        _insisted.reset(token)


def insisted_backend() -> str | None:
    """The backend of the innermost `use_backend`, None outside of any."""
    return _insisted.get()


def info() -> dict[str, Any]:
    """Versions, and what is built, what loaded, and why the rest did not.

    Returns:
        A dictionary with the keys ``genrep_fast``, ``torch``, ``cuda`` (of torch, or None), ``triton`` (or None), ``python``, ``platform``
        (strings), ``built`` (what the build noted down: libraries, torch of the headers and oldest torch, compilers, architectures, oldest
        NVIDIA driver; None for an installation without native code), ``backends`` and ``reproduce`` (the command that prints the same in
        this environment). For each backend: ``available`` (bool), ``operators`` (their names), ``reason`` (a string where it is not
        available, else None) and ``build`` (what the loaded library says of itself, for "cpu" the instruction set that it runs in too;
        None where there is none, or where the wheel's optional module is of another Python).
    """
    from . import __version__
    from .native import build_information, build_record

    backends = {
        backend: {
            "available": backend not in _unavailable,
            "operators": sorted(name for name, by_backend in _implementations.items() if backend in by_backend),
            "reason": _unavailable.get(backend),
            "build": build_information(backend) if backend in ("cpu", "cuda") and backend not in _unavailable else None,
        }
        for backend in BACKENDS
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
        "reproduce": " ".join([*_settings(), shlex.quote(sys.executable), "-m", "genrep_fast", "info", "--json"]),
    }


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _settings() -> list[str]:
    """NAME=value of every environment variable that changes what `info` tells."""
    return [
        f"{name}={shlex.quote(value)}"
        for name, value in sorted(os.environ.items())
        if name.startswith("GENREP_FAST_") or name in ("TRITON_INTERPRET", "CUDA_VISIBLE_DEVICES")
    ]


def select_implementation(name: str, device_type: str, float64: bool, fastest: str | None = None) -> Callable:
    """The function that the operator `name` runs now, for tensors on `device_type`, with user's data in float64 or not.

    `fastest`: the backend to take where it is there and none is insisted on.

    Raises:
        BackendUnavailableError: where a backend is insisted on that cannot run it.
    """
    by_backend = _implementations[name]
    insisted = _insisted.get() or os.environ.get("GENREP_FAST_BACKEND")
    if insisted:
        _require_backend(insisted, "GENREP_FAST_BACKEND")
        if insisted not in by_backend:
            raise BackendUnavailableError(f"backend {insisted!r} was asked for, but it does not implement {name}")
        if not _runs_on(insisted, device_type):
            raise BackendUnavailableError(f"backend {insisted!r} was asked for, but {name} got tensors on {device_type}")
        if insisted != "reference" and float64:
            raise BackendUnavailableError(f"backend {insisted!r} was asked for, but {name} in float64 runs on the reference alone")
        return by_backend[insisted]
    if not float64:
        for backend in (fastest, *_PREFERENCE.get(device_type, ())):
            if backend in by_backend:
                return by_backend[backend]
    return by_backend["reference"]


@functools.cache
def _measured_on(device_index: int) -> dict[str, list[tuple[int | None, str]]]:
    """Operator -> [(number of elements, backend that is the fastest up to it)], the last one for any number."""
    measured = json.loads(Path(__file__).with_name("gpu_backends.json").read_text())
    return measured.get("{}.{}".format(*torch.cuda.get_device_capability(device_index)), {})


def _fastest_measured(name: str, device: torch.device, arguments: tuple) -> str | None:
    steps = _measured_on(device.index).get(name)
    if steps is None:
        return None
    if len(steps) == 1:
        return steps[0][1]
    lists = [argument if isinstance(argument, (list, tuple)) else (argument,) for argument in arguments]
    elements = max(sum(value.numel() for value in values if isinstance(value, torch.Tensor)) for values in lists)
    return next(backend for most, backend in steps if most is None or elements <= most)


def _runs_on(backend: str, device_type: str) -> bool:
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return backend == "reference" or backend in _PREFERENCE.get(device_type, ()) or interpreted and device_type == "cpu"


def _require_backend(backend: str, argument: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in _unavailable:
        raise BackendUnavailableError(f"backend {backend!r} was asked for, but {_unavailable[backend]}")


def _is_traced(arguments: tuple) -> bool:
    return (
        torch.compiler.is_compiling()
        or torch._C._len_torch_dispatch_stack() > 0
        or torch._C._are_functorch_transforms_active()
        or type(_first_tensor(arguments)) not in _PLAIN_TENSORS
    )


def _requires_grad(argument: Any) -> bool:
    return isinstance(argument, torch.Tensor) and argument.requires_grad


def _first_tensor(arguments: tuple) -> torch.Tensor:
    for argument in arguments:
        for value in argument if isinstance(argument, (list, tuple)) else (argument,):
            if isinstance(value, torch.Tensor):
                return value
    raise ValueError("an operator needs at least one tensor, got none")


def _holds_float64(argument: Any) -> bool:
    tensors = argument if isinstance(argument, (list, tuple)) else (argument,)
    return torch.float64 in [tensor.dtype for tensor in tensors if tensor is not None]
