"""Parameters and gradients that are DTensors: FSDP2, HSDP, tensor and sequence parallelism.

A DTensor lies on a mesh of processes. Along an axis of the mesh it is sharded (every process has a
part), replicated (every process has all of it) or partial (it is the sum of what the processes
have, which nobody has added up yet). Alignment runs on the parts that this process has, which are
plain tensors. Of whole tensors it needs their Gram matrices alone: the sums of those of the parts
over the axes that shard, see `ShardSums`.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor

from .wrappers import is_sharded

_PLAIN_TENSORS = {Tensor, torch.nn.Parameter}


def local_part(tensor: Tensor) -> Tensor:
    """What this process holds of a DTensor, in its memory; any other tensor as it is."""
    if type(tensor) in _PLAIN_TENSORS or not is_sharded(tensor):
        return tensor
    # With autograd, a new tensor.
    with torch.no_grad():
        local = cast(Any, tensor).to_local()
    # Of a collective that may still be running.
    return local.wait() if hasattr(local, "wait") else local


def local_parts(tensors: Sequence[Tensor]) -> list[Tensor]:
    """`local_part` of all."""
    return [local_part(tensor) for tensor in tensors]


def around(local: Tensor, parameter: Tensor) -> Tensor:
    """`local` as the part of a DTensor that lies as `parameter` does, in the same memory."""
    whole = cast(Any, parameter)
    with torch.no_grad():
        return type(whole).from_local(
            local,
            whole.device_mesh,
            whole.placements,
            run_check=False,
            shape=whole.shape,
            stride=whole.stride(),
        )


def check_mesh(parameter: Tensor, name: str) -> None:
    """Raise ValueError for a DTensor of which this process has no part, or that is partial."""
    whole = cast(Any, parameter)
    if whole.device_mesh.get_coordinate() is None:
        raise ValueError(f"{name} must lie on this process too, got a DTensor on other ones")
    if any(placement.is_partial() for placement in whole.placements):
        raise ValueError(
            f"{name} must be sharded or replicated, got a DTensor with the placements "
            f"{whole.placements}"
        )


def check_lies_as(
    tensor: Tensor, name: str, parameter: Tensor, parameter_name: str, hint: str = ""
) -> None:
    """Raise ValueError, ending with `hint`, where `tensor` lies elsewhere than its parameter."""
    wanted, got = _Place.of(parameter), _Place.of(tensor)
    if got != wanted:
        raise ValueError(
            f"{name} must be {wanted or 'a plain tensor'} like {parameter_name}, "
            f"got {got or 'a plain tensor'}{hint}"
        )


def placed_as(gradient: Tensor, parameter: Tensor, name: str) -> Tensor:
    """The gradient of a DTensor, once it lies as that does; a partial one is added up.

    Autograd makes partial gradients, e.g. those of replicated parameters of which every process
    sees a part of the sequence. To redistribute one is a collective of all processes of its mesh.

    Raises:
        ValueError: for a gradient that is no DTensor on the mesh of its parameter.
    """
    wanted, got = _Place.of(parameter), _Place.of(gradient)
    if wanted == got:
        return gradient
    if wanted is None or got is None or got.mesh != wanted.mesh:
        check_lies_as(gradient, f"the gradient of {name}", parameter, name)
        return gradient
    with torch.no_grad():
        return cast(Any, gradient).redistribute(wanted.mesh, wanted.placements)


class _Place(NamedTuple):
    """How a DTensor lies on processes."""

    mesh: Any
    placements: tuple[Any, ...]
    shape: torch.Size

    @classmethod
    def of(cls, tensor: Tensor) -> _Place | None:
        """That of a DTensor; None for any other tensor."""
        if not is_sharded(tensor):
            return None
        whole = cast(Any, tensor)
        return cls(whole.device_mesh, whole.placements, whole.shape)

    def __str__(self) -> str:
        return f"a DTensor {tuple(self.shape)} with the placements {self.placements} on {self.mesh}"
