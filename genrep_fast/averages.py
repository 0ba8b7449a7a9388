"""The moving averages that follow an optimizer's parameters: tensors, modules, and the average objects of PyTorch and diffusers.

Whatever holds the averages is read anew at every step, since ``load_state_dict`` and ``to`` put other tensors into it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from .gradient_aligner import GradientAligner
from .memory_overlap import check_no_overlap, in_same_place
from .ops.alignment import check_length, check_writable
from .ops.optimizer import check_ema_decay
from .wrappers import averaged_module, plain_name

DEFAULT_DECAY = 0.999

Slot = tuple[dict[str, Any], str]  # where a module keeps a tensor


class Source(Protocol):
    """What holds averages."""

    fixed: bool  # whether further parameters cannot get averages

    def tensors(self) -> dict[int, Tensor]:
        """The averages, by the aligner's index of their parameters."""

    def describe(self, index: int) -> str:
        """Name of an average, for messages."""

    def decay(self) -> float:
        """Share of the old average that the next step keeps."""

    def advance(self, decay: float) -> None:
        """Do what belongs to a step besides the averages of parameters: counters, buffers."""


class Averages:
    """The averages of one optimizer.

    Args:
        source: tensors in the order of `params`; a module with the parameter names of the aligner, wrapped or not; an AveragedModel of
            `torch.optim.swa_utils`; or diffusers' EMAModel.
        params: parameters of the optimizer, each of which needs an average.
        aligner: their aligner.

    Raises:
        TypeError, ValueError: for averages that do not fit their parameters.
    """

    def __init__(self, source: Any, params: Sequence[Tensor], aligner: GradientAligner):
        self._aligner = aligner
        self._source = _source_of(source, params, aligner)
        self._checked: list[Tensor] = []
        self._frozen: dict[int, int] = {}  # parameters whose averages equal them, and the version of which that is true
        tensors = self._source.tensors()
        indices = {id(parameter): index for index, parameter in enumerate(aligner.parameters)}
        for parameter in params:
            if indices[id(parameter)] not in tensors:
                raise ValueError(f"ema must hold an average of {aligner.describe(indices[id(parameter)])}, got none")
        self._check(tensors)

    @property
    def fixed(self) -> bool:
        """Whether further parameters cannot get averages."""
        return self._source.fixed

    def tensors(self) -> dict[int, Tensor]:
        """The averages, by the aligner's index of their parameters, checked where they are others than before."""
        tensors = self._source.tensors()
        known = self._checked
        if len(known) != len(tensors) or not all(map(_is_same, known, tensors.values())):
            self._check(tensors)
        return tensors

    def decay(self, given: float | None) -> float:
        """Share of the old average that the next step keeps: `given`, else the source's own."""
        return self._source.decay() if given is None else given

    def follow(self, tensors: dict[int, Tensor], updated: set[int], trained: set[int], weight: float | Tensor) -> None:
        """Move the averages of parameters that a step has not `updated` towards them by `weight`.

        The average of a constant is the constant: a frozen parameter that is not among those once `trained` is copied once, and
        when it is written to.
        """
        for index in tensors.keys() - updated:
            parameter, average = self._aligner.parameters[index], tensors[index]
            if parameter.requires_grad or index in trained:
                average.lerp_(parameter.to(average), _like(weight, average))
            elif self._frozen.get(index) != parameter._version:
                average.copy_(parameter)
                self._frozen[index] = parameter._version

    def advance(self, decay: float) -> None:
        """Do what belongs to a step besides the averages of parameters."""
        self._source.advance(decay)

    def _check(self, tensors: dict[int, Tensor]) -> None:
        for index, tensor in tensors.items():
            name, parameter = self._source.describe(index), self._aligner.parameters[index]
            check_writable(tensor, name, parameter.shape, parameter.device)
            if in_same_place(tensor, parameter):
                raise ValueError(f"{name} must be a copy of its parameter, got the parameter")
            if tensor.dtype not in (torch.float32, torch.float64):
                raise ValueError(
                    f"{name} must be float32 or float64, got {tensor.dtype}, in which small steps of an average are lost: keep averages "
                    f"of half-precision parameters in float32"
                )
        parameters = {self._aligner.describe(index): parameter for index, parameter in enumerate(self._aligner.parameters)}
        averages = {self._source.describe(index): tensor for index, tensor in tensors.items()}
        check_no_overlap(averages, parameters)
        self._checked, self._frozen = list(tensors.values()), {}


