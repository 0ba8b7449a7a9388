"""What stands between a user's module and its parameters.

That is torch.compile, data parallelism, averages and sharding.
"""

from __future__ import annotations

import gc
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim.swa_utils import AveragedModel

# Where torch.compile and Lightning Fabric keep the module.
_COMPILED = "_orig_mod"
_FORWARD = "_forward_module"
_HOLDERS = (DistributedDataParallel, DataParallel, AveragedModel)


def unwrapped(module: nn.Module) -> nn.Module:
    """The module inside of its wrappers.

    Those are torch.compile, DistributedDataParallel, DataParallel, AveragedModel and Fabric's.
    """
    while True:
        inner = _inside(module)
        if inner is None:
            return module
        module = inner


def data_parallel_inside(module: nn.Module) -> DistributedDataParallel | None:
    """The DistributedDataParallel among the wrappers of `module`; None without one."""
    holder: nn.Module | None = module
    while holder is not None:
        if isinstance(holder, DistributedDataParallel):
            return holder
        holder = _inside(holder)
    return None


def uncompiled(module: nn.Module) -> nn.Module:
    """The module inside of torch.compile."""
    while isinstance(inner := module._modules.get(_COMPILED), nn.Module):
        module = inner
    return module


def parameters_inside(module: nn.Module) -> Iterator[nn.Parameter]:
    """The parameters of `module`, in less than half the time of its ``parameters()``."""
    modules, seen = [module], {id(module)}
    # Grows as it is walked.
    for holder in modules:
        for parameter in holder._parameters.values():
            if parameter is not None:
                yield parameter
        for child in holder._modules.values():
            if child is not None and id(child) not in seen:
                seen.add(id(child))
                modules.append(child)


def check_no_stranger(module: nn.Module, known: set[int]) -> None:
    """Raise RuntimeError where a parameter that is not `known` by its id has a ``.grad``."""

    def is_stranger(parameter: Tensor) -> bool:
        return parameter.grad is not None and id(parameter) not in known

    if not any(map(is_stranger, parameters_inside(module))):
        return
    named = module.named_parameters()
    stranger = plain_name(next(name for name, parameter in named if is_stranger(parameter)))
    raise RuntimeError(
        f"a loss reached {stranger}, "
        "which is not among the aligner's parameters: it joined the module or was "
        "replaced (as by load_state_dict(assign=True)) after the aligner was made. "
        "Make a new aligner and a new optimizer"
    )


def plain_name(name: str) -> str:
    """`name` without what torch.compile puts into it."""
    return ".".join(part for part in name.split(".") if part != _COMPILED)


def plain_names(names: Sequence[str]) -> list[str]:
    """`plain_name` of all, without the ``module.`` of data-parallel wrappers.

    It goes where every name begins with it.
    """
    names = [plain_name(name) for name in names]
    while names and all(name.startswith("module.") for name in names):
        names = [name.removeprefix("module.") for name in names]
    return names


def is_flat_shard(parameter: Tensor) -> bool:
    """Whether FSDP1 keeps `parameter` as a shard of a flat one, or as its flat one."""
    return hasattr(parameter, "_fsdp_flattened") or hasattr(parameter, "_is_flat_param")


def is_sharded(parameter: Tensor) -> bool:
    """Whether `parameter` is a DTensor, as FSDP2 and tensor parallelism make them."""
    return hasattr(parameter, "device_mesh") and hasattr(parameter, "placements")


def data_parallel_around(parameters: Iterable[Tensor]) -> list[DistributedDataParallel]:
    """Every DistributedDataParallel that holds one of `parameters`.

    Looks at every object that Python knows.
    """
    wanted = {id(parameter) for parameter in parameters}
    found = []
    for candidate in gc.get_objects():
        # The type, since isinstance may run the code of an object that pretends to be another one.
        if not issubclass(type(candidate), DistributedDataParallel):
            continue
        if any(id(parameter) in wanted for parameter in candidate.parameters()):
            found.append(candidate)
    return found


def world_size() -> int | None:
    """Number of processes, None where torch.distributed has not been initialised."""
    if not torch.distributed.is_available() or not torch.distributed.is_initialized():
        return None
    return torch.distributed.get_world_size()


def _inside(module: nn.Module) -> nn.Module | None:
    for name in (_COMPILED, _FORWARD):
        if name in module._modules:
            return module._modules[name]
    if isinstance(module, _HOLDERS):
        return module.module
    return None
