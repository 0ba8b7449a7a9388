"""Checkpoints of a run: folders ``checkpoints/step-N``, written and read whole or not at all.

They hold JSON and safetensors: nothing in them can run code. ``manifest.json`` lists the other
files with their sizes and SHA-256 hashes.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import stat
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from ..files import read_json, remove, replacing
from ..models.weights import check_weights, named
from ..scoring.chain_bank import ChainBank

_KEPT = 2
_FORMAT = "genrep_fast checkpoint 1"
_NAME = re.compile(r"step-([0-9]+)")
_MANIFEST = "manifest.json"
_STATE = "state.json"
_BANK = "bank.safetensors"
# In bytes; a real one has one thousand.
_LARGEST_MANIFEST = 2**20
# Bytes that are hashed at once.
_BLOCK = 2**20
# Each is a file NAME.safetensors.
_TENSORS = ("model", "optimizer", "averages", "momentum", "teacher", "calibration")
_ALWAYS = (_STATE, "model.safetensors", "optimizer.safetensors", "averages.safetensors")
_ALLOWED = {_STATE, _BANK, *(f"{name}.safetensors" for name in _TENSORS)}
# What file browsers leave in any folder, besides names that begin with a dot.
_OF_THE_SYSTEM = {"Thumbs.db", "desktop.ini"}
# What accelerator.save_state writes: pickles, all of them.
_OF_ACCELERATE = re.compile(
    r"(optimizer|scheduler|sampler|dl_state_dict)(_\d+)?\.bin|scaler\.pt"
    r"|(custom_checkpoint|random_states)_\d+\.pkl"
)


@dataclass
class Checkpoint:
    """What a checkpoint holds.

    Attributes:
        state: what JSON can hold; ``state["step"]`` is the optimizer step.
        tensors: by the name of their file: model, optimizer and averages, momentum and teacher
            where there are such networks, and calibration where the teacher has one.
        bank: of the teacher, where it has one.
    """

    state: dict[str, Any]
    tensors: dict[str, dict[str, torch.Tensor]] = field(default_factory=dict)
    bank: ChainBank | None = None


class _Found(NamedTuple):
    step: int
    path: Path


class _Damage(Exception):
    """Why a checkpoint cannot be read."""


def save_checkpoint(output: Path, checkpoint: Checkpoint) -> Path:
    """Write a checkpoint, let it appear in one rename, and drop all but the newest two.

    Raises:
        OSError: where it cannot be written; the checkpoints before it are kept.
    """
    folder = output / "checkpoints"
    final = folder / f"step-{checkpoint.state['step']:07d}"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(final) as unfinished:
            _write(unfinished, checkpoint)
    except OSError as error:
        older = [found.path.name for found in _checkpoints(output) if found.path != final]
        kept = f"; the one before, {older[-1]}, is kept" if older else ""
        why = error.strerror or error
        raise OSError(f"checkpoint {final} cannot be written ({why}){kept}") from error
    drop_old_checkpoints(output)
    return final


def drop_old_checkpoints(output: Path) -> None:
    """Drop all but the newest two, as a process that dies behind a new one has not."""
    for old in _checkpoints(output)[:-_KEPT]:
        _drop(old.path)


def read_checkpoint(folder: Path, device: torch.device | str = "cpu") -> Checkpoint:
    """Read a checkpoint that `save_checkpoint` wrote: its tensors on the CPU, its bank on `device`.

    Raises:
        ValueError: where a file is damaged, missing or surplus, with its name and with the
            checkpoint from which the run can go on.
    """
    try:
        step = _verify(folder)
        state = read_json(folder / _STATE)
        if not isinstance(state, dict) or state.get("step") != step:
            raise _Damage(f"{_STATE} is not that of step {step}")
        names = [name for name in _TENSORS if (folder / f"{name}.safetensors").is_file()]
        # Copies: the file, which is mapped into memory, is dropped some checkpoints later.
        tensors = {name: _copied(load_file(folder / f"{name}.safetensors")) for name in names}
        bank = None
        if (folder / _BANK).is_file():
            bank = ChainBank.load(folder / _BANK, device=device)
    except (_Damage, OSError, ValueError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else error
        message = f"checkpoint {folder} cannot be read ({reason}); {_advice(folder)}"
        raise ValueError(message) from error
    return Checkpoint(state, tensors, bank)


def newest_checkpoint(output: Path) -> Path | None:
    """The newest checkpoint in the output folder of a run, or None.

    Raises:
        ValueError: where ``checkpoints`` is no folder.
    """
    folder = output / "checkpoints"
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"output: {folder} is not a folder")
    found = _checkpoints(output)
    return found[-1].path if found else None


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Sequence[str]
) -> dict[str, torch.Tensor]:
    """The state of an AdamW, as ``PARAMETER/KEY``; `names` are those of its parameters in order."""
    state_dict = optimizer.state_dict()
    numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
    tensors = {}
    for number, name in zip(numbers, names, strict=True):
        for key, value in state_dict["state"].get(number, {}).items():
            # Counters may be one tensor for many parameters, which safetensors does not write.
            tensors[f"{name}/{key}"] = value.clone() if value.ndim == 0 else value
    return tensors


def optimizer_state_dict(
    optimizer: torch.optim.Optimizer,
    parameters: Mapping[str, torch.Tensor],
    tensors: Mapping[str, torch.Tensor],
    learning_rates: Sequence[float],
) -> dict[str, Any]:
    """A state dict for `optimizer` from what `optimizer_tensors` gave.

    Its hyperparameters are those that the optimizer has, but for the learning rates.

    Raises:
        ValueError: for tensors that do not fit the parameters, and another number of learning rates
            than of groups.
    """
    groups = optimizer.state_dict()["param_groups"]
    if len(learning_rates) != len(groups):
        counts = f"{len(learning_rates)} learning rates for {len(groups)}"
        raise ValueError(f"there are {counts} groups of parameters")
    numbers = [number for group in groups for number in group["params"]]
    reached = {name.rpartition("/")[0] for name in tensors}
    counter = torch.zeros((), dtype=torch.float32)
    expected: dict[str, torch.Tensor] = {}
    for name in reached & parameters.keys():
        expected |= {
            f"{name}/step": counter,
            f"{name}/exp_avg": parameters[name],
            f"{name}/exp_avg_sq": parameters[name],
        }
    check_weights(tensors, expected, "the tensors of optimizer.safetensors")
    state = {}
    for number, (name, parameter) in zip(numbers, parameters.items(), strict=True):
        if name in reached:
            # In the parameter's own order of memory, as the optimizer makes them.
            state[number] = {"step": tensors[f"{name}/step"]}
            for key in ("exp_avg", "exp_avg_sq"):
                state[number][key] = torch.empty_like(parameter).copy_(tensors[f"{name}/{key}"])
    rates = [{**group, "lr": rate} for group, rate in zip(groups, learning_rates, strict=True)]
    return {"state": state, "param_groups": rates}


def _write(folder: Path, checkpoint: Checkpoint) -> None:
    folder.mkdir()
    for name, tensors in checkpoint.tensors.items():
        contiguous = {key: tensor.detach().contiguous() for key, tensor in tensors.items()}
        save_file(contiguous, folder / f"{name}.safetensors", metadata={"format": "pt"})
    if checkpoint.bank is not None:
        checkpoint.bank.save(folder / _BANK)
    (folder / _STATE).write_text(json.dumps(checkpoint.state), encoding="utf-8")
    files = {}
    for path in folder.iterdir():
        files[path.name] = {"bytes": path.stat().st_size, "sha256": _hash(path)}
    manifest = {"format": _FORMAT, "step": checkpoint.state["step"], "files": files}
    (folder / _MANIFEST).write_bytes(_canonical(manifest))


def _canonical(manifest: dict[str, Any]) -> bytes:
    """The only bytes that stand for this manifest, with the hash of all the rest of them."""
    content = {name: value for name, value in manifest.items() if name != "sha256"}
    own = hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
    return json.dumps({**content, "sha256": own}, indent=1, sort_keys=True).encode() + b"\n"


def _verify(folder: Path) -> int:
    """The step of a checkpoint whose files are all there, alone, and as they were written.

    Raises:
        _Damage, OSError: for any other.
    """
    if folder.is_symlink() or not folder.is_dir():
        raise _Damage("it is not a folder")
    present = {name for name in os.listdir(folder) if not name.startswith(".")} - _OF_THE_SYSTEM
    if _MANIFEST not in present:
        if any(_OF_ACCELERATE.fullmatch(name) for name in present):
            pickles = "an earlier genrep_fast wrote it as pickles, which can run code"
            raise _Damage(f"{pickles}: train anew in another folder")
        raise _Damage(f"{_MANIFEST} is missing")
    step, files = _read_manifest(folder / _MANIFEST)
    # Only names of the folder's own listing are opened: nothing outside of it can be reached.
    _refuse(files.keys() - present, "missing")
    _refuse(present - files.keys() - {_MANIFEST}, "no part of it")
    _refuse(files.keys() - _ALLOWED, "no part of a checkpoint")
    _refuse(set(_ALWAYS) - files.keys(), "missing")
    if _number(folder) != step:
        raise _Damage(f"{_MANIFEST} is that of step {step}")
    for name, entry in sorted(files.items()):
        path = folder / name
        size = _size(path)
        if entry != {"bytes": size, "sha256": entry.get("sha256")}:
            wanted = entry.get("bytes")
            raise _Damage(f"{name} is damaged: it has {size} bytes, and was written with {wanted}")
        if entry["sha256"] != _hash(path):
            raise _Damage(f"{name} is damaged: its SHA-256 hash is not that of when it was written")
    return step


def _read_manifest(path: Path) -> tuple[int, dict[str, dict[str, Any]]]:
    damaged = f"{_MANIFEST} is damaged"
    if _size(path) > _LARGEST_MANIFEST:
        raise _Damage(damaged)
    content = path.read_bytes()
    try:
        manifest = json.loads(content.decode("utf-8"))
        whole = isinstance(manifest, dict) and _canonical(manifest) == content
    except (ValueError, RecursionError) as error:
        raise _Damage(f"{damaged}: {error}") from error
    if not whole:
        raise _Damage(damaged)
    if manifest.get("format") != _FORMAT:
        found = f"{_MANIFEST} has the format {manifest.get('format')!r}"
        raise _Damage(f"{found}, this genrep_fast reads {_FORMAT!r}")
    step = manifest.get("step")
    files = manifest.get("files")
    if type(step) is not int or not isinstance(files, dict):
        raise _Damage(damaged)
    if not all(isinstance(entry, dict) for entry in files.values()):
        raise _Damage(damaged)
    return step, files


def _refuse(names: set[str], why: str) -> None:
    if names:
        verb = "is" if len(names) == 1 else "are"
        raise _Damage(f"{named(sorted(names))} {verb} {why}")


def _size(path: Path) -> int:
    """Size of a file, which is no link, folder or device; else raise _Damage."""
    status = path.lstat()
    if not stat.S_ISREG(status.st_mode):
        raise _Damage(f"{path.name} is not a file")
    return status.st_size


def _hash(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _copied(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in tensors.items()}


def _advice(damaged: Path) -> str:
    """What to do about a damaged checkpoint: names the newest one before it that is whole."""
    step = _number(damaged) or 0
    older = [found for found in _checkpoints(damaged.parent.parent) if found.step < step]
    for found in reversed(older):
        try:
            _verify(found.path)
        except (_Damage, OSError):
            continue
        between = "it" if found is older[-1] else f"it and those after {found.path.name}"
        return f"delete {between} to resume from the one before, step {found.step}"
    none = f"delete {damaged.parent}, in which there is no whole one before it"
    return f"{none}, to start from the beginning"


def _number(folder: Path) -> int | None:
    found = _NAME.fullmatch(folder.name)
    return int(found.group(1)) if found else None


def _checkpoints(output: Path) -> list[_Found]:
    """The checkpoints of a run by their steps, whatever the number of digits."""
    folder = output / "checkpoints"
    paths = folder.iterdir() if folder.is_dir() else ()
    numbered = ((_number(path), path) for path in paths)
    return sorted(_Found(step, path) for step, path in numbered if step is not None)


def _drop(old: Path) -> None:
    """Remove an old checkpoint, which disappears at once; links and files of such names stay."""
    if old.is_dir() and not old.is_symlink():
        leaving = old.with_name(f".{old.name}.{os.getpid()}.tmp")
        os.rename(old, leaving)
        remove(leaving)
