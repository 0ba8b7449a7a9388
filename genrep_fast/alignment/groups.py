"""Parameters as users give them, and the groups that share a Gram matrix."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from typing import cast

import torch
from torch import Tensor

from ..checks import check_floating
from ..ops.alignment import MAX_LOSSES
from .fully_sharded import is_unsharded
from .sharded_tensors import check_mesh, local_part
from .wrappers import is_flat_shard, is_sharded, plain_name, plain_names, world_size


def check_not_flattened(parameters: Sequence[Tensor]) -> None:
    """Raise RuntimeError for parameters that FSDP1, or DDP of DTensors, has flattened."""
    if any(map(is_flat_shard, parameters)):
        raise RuntimeError(
            "params are flat shards of FullyShardedDataParallel (FSDP1), "
            "of which every process would align its own: use fully_shard (FSDP2), "
            "DistributedDataParallel, or one process"
        )
    # Of torch.distributed.tensor.parallel.ddp.
    if any(hasattr(parameter, "_st_info") for parameter in parameters):
        raise RuntimeError(
            "params are local parts of DTensors, as _pre_dp_module_transform makes them, "
            "of which every process would align its own: use fully_shard on a mesh of two axes "
            "in place of DistributedDataParallel"
        )


def label(names: Sequence[str | None], index: int) -> str:
    """What messages call a parameter: its name, or its place where it has none."""
    return names[index] or f"params[{index}]"


def check_names(names: Sequence[str]) -> tuple[str, ...]:
    """Check the names of the losses: 2 to `MAX_LOSSES` different strings."""
    is_sequence = isinstance(names, Sequence) and not isinstance(names, str)
    if not is_sequence or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a sequence of strings, got {names!r}")
    if not 2 <= len(names) <= MAX_LOSSES or len(set(names)) < len(names):
        raise ValueError(f"names must be 2 to {MAX_LOSSES} different ones, got {names!r}")
    return tuple(names)


def named_parameters(params: torch.nn.Module | Iterable) -> tuple[list[Tensor], list[str | None]]:
    """Parameters and their names, None where they have none, after a check of each."""
    if isinstance(params, Tensor) or not isinstance(params, (torch.nn.Module, Iterable)):
        raise TypeError(
            f"params must be parameters, named parameters or a module, got {type(params).__name__}"
        )
    items = list(params.named_parameters() if isinstance(params, torch.nn.Module) else params)
    named = [item if isinstance(item, (tuple, list)) else (None, item) for item in items]
    if all(isinstance(name, str) for name, _ in named):
        names = [name for name, _ in named]
        if isinstance(params, torch.nn.Module):
            names = [plain_name(name) for name in names]
        else:
            names = plain_names(names)
        named = list(zip(names, [parameter for _, parameter in named], strict=True))
    for position, (name, parameter) in enumerate(named):
        called = name or f"params[{position}]"
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{called} must be a parameter, got {type(parameter).__name__}")
        check_not_flattened([parameter])
        if is_sharded(parameter):
            check_mesh(parameter, called)
        if not parameter.is_leaf:
            raise ValueError(f"{called} must be a leaf tensor, got the result of an operation")
        if parameter.device != named[0][1].device:
            raise ValueError(
                f"{called} must be on {named[0][1].device} like the first parameter, "
                f"got {parameter.device}"
            )
    parameters = [parameter for _, parameter in named]
    if not parameters:
        raise ValueError("params must hold at least one parameter, got none")
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError("params must be different tensors, got one of them twice")
    if world_size() is not None and is_unsharded(parameters):
        raise RuntimeError(
            "params are what fully_shard (FSDP2) gathers for a forward or backward pass: "
            "make the aligner before the first one, or after the module's reshard()"
        )
    return parameters, [name for name, _ in named]


def key_function(
    groups: str | Callable[[str], Hashable | None], names: list[str | None]
) -> Callable[[int], Hashable | None]:
    """The function from a parameter's index to the key of its group."""
    if groups == "all":
        return lambda index: "all"
    if groups == "tensor":
        return lambda index: index if names[index] is None else names[index]
    if groups != "block" and not callable(groups):
        raise ValueError(
            'groups must be "all", "tensor", "block" or a function of a parameter\'s name, '
            f"got {groups!r}"
        )
    if None in names:
        raise ValueError(
            f"params must be named for groups={groups!r}: pass a module or its named_parameters()"
        )
    named = cast(list[str], names)
    key = groups if callable(groups) else _block
    return lambda index: key(named[index])


def _block(name: str) -> str:
    """The block of a parameter: "blocks.3" of "blocks.3.norm.weight", "head" of "head.weight"."""
    components = name.split(".")
    for position, component in enumerate(components):
        if component.isdecimal():
            return ".".join(components[: position + 1])
    return ".".join(components[:-1]) or name


class ParameterGroups:
    """Which parameters share a Gram matrix; a parameter joins once it requires a gradient.

    Args:
        parameters, names: of the aligner.
        groups: as `GradientAligner` takes them.

    Attributes:
        of: for each parameter the row of its group; -1: it is in none; None: it has not required a
            gradient yet.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: list[str | None],
        groups: str | Callable[[str], Hashable | None],
    ):
        self.of: list[int | None] = [None] * len(parameters)
        self._parameters = parameters
        self._names = names
        self._key = key_function(groups, names)
        self._rows: dict[Hashable, int] = {}
        self.assign()

    @property
    def keys(self) -> list[Hashable]:
        """Keys of the groups, in the order of their rows."""
        return list(self._rows)

    @property
    def number(self) -> int:
        """How many groups there are."""
        return len(self._rows)

    def assign(self) -> None:
        """Give the parameters that require a gradient for the first time their rows."""
        for index, parameter in enumerate(self._parameters):
            if self.of[index] is not None or not parameter.requires_grad:
                continue
            check_floating(local_part(parameter), label(self._names, index))
            if parameter.is_inference():
                raise ValueError(
                    f"{label(self._names, index)} was made under torch.inference_mode and cannot "
                    "be trained: make the model outside of it"
                )
            key = self._key(index)
            if not isinstance(key, Hashable):
                raise TypeError(
                    "groups must return a hashable key or None, "
                    f"got {type(key).__name__} for {label(self._names, index)}"
                )
            if key is None:
                self.of[index] = -1
            else:
                self.of[index] = self._rows.setdefault(key, len(self._rows))
