"""What the results of a classifier depend on, as plain values that JSON has."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .calibration import Calibration
from .file import calibration_tensors
from .network import Network, module_of
from .pipelines.denoiser import PipelineDenoiser

# What torch.compile puts into the names of tensors.
_COMPILED = "_orig_mod."
# Hexadecimal digits of a hash.
_DIGITS = 32


def described_results(
    network: Network, scheduler: Any, calibration: Calibration | None, settings: dict[str, Any]
) -> dict[str, Any]:
    """What results depend on, as JSON has it: networks, scheduler, calibration and `settings`."""
    of_scheduler = {key: value for key, value in scheduler.config.items() if key[0] != "_"}
    found = None
    if calibration is not None:
        found = tensors_hash(calibration_tensors(calibration))
    return described(
        {
            **settings,
            "denoiser": network.denoiser,
            "vae": network.vae,
            "dtype": network.dtype(torch.empty(0)),
            "scheduler": {"_class_name": type(scheduler).__name__, **of_scheduler},
            "calibration": found,
        }
    )


def described(value: Any) -> Any:
    """A setting as JSON has it: dataclasses with names, networks with a hash of their weights.

    The name under which a network was loaded is told as "loaded_from".
    """
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, np.generic | np.ndarray | Tensor):
        return value.tolist()
    if isinstance(value, torch.dtype | torch.device):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        return {"name": type(value).__name__, **described(fields)}
    if isinstance(value, dict):
        return {str(key): described(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple | range):
        return [described(inner) for inner in value]
    return _network(value)


def differences(former: Any, now: Any, name: str = "") -> Iterator[str]:
    """Phrases that say where two values of JSON differ."""
    if isinstance(former, dict) and isinstance(now, dict):
        keys = [*{**former, **now}]
        if former.get("name") != now.get("name"):
            # Settings of two kinds have nothing in common.
            keys = ["name"]
        for key in keys:
            inner = f"{name}.{key}" if name else key
            yield from differences(former.get(key), now.get(key), inner)
    elif _text(former) != _text(now):
        yield f"{name} is {_shown(former)} there and {_shown(now)} here"


def tensors_hash(tensors: dict[str, Tensor]) -> str:
    """Of names, shapes, dtypes and values.

    Values of what is no plain dense tensor, of quantized weights for example, do not count.
    """
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name].detach()
        digest.update(f"{name} {list(tensor.shape)} {tensor.dtype}\n".encode())
        is_plain = type(tensor) in (Tensor, nn.Parameter) and tensor.layout is torch.strided
        if is_plain and tensor.device.type != "meta" and not tensor.is_quantized:
            flat = tensor.reshape(-1).contiguous().cpu()
            digest.update(flat.view(torch.uint8).numpy().data)
    return digest.hexdigest()[:_DIGITS]


def _network(value: Any) -> dict[str, Any]:
    """A module, a function or another object, by its class and the weights that it reaches."""
    found: dict[str, Any] = {"class": _name(value)}
    modules = list(_modules(value))
    tensors = {}
    for number, module in enumerate(modules):
        for key, tensor in module.state_dict().items():
            # Others are states of modules' own.
            if isinstance(tensor, Tensor):
                tensors[f"{number}.{key.replace(_COMPILED, '')}"] = tensor
    found["parameters"] = tensors_hash(tensors) if tensors else None
    paths = (getattr(module, "config", None) for module in modules)
    path = next((getattr(config, "_name_or_path", None) for config in paths if config), None)
    found["loaded_from"] = path or None
    if isinstance(value, PipelineDenoiser):
        found["class"] = value.family
        found["prompts"], found["null_prompt"] = value.prompts.classes, value.prompts.null
        found["conditioning"] = tensors_hash(value.conditioning)
    return found


def _name(value: Any) -> str:
    original = getattr(value, "_orig_mod", value)
    if isinstance(value, functools.partial):
        original = value.func
    if not inspect.isroutine(original):
        original = type(original)
    return f"{original.__module__}.{original.__qualname__}"


def _modules(value: Any) -> Iterator[nn.Module]:
    """The networks that a function uses: itself, its object, and what its code names."""
    module = module_of(value)
    if module is not None:
        yield module
    elif isinstance(value, functools.partial):
        for part in (value.func, *value.args, *value.keywords.values()):
            yield from _modules(part)
    elif inspect.isfunction(value):
        variables = inspect.getclosurevars(value)
        used = (*variables.nonlocals.values(), *variables.globals.values())
        yield from filter(None, map(module_of, used))
    else:
        yield from filter(None, map(module_of, getattr(value, "__dict__", {}).values()))


def _text(value: Any) -> str:
    # NaN is no number that equals itself.
    return json.dumps(value, sort_keys=True)


def _shown(value: Any) -> str:
    text = _text(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
