"""Which strategy averages an aligner's gradients."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import cast

import torch
import torch.distributed as dist
from torch import Tensor

from ..passes import Passes
from ..wrappers import data_parallel_around, data_parallel_inside, is_sharded, world_size
from .strategy import Strategy

REDUCTIONS = ("auto", "hook", "no_sync", "sharded")


def strategy_for(
    params: torch.nn.Module | Iterable,
    parameters: Sequence[Tensor],
    names: Sequence[str],
    passes: Passes,
    process_group: object | None,
    reduce: str,
) -> Strategy:
    """The strategy `reduce` for `params` as `GradientAligner` gets them.

    Where neither a DistributedDataParallel nor a process group is given, what is collected is taken
    as it is.

    Raises:
        TypeError: for a process group that is none.
        ValueError: for an unknown strategy, one that needs DistributedDataParallel or a group where
            there is none, and a wrapper with options under which it does not work.
    """
    if reduce not in REDUCTIONS:
        raise ValueError(f"reduce must be one of {', '.join(REDUCTIONS)}, got {reduce!r}")
    wrapper = data_parallel_inside(params) if isinstance(params, torch.nn.Module) else None
    if any(map(is_sharded, parameters)):
        if wrapper is not None or process_group is not None or reduce != "auto":
            raise ValueError(
                "params that are DTensors lie on a mesh of processes, and take no "
                'DistributedDataParallel, no process_group and no reduce but "auto": '
                "use fully_shard, on a mesh of replicas and shards where there are replicas"
            )
        from .distributed_tensors import DistributedTensors

        return DistributedTensors(parameters, len(names))
    if wrapper is None and process_group is None:
        if reduce != "auto" and (world_size() or 1) > 1:
            raise ValueError(
                f"reduce={reduce!r} needs params to be the module inside of "
                f"DistributedDataParallel, or a process_group, got {type(params).__name__}"
            )
        return Strategy(parameters)
    if process_group is not None and not isinstance(process_group, dist.ProcessGroup):
        raise TypeError(
            "process_group must be a process group of which this process is a member, "
            f"got {type(process_group).__name__}"
        )
    # Imported where there are several processes.
    from .all_reduce import AllReduce
    from .bucket_hook import BucketHook
    from .ownership import own
    from .sharded import Sharded

    if wrapper is not None and process_group not in (None, wrapper.process_group):
        raise ValueError(
            "process_group must be that of the DistributedDataParallel that params are in, or None"
        )
    if reduce == "hook":
        if wrapper is None:
            raise ValueError(
                'reduce="hook" needs params to be a DistributedDataParallel, whose hook it is, '
                f"got {type(params).__name__}"
            )
        return BucketHook(wrapper, parameters, names)
    wrappers = data_parallel_around(parameters) if wrapper is None else [wrapper]
    for each in wrappers:
        own(each, passes)
    group = cast(dist.ProcessGroup, process_group if wrapper is None else wrapper.process_group)
    kind = Sharded if reduce == "sharded" else AllReduce
    return kind(group, wrappers, parameters, len(names))