class _Tensors:
    """Averages as the user's own tensors."""

    fixed = True

    def __init__(self, tensors: Sequence[Tensor], indices: list[int]):
        check_length(tensors, "ema", len(indices))
        self._tensors = dict(zip(indices, tensors, strict=True))
        self._places = {index: place for place, index in enumerate(indices)}

    def tensors(self) -> dict[int, Tensor]:
        return self._tensors

    def describe(self, index: int) -> str:
        return f"ema[{self._places[index]}]"

    def decay(self) -> float:
        return DEFAULT_DECAY

    def advance(self, decay: float) -> None:
        pass


class _Buffer(NamedTuple):
    """A buffer of the averages, and the model's."""

    average: Slot
    current: Slot


class _Module:
    """Averages as a module, whose buffers are those of the aligner's module."""

    fixed = False

    def __init__(self, module: nn.Module, aligner: GradientAligner):
        inner = averaged_module(module)
        slots = _slots(inner, "_parameters")
        self._names = aligner.parameter_names
        self._slots = {}
        for index, (name, parameter) in enumerate(zip(self._names, aligner.parameters, strict=True)):
            # A frozen part that both networks share is its own average.
            shared = name in slots and slots[name][0][slots[name][1]] is parameter and not parameter.requires_grad
            if name in slots and not shared:
                self._slots[index] = slots[name]
        if not self._slots:
            raise ValueError(f"ema must be a module with the parameter names of the aligner, got none called {aligner.describe(0)}")
        self._buffers = _paired_buffers(inner, aligner)

    def tensors(self) -> dict[int, Tensor]:
        return {index: held[name] for index, (held, name) in self._slots.items()}

    def describe(self, index: int) -> str:
        return f"ema[{self._names[index]}]"

    def decay(self) -> float:
        return DEFAULT_DECAY

    def advance(self, decay: float) -> None:
        for average, current in self._current_buffers():
            average.copy_(current)

    def _current_buffers(self) -> list[tuple[Tensor, Tensor]]:
        pairs = [(pair.average[0][pair.average[1]], pair.current[0][pair.current[1]]) for pair in self._buffers]
        return [(average, current) for average, current in pairs if average is not current]


class _AveragedModel(_Module):
    """Averages as `torch.optim.swa_utils.AveragedModel`, with its own rule and counter; the first update copies."""

    def __init__(self, model: AveragedModel, aligner: GradientAligner):
        super().__init__(model, aligner)
        self._model = model
        self._count: tuple[Tensor, int, int] | None = None  # counter, its version, and its value, which a GPU is asked for once

    def decay(self) -> float:
        count = self._updates()
        if count == 0:
            return 0.0
        return _decay_of(_rule_of(self._model), count)

    def advance(self, decay: float) -> None:
        for average, current in self._current_buffers():
            if self._model.use_buffers and average.is_floating_point():
                average.lerp_(current.to(average), 1 - decay)
            else:
                average.copy_(current)
        count = self._updates()
        self._model.n_averaged += 1
        self._count = (self._model.n_averaged, self._model.n_averaged._version, count + 1)

    def _updates(self) -> int:
        counter = self._model.n_averaged
        if self._count is None or self._count[0] is not counter or self._count[1] != counter._version:
            self._count = (counter, counter._version, int(counter))
        return self._count[2]


class _EMAModel:
    """Averages as diffusers' EMAModel, with its own schedule and counter."""

    fixed = False

    def __init__(self, model: Any, indices: list[int], aligner: GradientAligner):
        self._model = model
        self._indices = _order_of(model.shadow_params, indices, aligner)

    def tensors(self) -> dict[int, Tensor]:
        tensors = self._model.shadow_params
        if len(tensors) != len(self._indices):
            raise ValueError(f"ema.shadow_params must have {len(self._indices)} entries, got {len(tensors)}")
        return dict(zip(self._indices, tensors, strict=True))

    def describe(self, index: int) -> str:
        return f"ema.shadow_params[{self._indices.index(index)}]"

    def decay(self) -> float:
        return float(self._model.get_decay(self._model.optimization_step + 1))

    def advance(self, decay: float) -> None:
        self._model.optimization_step += 1
        self._model.cur_decay_value = decay


