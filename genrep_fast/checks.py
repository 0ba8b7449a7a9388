"""Checks of arguments: one error that names the argument, what it must be and what it got.

What one operator alone asks of its arguments stands beside that operator. A leaf: every room may
use it.
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .memory_overlap import overlaps_itself

# What the operators take.
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)
# Modules of tensor classes that no operator of this package knows.
_UNKNOWN_TENSORS = ("torch.masked", "torch.distributed.tensor", "torch.distributed._tensor")

# Numbers


def check_number(value: Any, name: str) -> None:
    """Check that `value` is a real number, of Python or NumPy, which a bool is not."""
    if not _is_real(value):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")


def check_not_negative(value: Any, name: str) -> None:
    """Check that `value` is a finite number, >= 0."""
    check_number(value, name)
    if not 0 <= value < math.inf:
        raise ValueError(f"{name} must be finite and not negative, got {value}")


def check_positive(value: Any, name: str) -> None:
    """Check that `value` is a finite number, > 0."""
    check_number(value, name)
    if not 0 < value < math.inf:
        raise ValueError(f"{name} must be positive and finite, got {value}")


def check_integer(value: Any, name: str) -> None:
    """Check that `value` is an integer, which a bool is not."""
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise TypeError(f"{name} must be an integer, got {value!r}")


def check_at_least(least: int, **values: Any) -> None:
    """Check that `values` are integers, >= `least`."""
    for name, value in values.items():
        check_integer(value, name)
        if value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def check_in_range(value: Any, name: str, end: int, shown: str | None = None) -> None:
    """Check that `value` is an integer in [0, `end`); messages write `shown` for `end`."""
    check_integer(value, name)
    if not 0 <= value < end:
        raise ValueError(f"{name} must lie in [0, {shown or end}), got {value}")


def check_flag(value: Any, name: str) -> None:
    """Check that `value` is True or False."""
    if not isinstance(value, bool):
        raise TypeError(f"{name} must be True or False, got {value!r}")


def check_seed(seed: Any) -> None:
    """Check that `seed` is an integer in [0, 2⁶⁴), as generators and operators take."""
    check_in_range(seed, "seed", 2**64, "2**64")


def check_max_norm(max_norm: float | None) -> float | None:
    """Check that `max_norm` is None or a positive number."""
    if max_norm is not None:
        check_number(max_norm, "max_norm")
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive or None, got {max_norm}")
    return max_norm


def check_power(power: float) -> float:
    """Check that `power` is a finite number, >= 0; return it as a float."""
    check_not_negative(power, "power")
    return float(power)


def check_weights(weights: Sequence[float], n: int) -> list[float]:
    """Check that `weights` are `n` finite numbers; return them as floats."""
    if not isinstance(weights, Sequence) or not all(map(_is_real, weights)):
        raise TypeError(f"weights must be a sequence of numbers, got {weights!r}")
    if len(weights) != n or not all(abs(weight) < math.inf for weight in weights):
        note = "" if n == 2 else "; give one for each loss, the default is for two"
        raise ValueError(f"weights must be {n} finite numbers, got {weights!r}{note}")
    return [float(weight) for weight in weights]


# Words


def check_choice(value: Any, name: str, choices: Sequence[str]) -> None:
    """Check that `value` is one of at least two words."""
    if not isinstance(value, str) or value not in choices:
        *others, last = [f'"{choice}"' for choice in choices]
        raise ValueError(f"{name} must be {', '.join(others)} or {last}, got {value!r}")


# Tensors


def check_length(tensors: Sequence, name: str, length: int) -> None:
    """Check that `tensors` is a sequence with `length` entries."""
    if not isinstance(tensors, Sequence):
        raise TypeError(f"{name} must be a list or a tuple, got {type(tensors).__name__}")
    if len(tensors) != length:
        raise ValueError(f"{name} must have {length} entries, got {len(tensors)}")


def check_dense(tensor: Tensor, name: str) -> None:
    """Check that `tensor` is a tensor that has strides: not sparse, nested, masked or sharded."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(tensor).__name__}")
    kind = type(tensor)
    if kind not in _PLAIN_TENSORS:
        if torch.nn.parameter.is_lazy(tensor):
            raise ValueError(f"{name} must have a shape, got {kind.__name__}: run its module once")
        if kind.__module__.startswith(_UNKNOWN_TENSORS):
            raise TypeError(f"{name} must be a plain tensor, got {kind.__name__}")
    if tensor.layout is not torch.strided:
        raise ValueError(
            f"{name} must be dense, got layout {tensor.layout}; make it so with .to_dense()"
        )
    if tensor.is_nested:
        raise ValueError(f"{name} must be dense, got a nested tensor: pad it")


def check_floating(tensor: Tensor, name: str) -> None:
    """Check that `tensor` is a dense tensor of one of `DTYPES`."""
    check_dense(tensor, name)
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name} must be float32, bfloat16, float16 or float64, got {tensor.dtype}")


