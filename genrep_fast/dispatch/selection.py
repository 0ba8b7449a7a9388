"""The choice of the implementation that an operator runs.

At each call the tensors' device picks the fastest backend that holds the operator, unless
`use_backend` or the environment variable ``GENREP_FAST_BACKEND`` insists on one. Which one is the
fastest on a GPU was measured: gpu_backends.json holds, by compute capability and operator, up to
how many elements of the largest argument which one is.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

BACKENDS = ("reference", "cpu", "triton", "cuda")

# Fastest first, where nothing was measured; "reference" runs on every device and stands behind all
# of them.
_PREFERENCE = {"cpu": ("cpu", "reference"), "cuda": ("cuda", "triton", "reference")}

# Why a backend holds no operator at all; a backend that registers one leaves this table.
_unavailable: dict[str, str] = {}

# Operator -> backend -> function.
_implementations: dict[str, dict[str, Callable[..., Any]]] = {}

_insisted: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "genrep_fast_backend", default=None
)


class BackendUnavailableError(RuntimeError):
    """A backend was insisted on that cannot run the operator; the message says why."""


def register_implementation(name: str, backend: str, implementation: Callable[..., Any]) -> None:
    """Add `implementation` of the operator `name` for `backend`, one of `BACKENDS`."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")
    _implementations.setdefault(name, {})[backend] = implementation
    _unavailable.pop(backend, None)


def set_unavailable(backend: str, reason: str) -> None:
    """Say why `backend`, which has registered nothing, cannot run.

    The reason continues "backend 'cuda' was asked for, but".
    """
    _unavailable[backend] = reason


@contextlib.contextmanager
def use_backend(backend: str) -> Iterator[None]:
    """Insist on one backend for every operator called inside the block.

    Args:
        backend: "reference", "cpu", "triton" or "cuda".

    Raises:
        ValueError: for any other name.
        BackendUnavailableError: where the backend is not built or did not load; operators raise it
            where the backend lacks just them.
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


def require_reference(name: str) -> None:
    """Raise BackendUnavailableError where another backend than the reference is insisted on."""
    insisted = _insisted.get() or os.environ.get("GENREP_FAST_BACKEND")
    if insisted not in (None, "", "reference"):
        raise BackendUnavailableError(
            f"backend {insisted!r} was asked for, but {name} runs on the reference alone inside a "
            "transform of torch.func and in forward-mode differentiation"
        )


def select_implementation(
    name: str, device_type: str, float64: bool, fastest: str | None = None
) -> Callable[..., Any]:
    """The function that the operator `name` runs now, for tensors on `device_type`.

    `float64`: whether the user's data are in float64. `fastest`: the backend to take where it is
    there and none is insisted on.

    Raises:
        BackendUnavailableError: where a backend is insisted on that cannot run it.
    """
    by_backend = _implementations[name]
    insisted = _insisted.get() or os.environ.get("GENREP_FAST_BACKEND")
    if insisted:
        _require_backend(insisted, "GENREP_FAST_BACKEND")
        if insisted not in by_backend:
            raise BackendUnavailableError(
                f"backend {insisted!r} was asked for, but it does not implement {name}"
            )
        if not _runs_on(insisted, device_type):
            raise BackendUnavailableError(
                f"backend {insisted!r} was asked for, but {name} got tensors on {device_type}"
            )
        if insisted != "reference" and float64:
            raise BackendUnavailableError(
                f"backend {insisted!r} was asked for, "
                f"but {name} in float64 runs on the reference alone"
            )
        return by_backend[insisted]
    if not float64:
        for backend in (fastest, *_PREFERENCE.get(device_type, ())):
            if backend in by_backend:
                return by_backend[backend]
    return by_backend["reference"]


class FastestUpTo(NamedTuple):
    """The backend that was measured as the fastest for an operator's arguments up to a size.

    Attributes:
        num_elements: of the largest argument; None for any number.
        backend: one of `BACKENDS`.
    """

    num_elements: int | None
    backend: str

    def holds_for(self, num_elements: int) -> bool:
        """Whether it is the fastest where the largest argument has so many elements."""
        return self.num_elements is None or num_elements <= self.num_elements


@functools.cache
def _measured_on(device_index: int) -> dict[str, list[FastestUpTo]]:
    """What was measured on GPUs like this one: operator -> sizes upwards, the last for any size."""
    by_capability = json.loads((Path(__file__).parents[1] / "gpu_backends.json").read_text())
    major, minor = torch.cuda.get_device_capability(device_index)
    measured = by_capability.get(f"{major}.{minor}", {})
    return {name: [FastestUpTo(*row) for row in rows] for name, rows in measured.items()}


def fastest_measured(name: str, device: torch.device, arguments: tuple[object, ...]) -> str | None:
    """The backend measured as the fastest for these arguments; None without a measurement."""
    measured = _measured_on(device.index).get(name)
    if measured is None:
        return None
    if len(measured) == 1:
        return measured[0].backend
    num_elements = max(map(_num_elements, arguments))
    return next(fastest.backend for fastest in measured if fastest.holds_for(num_elements))


def _num_elements(argument: object) -> int:
    """Elements of the tensors of one argument."""
    values = argument if isinstance(argument, (list, tuple)) else (argument,)
    return sum(value.numel() for value in values if isinstance(value, torch.Tensor))


def _runs_on(backend: str, device_type: str) -> bool:
    if backend == "reference" or backend in _PREFERENCE.get(device_type, ()):
        return True
    interpreted = backend == "triton" and os.environ.get("TRITON_INTERPRET") == "1"
    return interpreted and device_type == "cpu"


def _require_backend(backend: str, argument: str) -> None:
    if backend not in BACKENDS:
        raise ValueError(f"{argument} must be one of {', '.join(BACKENDS)}, got {backend!r}")
    if backend in _unavailable:
        raise BackendUnavailableError(
            f"backend {backend!r} was asked for, but {_unavailable[backend]}"
        )


def operators_of(backend: str) -> list[str]:
    """Names of the operators that `backend` implements."""
    return sorted(name for name, by_backend in _implementations.items() if backend in by_backend)


def reason_unavailable(backend: str) -> str | None:
    """Why `backend` cannot run at all; None where it can."""
    return _unavailable.get(backend)