def _source_of(source: Any, params: Sequence[Tensor], aligner: GradientAligner) -> Source:
    numbers = {id(parameter): index for index, parameter in enumerate(aligner.parameters)}
    indices = [numbers[id(parameter)] for parameter in params]
    if isinstance(source, AveragedModel):
        return _AveragedModel(source, aligner)
    if isinstance(source, nn.Module):
        return _Module(source, aligner)
    if all(hasattr(source, name) for name in ("shadow_params", "get_decay", "optimization_step")):
        return _EMAModel(source, indices, aligner)
    if not isinstance(source, Sequence):
        raise TypeError(f"ema must be tensors, a module, an AveragedModel or diffusers' EMAModel, got {type(source).__name__}")
    return _Tensors(source, indices)


def _slots(module: nn.Module, kind: str) -> dict[str, Slot]:
    """Where `module` keeps its parameters or buffers, by name; `kind` is the modules' own dictionary of them."""
    slots = {}
    for prefix, owner in module.named_modules():
        for name, tensor in getattr(owner, kind).items():
            if tensor is not None:
                slots[plain_name(f"{prefix}.{name}" if prefix else name)] = (getattr(owner, kind), name)
    return slots


def _paired_buffers(module: nn.Module, aligner: GradientAligner) -> list[_Buffer]:
    averages = _slots(module, "_buffers")
    if not averages:
        return []
    if aligner.module is None:
        raise ValueError(
            f"ema has buffers (such as {next(iter(averages))}), which follow those of the model: make the aligner from the module, "
            f"GradientAligner(model), not from its parameters"
        )
    current = _slots(aligner.module, "_buffers")
    for name in averages:
        if name not in current:
            raise ValueError(f"ema has a buffer called {name}, the aligner's module has none")
    return [_Buffer(averages[name], current[name]) for name in averages]


def _order_of(tensors: Sequence[Tensor], indices: list[int], aligner: GradientAligner) -> list[int]:
    """The aligner's indices of the parameters that `tensors` follow: the model's, those of them that are trained, or the optimizer's."""
    every = list(range(len(aligner.parameters)))
    trained = [index for index in every if aligner.parameters[index].requires_grad]
    orders: list[list[int]] = []
    for order in (every, trained, indices):
        if order not in orders and _fits(tensors, order, aligner):
            orders.append(order)
    if not orders:
        raise ValueError(
            f"ema.shadow_params must have the shapes of the aligner's {len(aligner.parameters)} parameters or of the optimizer's "
            f"{len(indices)}, in their order, got {len(tensors)} tensors of other shapes"
        )
    if len(orders) == 1:
        return orders[0]
    # Both fit: values decide, which an average has from its parameter.
    equal = [order for order in orders if all(map(_is_equal, tensors, [aligner.parameters[index] for index in order]))]
    if len(equal) != 1:
        raise ValueError(
            "ema.shadow_params may follow the aligner's parameters or the optimizer's, which differ in their order alone: give the "
            "optimizer its parameters in the order of the model's"
        )
    return equal[0]


def _fits(tensors: Sequence[Tensor], order: list[int], aligner: GradientAligner) -> bool:
    if len(tensors) != len(order):
        return False
    return all(tensor.shape == aligner.parameters[index].shape for tensor, index in zip(tensors, order, strict=True))


def _is_equal(average: Tensor, parameter: Tensor) -> bool:
    return torch.equal(average, parameter.detach().to(average))


def _is_same(one: Tensor, other: Tensor) -> bool:
    return one is other


def _like(weight: float | Tensor, average: Tensor) -> float | Tensor:
    return weight.to(average) if isinstance(weight, Tensor) else weight


def _rule_of(model: AveragedModel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What `model` makes of an average, a parameter and the number of updates."""
    if model.avg_fn is not None:
        return model.avg_fn
    if model.multi_avg_fn is None:
        return lambda average, parameter, count: average + (parameter - average) / (count + 1)

    def rule(average: Tensor, parameter: Tensor, count: Tensor) -> Tensor:
        average = average.clone()
        model.multi_avg_fn([average], [parameter], count)
        return average

    return rule


def _decay_of(rule: Callable[[Tensor, Tensor, Tensor], Tensor], count: int) -> float:
    """The share of the old average that `rule` keeps, found by trying it on numbers."""
    counter = torch.tensor(count)
    averages = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    parameters = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    found = rule(averages, parameters, counter)
    decay = float(found[0])
    expected = decay * averages + (1 - decay) * parameters
    if not torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
        name = getattr(inspect.unwrap(rule), "__name__", type(rule).__name__)
        raise ValueError(f"ema averages with {name}, which is no weighted mean of average and parameter: pass ema_decay")
    return check_ema_decay(decay)
