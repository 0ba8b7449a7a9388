"""Options and state dicts of `AlignedAdamW`, which are those of `torch.optim.AdamW`."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..checks import check_hyperparameters, check_learning_rate, check_tensor
from .sharded_tensors import check_lies_as, local_part

# What torch.optim.AdamW does where they are set, and this optimizer does not.
_REFUSED = ("amsgrad", "maximize", "differentiable")


def check_group_options(group: Mapping[str, Any], device: torch.device) -> None:
    """Check the hyperparameters and flags of a group of parameters on `device`."""
    _check_flags(group)
    check_learning_rate(group["lr"], device)
    check_hyperparameters(group["betas"], group["eps"], group["weight_decay"])


def _check_flags(group: Mapping[str, Any]) -> None:
    for flag in _REFUSED:
        if group.get(flag):
            raise ValueError(f"AlignedAdamW does not implement {flag}, got {flag}={group[flag]}")
    # torch.optim.Adam's state dict; without weight decay both are the same.
    if not group.get("decoupled_weight_decay", True) and group["weight_decay"] != 0:
        raise ValueError(
            f"AlignedAdamW decouples weight decay, got decoupled_weight_decay=False, as of "
            f"torch.optim.Adam, with weight_decay={group['weight_decay']}"
        )


def counters_of_adamw(optimizer: torch.optim.Optimizer, state_dict: dict[str, Any]) -> None:
    """Put the step counters of a state dict where `torch.optim.AdamW` keeps them."""
    for group in state_dict["param_groups"]:
        if group["fused"] or group["capturable"]:
            continue
        for number in group["params"]:
            values = state_dict["state"].get(number)
            if values:
                state_dict["state"][number] = {**values, "step": values["step"].cpu()}


def checked_copy(
    optimizer: torch.optim.Optimizer,
    state_dict: dict[str, Any],
    names: Sequence[str],
    device: torch.device,
) -> dict[str, Any]:
    """`state_dict`, once it fits `optimizer`, with copies of the tensors that both would share.

    The optimizer's parameters have these `names`, for messages, and are on `device`.
    """
    params = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    try:
        groups = _checked_groups(optimizer, state_dict, device)
        numbers_of = [number for group in groups for number in group["params"]]
        copies = dict(state_dict["state"])
        for number, parameter, name in zip(numbers_of, params, names, strict=True):
            state = copies.get(number)
            if not state:
                continue
            _check_state(state, parameter, name)
            copies[number] = {key: _copy_for(value, parameter) for key, value in state.items()}
    except TypeError as error:
        # The checks are the constructor's: here a wrong type is a wrong value of the state dict.
        raise ValueError(f"state_dict does not fit: {error}") from error
    return {**state_dict, "param_groups": groups, "state": copies}


def _checked_groups(
    optimizer: torch.optim.Optimizer, state_dict: dict[str, Any], device: torch.device
) -> list[dict[str, Any]]:
    """The parameter groups of `state_dict`, once they fit those of `optimizer`."""
    for key in ("state", "param_groups"):
        if key not in state_dict:
            raise ValueError(
                f"state_dict must have {key}, got {', '.join(map(str, state_dict)) or 'nothing'}"
            )
    saved = state_dict["param_groups"]
    if len(saved) != len(optimizer.param_groups):
        raise ValueError(
            f"loaded state dict has a different number of parameter groups: {len(saved)}, "
            f"the optimizer has {len(optimizer.param_groups)}"
        )
    groups = []
    for position, (group, own) in enumerate(zip(saved, optimizer.param_groups, strict=True)):
        for name in ("params", "lr", "betas", "eps", "weight_decay"):
            if name not in group:
                raise ValueError(
                    f"state_dict must have {name} in every parameter group, "
                    f"got {', '.join(sorted(group))}"
                )
        if len(group["params"]) != len(own["params"]):
            raise ValueError(
                f"loaded state dict contains a parameter group that doesn't match the size of "
                f"optimizer's group: {len(group['params'])} parameters in group {position}, the "
                f"optimizer has {len(own['params'])}"
            )
        check_group_options(group, device)
        groups.append({**group, "decoupled_weight_decay": True})
    return groups


def _copy_for(value: Any, parameter: Tensor) -> Any:
    """A copy of a tensor that torch would load as it is, for the state of `parameter`."""
    if not isinstance(value, Tensor) or value.device != parameter.device:
        return value
    return value.detach().clone()


def _check_state(state: Mapping[str, Any], parameter: Tensor, name: str) -> None:
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if key not in state:
            raise ValueError(
                f"state_dict must have {key} for {name}, "
                f"got {', '.join(map(str, state)) or 'nothing'}"
            )
    if "max_exp_avg_sq" in state:
        raise ValueError(f"AlignedAdamW does not implement amsgrad, got max_exp_avg_sq for {name}")
    for key in ("step", "exp_avg", "exp_avg_sq"):
        if isinstance(state[key], Tensor) and state[key].is_meta:
            raise ValueError(f"{key} of {name} must have values, got a tensor on the device meta")
    for key in ("exp_avg", "exp_avg_sq"):
        hint = "; set_optimizer_state_dict of torch.distributed.checkpoint shards states anew"
        check_lies_as(state[key], f"{key} of {name}", parameter, name, hint)
        check_tensor(local_part(state[key]), f"{key} of {name}", local_part(parameter).shape, None)
    squares = local_part(state["exp_avg_sq"])
    if (squares < 0).any():
        raise ValueError(f"exp_avg_sq of {name} must not be negative, got {squares.min().item()}")
    step = state["step"]
    if isinstance(step, Tensor):
        if step.numel() != 1:
            raise ValueError(f"step of {name} must have one element, got shape {tuple(step.shape)}")
        step = step.item()
    is_finite = isinstance(step, numbers.Real) and math.isfinite(step)
    if not is_finite or step < 0 or step != int(step):
        raise ValueError(f"step of {name} must be a whole number, not negative, got {step}")
