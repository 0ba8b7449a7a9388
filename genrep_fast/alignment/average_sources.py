"""What holds moving averages of parameters: tensors, modules, AveragedModel, EMAModel.

It is read anew at every step, since ``load_state_dict`` and ``to`` put other tensors into it.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import AveragedModel

from ..checks import check_ema_decay, check_length
from .aligner import GradientAligner
from .sharded_tensors import local_part
from .wrappers import plain_name, uncompiled, unwrapped

DEFAULT_DECAY = 0.999

# Where a module keeps a tensor.
Slot = tuple[dict[str, Any], str]


class AverageSource(Protocol):
    """What holds averages."""

    # Whether further parameters cannot get averages.
    fixed: bool
    # Whether a parameter that requires no gradient is its average at once.
    copies_frozen: bool

    def tensors(self) -> dict[int, Tensor]:
        """The averages, by the aligner's index of their parameters."""

    def describe(self, index: int) -> str:
        """Name of an average, for messages."""

    def decay(self) -> float:
        """Share of the old average that the next step keeps."""

    def advance(self, decay: float, found_inf: Tensor | None) -> None:
        """Do the rest of a step, counters and buffers; nothing where `found_inf` is not 0."""

    def is_shared(self, index: int) -> bool:
        """Whether a parameter, which is frozen, is its own average."""


def source_of(source: Any, params: Sequence[Tensor], aligner: GradientAligner) -> AverageSource:
    """What reads the averages of `source`; see `Averages`."""
    numbers = {id(parameter): index for index, parameter in enumerate(aligner.parameters)}
    indices = [numbers[id(parameter)] for parameter in params]
    if isinstance(source, nn.Module):
        inner = uncompiled(source)
        if isinstance(inner, AveragedModel):
            return _AveragedModel(inner, aligner)
        return _Module(inner, aligner)
    if all(hasattr(source, name) for name in ("shadow_params", "get_decay", "optimization_step")):
        return _EMAModel(source, indices, aligner)
    if not isinstance(source, Sequence) or isinstance(source, str):
        raise TypeError(
            "ema must be tensors, a module, an AveragedModel or diffusers' EMAModel, "
            f"got {type(source).__name__}"
        )
    return _Tensors(source, indices)


class _Tensors:
    """Averages as the user's own tensors."""

    fixed = True
    copies_frozen = False

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

    def advance(self, decay: float, found_inf: Tensor | None) -> None:
        pass

    def is_shared(self, index: int) -> bool:
        return False


@runtime_checkable
class _Reshards(Protocol):
    """A module of ``fully_shard``, as FSDP2 makes it."""

    def reshard(self) -> None:
        """Let the module hold its shards again in place of whole parameters."""

    def unshard(self) -> Any:
        """Let the module hold whole parameters."""


class _Buffer(NamedTuple):
    """A buffer of the averages, and the model's."""

    average: Slot
    current: Slot


class _Module:
    """Averages as a module, whose buffers are those of the aligner's module."""

    fixed = False
    copies_frozen = False

    def __init__(self, module: nn.Module, aligner: GradientAligner):
        self._names = aligner.parameter_names
        if None in self._names:
            raise ValueError(
                "ema is a module, whose parameters are found by their names: make the aligner from "
                "the model or from its named_parameters(), not from parameters without names"
            )
        inner = _averaged_module(module, set(self._names))
        slots = _slots(inner, "_parameters")
        self._slots: dict[int, Slot] = {}
        self._shared: set[int] = set()
        named = zip(self._names, aligner.parameters, strict=True)
        for index, (name, parameter) in enumerate(named):
            if name not in slots:
                continue
            # A frozen part that both networks share is its own average.
            if _held(slots[name]) is parameter and not parameter.requires_grad:
                self._shared.add(index)
            else:
                self._slots[index] = slots[name]
        if not self._slots:
            raise ValueError(
                "ema must be a module with the parameter names of the aligner, "
                f"got none called {aligner.describe(0)}"
            )
        _check_ties(slots, aligner)
        # Modules of fully_shard.
        self._sharding = [one for one in inner.modules() if isinstance(one, _Reshards)]
        self._buffers = _paired_buffers(inner, aligner)

    def tensors(self) -> dict[int, Tensor]:
        # A forward pass may have left whole parameters there, which would not follow.
        for module in self._sharding:
            module.reshard()
        return {index: held[name] for index, (held, name) in self._slots.items()}

    def describe(self, index: int) -> str:
        return f"ema[{self._names[index]}]"

    def is_shared(self, index: int) -> bool:
        return index in self._shared

    def decay(self) -> float:
        return DEFAULT_DECAY

    def advance(self, decay: float, found_inf: Tensor | None) -> None:
        for average, current in self._current_buffers():
            average.copy_(_unless(found_inf, current, average))

    def _current_buffers(self) -> list[tuple[Tensor, Tensor]]:
        """The averages' buffers and the model's; those of caches that have grown are replaced."""
        pairs = []
        for pair in self._buffers:
            average, current = _held(pair.average), _held(pair.current)
            if average is None or current is None or average is current:
                continue
            if average.shape != current.shape:
                held, name = pair.average
                average = torch.empty_like(current, dtype=average.dtype, device=average.device)
                held[name] = average.copy_(current)
            pairs.append((local_part(average), local_part(current)))
        return pairs


