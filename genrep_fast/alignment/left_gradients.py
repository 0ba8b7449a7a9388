"""What stays in ``.grad`` between collecting gradients and the step, and what became of it."""

from __future__ import annotations

import enum
from collections.abc import Sequence

import torch
from torch import Tensor

from .groups import label
from .sharded_tensors import local_parts
from .wrappers import is_sharded

# As many of a gradient's values are compared with what they were.
_WATCHED_ELEMENTS = 4096

_CHANGED = (
    "a .grad was written to, replaced or set to None after its gradient had been "
    "collected, which does not change what the aligner holds: "
    "write to .grad inside the block of collect, clip with max_norm, "
    "or start the step over with zero_grad()"
)


class Fate(enum.Enum):
    """What became of gradients that were left in ``.grad``."""

    KEPT = enum.auto()
    DROPPED = enum.auto()
    CHANGED = enum.auto()


class LeftGradients:
    """Gradients that stay in ``.grad`` between two blocks, so that changes to them are noticed.

    They are the collected tensors themselves. The values of the watched ones, or a part of them,
    are compared, since a write through ``.data`` counts no version.

    Args:
        parameters, names: of the aligner.
    """

    def __init__(self, parameters: Sequence[Tensor], names: Sequence[str | None]) -> None:
        self._all = parameters
        self._names = names
        self._sharded = any(map(is_sharded, parameters))
        self.clear()

    def clear(self) -> None:
        """Forget what was left, and leave it where it is."""
        self._parameters: list[Tensor] = []
        self._gradients: list[Tensor] = []
        # What this process holds of them.
        self._local: list[Tensor] = []
        # Counts of the writes to them.
        self._versions: list[int] = []
        self._of: dict[int, Tensor] = {}
        # Parts of what was left, and copies.
        self._watched: list[tuple[Tensor, Tensor]] = []

    def leave(
        self,
        parameters: list[Tensor],
        gradients: list[Tensor],
        watched: list[Tensor],
    ) -> None:
        """Put `gradients` into the ``.grad`` of `parameters`.

        `watched` are some of them, or what this process holds of some that are DTensors.
        """
        self.clear()
        for parameter, gradient in zip(parameters, gradients, strict=True):
            if parameter.grad is not gradient:
                parameter.grad = gradient
        self._parameters, self._gradients = parameters, gradients
        # A write to a DTensor and one to its local part count apart.
        self._local = local_parts(gradients) if self._sharded else gradients
        self._versions = self._current_versions()
        self._of = dict(zip(map(id, parameters), gradients, strict=True))
        parts = map(_part, watched)
        self._watched = [(part, part.clone()) for part in parts]

    def take_back(self) -> None:
        """Take away what was left, where it still lies."""
        for parameter, gradient in zip(self._parameters, self._gradients, strict=True):
            if parameter.grad is gradient:
                parameter.grad = None
        self.clear()

    def check_alone(self, problem: str) -> None:
        """Raise RuntimeError, ending with `problem`, for a ``.grad`` that was not left there."""
        for index, parameter in enumerate(self._all):
            gradient = parameter.grad
            if gradient is not None and self._of.get(id(parameter)) is not gradient:
                raise RuntimeError(f"{label(self._names, index)} holds a .grad {problem}")

    def check(self, *, written_by_scaler: bool = False) -> Fate:
        """Whether all is as it was left, or gone or zeroed as by ``zero_grad``.

        Raises RuntimeError for anything else; for values that have changed unseen on a GPU, when
        the device gets there. A GradScaler that looked for non-finite values wrote the values that
        were there.
        """
        fate = self._fate(written_by_scaler)
        if fate is Fate.CHANGED:
            raise RuntimeError(_CHANGED)
        if fate is Fate.KEPT:
            for gradient, copy in self._watched:
                same = (gradient == copy) | (gradient.isnan() & copy.isnan())
                torch._assert_async(same.all(), _CHANGED)
        return fate

    def _fate(self, written_by_scaler: bool) -> Fate:
        now = [parameter.grad for parameter in self._parameters]
        if any(gradient is not left for gradient, left in zip(now, self._gradients, strict=True)):
            gone = all(gradient is None for gradient in now)
            return Fate.DROPPED if gone else Fate.CHANGED
        if written_by_scaler or self._versions == self._current_versions():
            return Fate.KEPT
        zeroed = not any(gradient.any() for gradient in self._local)
        return Fate.DROPPED if zeroed else Fate.CHANGED

    def _current_versions(self) -> list[int]:
        versions = [gradient._version for gradient in self._gradients]
        if self._local is not self._gradients:
            versions += [gradient._version for gradient in self._local]
        return versions


def _part(tensor: Tensor) -> Tensor:
    """A view of `tensor`, or of a part of it that takes no time to compare."""
    while tensor.numel() > _WATCHED_ELEMENTS:
        tensor = tensor[0] if tensor.ndim > 1 else tensor[:_WATCHED_ELEMENTS]
    return tensor