def check_float64_like(tensor: Tensor, name: str, other: Tensor, other_name: str) -> None:
    """`check_floating`, and that `tensor` is float64 if and only if `other` is."""
    check_floating(tensor, name)
    if (tensor.dtype == torch.float64) != (other.dtype == torch.float64):
        raise TypeError(
            f"{name} must be float64 if and only if {other_name} is, "
            f"got {tensor.dtype} and {other_name} of {other.dtype}"
        )


def check_device(device: torch.device, **tensors: Tensor | None) -> None:
    """Check that `tensors` that are not None are on `device`."""
    for name, tensor in tensors.items():
        if tensor is not None and tensor.device != device:
            raise ValueError(
                f"{name} must be on {device} like the other tensors, got {tensor.device}"
            )


def check_tensor(
    tensor: Tensor, name: str, shape: torch.Size | None, device: torch.device | None
) -> None:
    """Check that `tensor` is dense, of one of `DTYPES`, of this shape and device (None: any)."""
    check_floating(tensor, name)
    if shape is not None and tensor.shape != shape:
        raise ValueError(f"{name} must have shape {tuple(shape)}, got {tuple(tensor.shape)}")
    if device is not None:
        check_device(device, **{name: tensor})


def check_writable(tensor: Tensor, name: str, shape: torch.Size, device: torch.device) -> None:
    """`check_tensor`, and that no two elements of `tensor` share memory.

    Those of an expanded tensor or of windows do.
    """
    check_tensor(tensor, name, shape, device)
    axes = zip(tensor.stride(), tensor.shape, strict=True)
    if any(stride == 0 and size > 1 for stride, size in axes):
        raise ValueError(
            f"{name} is written to and must not be an expanded tensor, "
            f"got strides {tensor.stride()}"
        )
    # A traced program's strides may be symbols.
    if torch.compiler.is_compiling() or tensor.is_contiguous():
        return
    if overlaps_itself(tensor):
        raise ValueError(
            f"{name} is written to and must not overlap itself, "
            f"got shape {tuple(shape)} with strides {tensor.stride()}"
        )


def require(condition: Tensor, message: str, got: Tensor | None = None) -> None:
    """Raise ValueError where `condition` (a boolean scalar) on the CPU is False.

    Elsewhere, and when compiled, assert without waiting. Under `torch.func.vmap` the condition must
    hold for all examples.
    """
    if torch.compiler.is_compiling() or condition.device.type != "cpu":
        torch._assert_async(condition, message)
        return
    if torch._C._are_functorch_transforms_active():
        got = None
        while torch._C._functorch.is_functorch_wrapped_tensor(condition):
            condition = torch._C._functorch.get_unwrapped(condition)
        with torch._C._DisableFuncTorch():
            holds = bool(condition.all())
    else:
        holds = bool(condition)
    if not holds:
        raise ValueError(message if got is None else f"{message}, got {got.tolist()}")


# Hyperparameters of AdamW


def check_learning_rate(lr: float | Tensor, device: torch.device) -> None:
    """Check that `lr` is a finite number, not negative, or a tensor of one element.

    A tensor lies on `device` or the CPU. The value of a tensor is checked on the CPU alone, where
    nobody waits for it.
    """
    if isinstance(lr, Tensor):
        check_dense(lr, "lr")
        if lr.numel() != 1:
            raise ValueError(f"lr must have one element, got shape {tuple(lr.shape)}")
        check_scalar(lr.reshape(()), "lr", device)
        if type(lr) is not Tensor or lr.device.type != "cpu" or torch.compiler.is_compiling():
            return
        lr = lr.item()
    check_not_negative(lr, "lr")


def check_hyperparameters(betas: tuple[float, float], eps: float, weight_decay: float) -> None:
    """Check AdamW's hyperparameters but the learning rate."""
    if not isinstance(betas, Sequence) or not all(map(_is_number, betas)):
        raise TypeError(f"betas must be two numbers, got {betas!r}")
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {betas}")
    check_not_negative(eps, "eps")
    check_not_negative(weight_decay, "weight_decay")


def _is_number(value: object) -> bool:
    """Whether `value` is a number, or a tensor of one element on the CPU.

    Nobody waits for such a tensor's value.
    """
    if isinstance(value, Tensor):
        return value.numel() == 1 and value.device.type == "cpu"
    return _is_real(value)


def _is_real(value: object) -> bool:
    return isinstance(value, numbers.Real) and not isinstance(value, bool)


def check_ema_decay(ema_decay: float) -> float:
    """Check that `ema_decay` is between 0 and 1; return it."""
    check_number(ema_decay, "ema_decay")
    if not 0 <= ema_decay <= 1:
        raise ValueError(f"ema_decay must be between 0 and 1, got {ema_decay}")
    return ema_decay


def check_scalar(tensor: Tensor, name: str, device: torch.device) -> None:
    """Check that `tensor` has no axes, and is on `device` or on the CPU."""
    check_tensor(tensor, name, torch.Size(), None)
    if tensor.device not in (device, torch.device("cpu")):
        raise ValueError(f"{name} must be on {device} or on the CPU, got {tensor.device}")