class _Count(NamedTuple):
    """A counter of updates, and its value, which a GPU is asked for once."""

    counter: Tensor
    version: int
    value: int

    def is_of(self, counter: Tensor) -> bool:
        """Whether `counter` is this one, and still has its value."""
        return self.counter is counter and self.version == counter._version


class _AveragedModel(_Module):
    """Averages as `torch.optim.swa_utils.AveragedModel`, with its own rule and counter."""

    def __init__(self, model: AveragedModel, aligner: GradientAligner):
        super().__init__(model, aligner)
        self._model = model
        self._count: _Count | None = None

    def decay(self) -> float:
        count = self._updates()
        if count == 0:
            return 0.0
        return _decay_of(_rule_of(self._model), count)

    def advance(self, decay: float, found_inf: Tensor | None) -> None:
        # A counter that the host reads has to know.
        if found_inf is not None and found_inf.item():
            return
        for average, current in self._current_buffers():
            if not self._model.use_buffers or decay == 0:
                average.copy_(current)
            elif average.is_floating_point():
                average.lerp_(current.to(average), 1 - decay)
            else:
                self._average_integers(average, current, decay)
        count = self._updates()
        self._model.n_averaged += 1
        counter = self._model.n_averaged
        self._count = _Count(counter, counter._version, count + 1)

    def _average_integers(self, average: Tensor, current: Tensor, decay: float) -> None:
        """As AveragedModel does it: the mean, without what is behind the point."""
        mean = average * decay + current.to(average) * (1 - decay)
        if self._model.avg_fn is not None and decay == self.decay():
            count = self._model.n_averaged.to(average.device)
            # A rule that takes no integers, which AveragedModel refuses, is for the others.
            with contextlib.suppress(RuntimeError):
                mean = self._model.avg_fn(average.clone(), current.to(average), count)
        average.copy_(mean)

    def _updates(self) -> int:
        counter = self._model.n_averaged
        if self._count is None or not self._count.is_of(counter):
            self._count = _Count(counter, counter._version, int(counter))
        return self._count.value


class _EMAModel:
    """Averages as diffusers' EMAModel, with its own schedule and counter."""

    fixed = False
    # As its own step() does.
    copies_frozen = True

    def __init__(self, model: Any, indices: list[int], aligner: GradientAligner):
        self._model = model
        self._indices = _order_of(model.shadow_params, indices, aligner)

    def tensors(self) -> dict[int, Tensor]:
        tensors = self._model.shadow_params
        if len(tensors) != len(self._indices):
            raise ValueError(
                f"ema.shadow_params must have {len(self._indices)} entries, got {len(tensors)}"
            )
        return dict(zip(self._indices, tensors, strict=True))

    def describe(self, index: int) -> str:
        return f"ema.shadow_params[{self._indices.index(index)}]"

    def decay(self) -> float:
        return float(self._model.get_decay(self._model.optimization_step + 1))

    def advance(self, decay: float, found_inf: Tensor | None) -> None:
        # A counter of the host has to know.
        if found_inf is not None and found_inf.item():
            return
        self._model.optimization_step += 1
        self._model.cur_decay_value = decay

    def is_shared(self, index: int) -> bool:
        return False


def _averaged_module(module: nn.Module, names: set[str | None]) -> nn.Module:
    """What has most of `names`: `module`, or what it wraps or, like timm, calls ``module``."""
    best, most = module, -1
    while True:
        module = unwrapped(module)
        found = len(names & _slots(module, "_parameters").keys())
        if found > most:
            best, most = module, found
        inner = module._modules.get("module")
        if not isinstance(inner, nn.Module):
            return best
        module = inner


def _held(slot: Slot) -> Tensor | None:
    return slot[0].get(slot[1])


def _check_ties(slots: dict[str, Slot], aligner: GradientAligner) -> None:
    """Raise ValueError where a parameter has several averages, of which one alone would follow."""
    if aligner.module is None:
        return
    numbers = {id(parameter): index for index, parameter in enumerate(aligner.parameters)}
    for name, parameter in aligner.module.named_parameters(remove_duplicate=False):
        name, index = plain_name(name), numbers.get(id(parameter))
        first = None if index is None else aligner.parameter_names[index]
        if name not in slots or first is None or first not in slots:
            continue
        if _held(slots[name]) is not _held(slots[first]):
            raise ValueError(
                f"ema must tie {name} to {first}, which are one parameter of the model"
            )


