"""Moving averages of an optimizer's parameters, whatever holds them."""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..checks import check_writable
from ..memory_overlap import check_no_overlap, in_same_place
from .aligner import GradientAligner
from .average_sources import source_of
from .sharded_tensors import check_lies_as, local_part


class Averages:
    """The averages of one optimizer.

    Args:
        source: tensors in the order of `params`; a module with the parameter names of the aligner,
            wrapped or not; an AveragedModel of `torch.optim.swa_utils`; or diffusers' EMAModel.
        params: parameters of the optimizer, each of which needs an average.
        aligner: their aligner.

    Raises:
        TypeError, ValueError: for averages that do not fit their parameters.
    """

    def __init__(self, source: Any, params: Sequence[Tensor], aligner: GradientAligner):
        self._aligner = aligner
        self._source = source_of(source, params, aligner)
        self._indices = {id(parameter): index for index, parameter in enumerate(aligner.parameters)}
        self._checked = _Checked.of([])
        # Parameters whose averages equal them, and the versions of both of which that is true.
        self._frozen: dict[int, tuple[int, ...]] = {}
        self.require(params)
        self._check(self._source.tensors())

    @property
    def fixed(self) -> bool:
        """Whether further parameters cannot get averages."""
        return self._source.fixed

    def require(self, params: Sequence[Tensor]) -> None:
        """Raise ValueError where one of `params` has no average."""
        tensors = self._source.tensors()
        for parameter in params:
            index = self._indices[id(parameter)]
            if index in tensors:
                continue
            name = self._aligner.describe(index)
            if not self._source.is_shared(index):
                raise ValueError(f"ema must hold an average of {name}, got none")
            if parameter.requires_grad:
                raise ValueError(
                    f"ema must hold a copy of {name}, which is trained, got the parameter"
                )

    def tensors(self) -> dict[int, Tensor]:
        """The averages by the aligner's index of their parameters, checked where they are new.

        Of DTensors they are what this process holds.
        """
        tensors = self._source.tensors()
        if not self._checked.describes(list(tensors.values())):
            self._check(tensors)
        if self._aligner.sharded:
            return {index: local_part(tensor) for index, tensor in tensors.items()}
        return tensors

    def decay(self, given: float | None) -> float:
        """Share of the old average that the next step keeps: `given`, else the source's own."""
        return self._source.decay() if given is None else given

    def follow(
        self,
        tensors: dict[int, Tensor],
        done: set[int],
        trained: Callable[[], set[int]],
        decay: float,
        found_inf: Tensor | None,
    ) -> None:
        """Move averages that are not `done`; nothing where `found_inf` is not 0.

        The average of a constant is the constant: a frozen parameter that is not among those once
        trained, ``trained()``, is copied once, and when it or its average is written to.
        """
        left = tensors.keys() - done
        if not left:
            return
        with_state = trained()
        weight = 1 - decay if found_inf is None else (1 - decay) * (found_inf == 0)
        copied: dict[str, list[Tensor]] = {"to": [], "from": []}
        for index in left:
            whole, average = self._aligner.parameters[index], tensors[index]
            parameter = local_part(whole)
            if whole.requires_grad or (index in with_state and not self._source.copies_frozen):
                if decay == 0 and found_inf is None:
                    copied["to"].append(average)
                    copied["from"].append(parameter)
                else:
                    average.lerp_(parameter.to(average), _like(weight, average))
            elif self._frozen.get(index) != _versions(whole, parameter, average):
                average.copy_(parameter)
                # A write to a DTensor does not count as one to its part.
                self._frozen[index] = _versions(whole, parameter, average)
        if copied["to"]:
            torch._foreach_copy_(copied["to"], copied["from"])

    def advance(self, decay: float, found_inf: Tensor | None) -> None:
        """Do the rest of a step, counters and buffers; nothing where `found_inf` is not 0."""
        self._source.advance(decay, found_inf)

    def _check(self, tensors: dict[int, Tensor]) -> None:
        for index, tensor in tensors.items():
            name, parameter = self._source.describe(index), self._aligner.parameters[index]
            check_lies_as(tensor, name, parameter, self._aligner.describe(index))
            tensor, parameter = local_part(tensor), local_part(parameter)
            check_writable(tensor, name, parameter.shape, parameter.device)
            if in_same_place(tensor, parameter):
                raise ValueError(f"{name} must be a copy of its parameter, got the parameter")
            if tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{name} must be float32 or float64, got {tensor.dtype}, in which small steps "
                    f"of an average are lost: keep averages of half-precision parameters in float32"
                )
        parameters, averages = {}, {}
        for index, tensor in tensors.items():
            parameter = self._aligner.parameters[index]
            parameters[self._aligner.describe(index)] = local_part(parameter)
            averages[self._source.describe(index)] = local_part(tensor)
        check_no_overlap(averages, parameters)
        self._checked = _Checked.of(list(tensors.values()))
        self._frozen = {}


class _Checked(NamedTuple):
    """Averages as they were when they were checked; ``module.to`` changes tensors in place."""

    tensors: list[Tensor]
    dtypes: list[torch.dtype]
    devices: list[torch.device]

    @classmethod
    def of(cls, tensors: list[Tensor]) -> _Checked:
        dtypes = [tensor.dtype for tensor in tensors]
        return cls(tensors, dtypes, [tensor.device for tensor in tensors])

    def describes(self, tensors: list[Tensor]) -> bool:
        """Whether `tensors` are the same, and unchanged but for their values."""
        if len(tensors) != len(self.tensors) or not all(map(operator.is_, tensors, self.tensors)):
            return False
        return self.of(tensors)[1:] == self[1:]


def _versions(*tensors: Tensor) -> tuple[int, ...]:
    return tuple(tensor._version for tensor in tensors)


def _like(weight: float | Tensor, average: Tensor) -> float | Tensor:
    return weight.to(average) if isinstance(weight, Tensor) else weight
