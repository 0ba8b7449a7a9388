"""Weights that are loaded complete or refused: no key missing or left over, every shape right."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from ..files import read_json

# Keys in a message; the others are counted.
_NAMED = 3
_SIZE = r"torch\.Size\((\[[\d, ]*\])\)"
_Named = Mapping[str, torch.Tensor]
_log = logging.getLogger("diffusers.models.modeling_utils")


def load_complete(from_pretrained: Callable[..., Any], path: str | Path, **kwargs: Any) -> Any:
    """What a diffusers model's ``from_pretrained(path, **kwargs)`` returns, of complete weights.

    Raises:
        ValueError: with the keys that are missing, unexpected or of another shape.
        OSError: where the weights cannot be read.
    """
    wants_info = kwargs.pop("output_loading_info", False)
    options = kwargs | {"use_safetensors": True, "output_loading_info": True}
    folder = Path(path, kwargs.get("subfolder") or "")
    shards = _shards(folder, kwargs.get("variant"))
    _log.addFilter(_is_no_error_here)
    try:
        model, info = from_pretrained(path, **options)
    except SafetensorError as error:
        raise OSError(f"the weights in {path} cannot be read: {error}") from error
    except (ValueError, RuntimeError) as error:
        wrong = _wrong_shapes(str(error))
        if not wrong:
            raise
        raise ValueError(f"the weights in {path} do not fit: {named(wrong)}") from error
    finally:
        _log.removeFilter(_is_no_error_here)
    missing = info["missing_keys"] + _missing_in_shards(folder, shards)
    _refuse(f"the weights in {path}", set(missing), info["unexpected_keys"])
    return (model, info) if wants_info else model


def meta_tensors(model: torch.nn.Module) -> set[str]:
    """Names of parameters and buffers that have no values."""
    tensors = (*model.named_parameters(), *model.named_buffers())
    return {name for name, tensor in tensors if tensor.is_meta}


def check_weights(found: _Named, expected: _Named, what: str) -> None:
    """Refuse tensors that are not, name by name, of the shapes and dtypes of `expected`.

    Args:
        what: they are called in the message.

    Raises:
        ValueError: with the names that are missing, unexpected or do not fit.
    """
    _refuse(what, expected.keys() - found.keys(), found.keys() - expected.keys())
    wrong = [
        f"{name} is {_description(tensor)}, not {_description(expected[name])}"
        for name, tensor in found.items()
        if (tensor.shape, tensor.dtype) != (expected[name].shape, expected[name].dtype)
    ]
    if wrong:
        raise ValueError(f"{what} do not fit: {named(wrong)}")


def named(names: Collection[str]) -> str:
    """The first few of `names`, and how many there are beside them."""
    names = list(names)
    first = ", ".join(names[:_NAMED])
    others = len(names) - _NAMED
    return f"{first} and {others} more" if others > 0 else first


def _is_no_error_here(record: logging.LogRecord) -> bool:
    """Whether a record of diffusers' is not about what an error says here once more."""
    message = record.getMessage()
    if message.startswith("Some weights of"):
        return "shapes did not match" in message
    return not message.startswith("An error occurred while trying to fetch")


def _wrong_shapes(message: str) -> list[str]:
    """What diffusers and PyTorch say of shapes, as `check_weights` says it; else nothing."""
    of_diffusers = re.findall(rf"because (\S+) expected shape {_SIZE}, but got {_SIZE}", message)
    mismatch = rf"size mismatch for (\S+): copying a param with shape {_SIZE} from .*? is {_SIZE}"
    of_torch = re.findall(mismatch, message)
    wrong = [(name, found, expected) for name, expected, found in of_diffusers] + of_torch
    return [f"{name} is {found}, not {expected}" for name, found, expected in wrong]


def _shards(folder: Path, variant: str | None) -> dict[str, str]:
    """The file of each key, from the index of weights in several files; empty without one."""
    ending = f"{variant}.json" if variant else "json"
    path = folder / f"diffusion_pytorch_model.safetensors.index.{ending}"
    if not path.is_file():
        return {}
    index = read_json(path)
    shards = index.get("weight_map") if isinstance(index, dict) else None
    if not isinstance(shards, dict):
        raise ValueError(f"{path} is damaged: it has no weight_map")
    for shard in shards.values():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise ValueError(f"{path} is damaged: {shard!r} is no name of a file in its folder")
    return shards


def _missing_in_shards(folder: Path, shards: dict[str, str]) -> list[str]:
    """Keys that their file lacks, though the index, which diffusers relies on, has them."""
    keys = {}
    for shard in sorted(set(shards.values())):
        with safe_open(folder / shard, "pt") as file:
            keys[shard] = set(file.keys())
    return [name for name, shard in shards.items() if name not in keys[shard]]


def _refuse(what: str, missing: Collection[str], unexpected: Collection[str]) -> None:
    lacks = [f"{len(missing)} missing ({named(sorted(missing))})"] if missing else []
    has = [f"{len(unexpected)} unexpected ({named(sorted(unexpected))})"] if unexpected else []
    if lacks or has:
        raise ValueError(f"{what} are not those of this model: {', '.join(lacks + has)}")


def _description(tensor: torch.Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