def _slots(module: nn.Module, kind: str) -> dict[str, Slot]:
    """Where `module` keeps its ``_parameters`` or ``_buffers``, by name; `kind` says which."""
    slots = {}
    for prefix, owner in module.named_modules():
        held = getattr(owner, kind)
        for name, tensor in held.items():
            if tensor is not None:
                full_name = f"{prefix}.{name}" if prefix else name
                slots[plain_name(full_name)] = (held, name)
    return slots


def _paired_buffers(module: nn.Module, aligner: GradientAligner) -> list[_Buffer]:
    averages = _slots(module, "_buffers")
    if not averages:
        return []
    if aligner.module is None:
        raise ValueError(
            f"ema has buffers (such as {next(iter(averages))}), which follow those of the model: "
            f"make the aligner from the module, GradientAligner(model), not from its parameters"
        )
    current = _slots(aligner.module, "_buffers")
    for name in averages:
        if name not in current:
            raise ValueError(f"ema has a buffer called {name}, the aligner's module has none")
    return [_Buffer(averages[name], current[name]) for name in averages]


def _order_of(tensors: Sequence[Tensor], indices: list[int], aligner: GradientAligner) -> list[int]:
    """Indices of the parameters that `tensors` follow: all, the trained, or the optimizer's."""
    every = list(range(len(aligner.parameters)))
    trained = [index for index in every if aligner.parameters[index].requires_grad]
    orders: list[list[int]] = []
    for order in (every, trained, indices):
        if order not in orders and _fits(tensors, order, aligner):
            orders.append(order)
    if not orders:
        raise ValueError(
            f"ema.shadow_params must have the shapes of the aligner's {len(aligner.parameters)} "
            f"parameters or of the optimizer's {len(indices)}, in their order, got {len(tensors)} "
            f"tensors of other shapes"
        )
    if len(orders) == 1:
        return orders[0]
    # Both fit: values decide, which an average has from its parameter.
    equal = []
    for order in orders:
        parameters = [aligner.parameters[index] for index in order]
        if all(map(_is_equal, tensors, parameters)):
            equal.append(order)
    if len(equal) != 1:
        raise ValueError(
            "ema.shadow_params may follow the aligner's parameters or the optimizer's, which "
            "differ in their order alone: give the optimizer its parameters in the order of the "
            "model's"
        )
    return equal[0]


def _fits(tensors: Sequence[Tensor], order: list[int], aligner: GradientAligner) -> bool:
    if len(tensors) != len(order):
        return False
    pairs = zip(tensors, order, strict=True)
    return all(tensor.shape == aligner.parameters[index].shape for tensor, index in pairs)


def _is_equal(average: Tensor, parameter: Tensor) -> bool:
    return torch.equal(average, parameter.detach().to(average))


def _unless(found_inf: Tensor | None, current: Tensor, average: Tensor) -> Tensor:
    """`current`, but `average` where `found_inf` is not 0."""
    if found_inf is None:
        return current
    return torch.where(found_inf.to(average.device).reshape(()) == 0, current.to(average), average)


def _rule_of(model: AveragedModel) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    """What `model` makes of an average, a parameter and the number of updates."""
    if model.avg_fn is not None:
        return model.avg_fn
    average_all = model.multi_avg_fn
    if average_all is None:
        return lambda average, parameter, count: average + (parameter - average) / (count + 1)

    def rule(average: Tensor, parameter: Tensor, count: Tensor) -> Tensor:
        average = average.clone()
        average_all([average], [parameter], count)
        return average

    return rule


def _decay_of(rule: Callable[[Tensor, Tensor, Tensor], Tensor], count: int) -> float:
    """The share of the old average that `rule` keeps, found by trying it on numbers."""
    counter = torch.tensor(count)
    averages = torch.tensor([1.0, 0.0, 3.0], dtype=torch.float64)
    parameters = torch.tensor([0.0, 1.0, -2.0], dtype=torch.float64)
    # It may write to what it is given.
    found = rule(averages.clone(), parameters.clone(), counter)
    decay = float(found[0])
    expected = decay * averages + (1 - decay) * parameters
    if not torch.allclose(found, expected, rtol=1e-9, atol=1e-9):
        name = getattr(inspect.unwrap(rule), "__name__", type(rule).__name__)
        raise ValueError(
            f"ema averages with {name}, which is no weighted mean of average and parameter: "
            "pass ema_decay"
        )
    return check_ema_decay(decay)
