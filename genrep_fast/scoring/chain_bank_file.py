"""The file of a `ChainBank`: one of safetensors, of which nothing is trusted when it is read."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from ..checks import check_at_least
from ..coefficients.tables import StepCoefficients
from ..coefficients.transitions import ReverseTransition, normal_tables
from ..files import replacing
from .chain_settings import ChainSettings, check_bank_device, check_centers, run_dtype
from .chains import ReverseChain

_COEFFICIENTS = tuple(field.name for field in dataclasses.fields(StepCoefficients) if field.init)
_TIMESTEP_DTYPES = (torch.int64, torch.int32, torch.float32, torch.float64)

# Of a file's metadata, which holds a dozen numbers.
_METADATA_CHARACTERS = 2**16


class BankContents(NamedTuple):
    """What a bank is made of, and its file holds."""

    centers: Tensor
    chain: ReverseChain
    transition: ReverseTransition
    settings: ChainSettings
    drawn: int
    evaluations: int


def write_bank(path: str | os.PathLike, bank: BankContents) -> None:
    """Write one safetensors file; one that was there is replaced as a whole or not at all."""
    _check_path(path)
    # Where running and scoring have the same deviation it is one tensor, which safetensors
    # refuses to write twice.
    transition = {name: table.clone() for name, table in bank.transition._asdict().items()}
    tensors = {"centers": bank.centers, "timesteps": bank.chain.timesteps, **transition}
    if bank.chain.log_variance_ratio is not None:
        tensors["log_variance_ratio"] = bank.chain.log_variance_ratio
    for name in _COEFFICIENTS:
        tensors[f"coefficients.{name}"] = getattr(bank.chain.coefficients, name)
    state = {
        "settings": dataclasses.asdict(bank.settings),
        "drawn": bank.drawn,
        "evaluations": bank.evaluations,
    }
    with replacing(Path(path)) as unfinished:
        save_file(tensors, unfinished, metadata={"chain_bank": json.dumps(state)})


def read_bank(path: str | os.PathLike, device: torch.device | str) -> BankContents:
    """Read what `write_bank` wrote, its centres onto `device`.

    Raises:
        FileNotFoundError, ValueError: as `ChainBank.load`.
    """
    _check_path(path)
    check_bank_device(device)
    # A reader of a named pipe would wait for a writer.
    if os.path.exists(path) and not os.path.isfile(path):
        _refuse(path, ValueError("it is not a file"))
    try:
        # Tensors of inference mode could not be refreshed, nor scored with a gradient, outside.
        with torch.inference_mode(False), safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError:
        raise
    # What the reader raises depends on where a file is broken.
    except Exception as error:
        _refuse(path, error)
    try:
        contents = _checked_contents(metadata, tensors)
    except (TypeError, ValueError, RecursionError) as error:
        _refuse(path, error)
    with torch.inference_mode(False):
        return contents._replace(centers=contents.centers.to(device))


def _check_path(path: str | os.PathLike) -> None:
    if not isinstance(path, (str, os.PathLike)):
        raise TypeError(f"path must be a string or a path, got {type(path).__name__}")


def _refuse(path: str | os.PathLike, error: Exception) -> NoReturn:
    """Raise ValueError with one line, of limited length, that says why `path` is no bank."""
    reason = " ".join(str(error).split()) or type(error).__name__
    if len(reason) > 300:
        reason = f"{reason[:300]} …"
    raise ValueError(f"{path} is truncated or not a chain bank: {reason}") from error


def _checked_contents(metadata: dict[str, str], tensors: dict[str, Tensor]) -> BankContents:
    """The bank of a file's metadata and tensors.

    Raises:
        TypeError, ValueError: for what `write_bank` cannot have written; the message names the
            field.
    """
    state = _read_state(metadata)
    names = ["centers", "timesteps", *ReverseTransition._fields]
    names += [f"coefficients.{name}" for name in _COEFFICIENTS]
    if "log_variance_ratio" in tensors:
        names.append("log_variance_ratio")
    _require_keys("tensors", tensors, names)
    fields = [field.name for field in dataclasses.fields(ChainSettings)]
    _require_keys("settings", state["settings"], fields)
    settings = ChainSettings(**state["settings"])
    centers, timesteps = tensors["centers"], tensors["timesteps"]
    _check_timesteps(timesteps)
    steps = len(timesteps)
    settings.check(steps)
    if centers.ndim < 3:
        raise ValueError(f"centers must be [K, S, *sample_shape], got shape {tuple(centers.shape)}")
    num_classes, num_centers, *sample_shape = centers.shape
    try:
        check_centers(centers.dtype, num_classes, tuple(sample_shape))
    except (TypeError, ValueError) as error:
        found = f"centers {centers.dtype} of shape {tuple(centers.shape)}"
        raise ValueError(f"{found}: {error}") from error
    kept = len(range(settings.burn_in, steps, settings.thin))
    if num_centers != settings.chains * kept:
        wanted = f"{settings.chains} chains of {kept} kept steps a class, as the settings say"
        raise ValueError(f"centers must hold {wanted}, got {num_centers} centres")
    transition, tables, ratio = _read_tables(tensors, settings, steps)
    drawn, evaluations = state["drawn"], state["evaluations"]
    _check_counts(drawn, evaluations, settings, num_classes, steps)
    chain = ReverseChain(timesteps, StepCoefficients(**tables), ratio)
    return BankContents(centers, chain, transition, settings, drawn, evaluations)


def _read_state(metadata: dict[str, str]) -> dict[str, Any]:
    """The dictionary that `write_bank` writes into the metadata, with its three keys."""
    if "chain_bank" not in metadata:
        raise ValueError("the metadata must hold chain_bank, got none")
    text = metadata["chain_bank"]
    if len(text) > _METADATA_CHARACTERS:
        most = f"at most {_METADATA_CHARACTERS} characters of metadata"
        raise ValueError(f"chain_bank must have {most}, got {len(text)}")

    def no_number(constant: str) -> NoReturn:
        raise ValueError(f"chain_bank must hold finite numbers, got {constant}")

    try:
        state = json.loads(text, parse_constant=no_number)
    except json.JSONDecodeError as error:
        raise ValueError(f"chain_bank must be JSON, got {text[:40]!r} ({error})") from error
    _require_keys("chain_bank", state, ["settings", "drawn", "evaluations"])
    return state


def _read_tables(
    tensors: dict[str, Tensor], settings: ChainSettings, steps: int
) -> tuple[ReverseTransition, dict[str, Tensor], Tensor | None]:
    """The transition, the coefficients by name and the log variance ratio, each checked."""
    transition = ReverseTransition(**{name: tensors[name] for name in ReverseTransition._fields})
    tables = {name: tensors[f"coefficients.{name}"] for name in _COEFFICIENTS}
    ratio = tensors.get("log_variance_ratio")
    for name, table in transition._asdict().items():
        _check_table(name, table, steps, torch.float64)
    dtype = run_dtype(tensors["centers"].dtype)
    for name, table in tables.items():
        may_be_infinite = name in ("inv_var", "log_norm")
        _check_table(f"coefficients.{name}", table, steps, dtype, may_be_infinite)
    if ratio is not None:
        _check_table("log_variance_ratio", ratio, steps, torch.float64)
    _check_transition(transition, settings)
    _check_coefficients(tables, transition, settings, ratio)
    return transition, tables, ratio


def _check_counts(
    drawn: int, evaluations: int, settings: ChainSettings, num_classes: int, steps: int
) -> None:
    """Raise TypeError or ValueError for numbers that no bank with these settings has counted."""
    check_at_least(0, drawn=drawn, evaluations=evaluations)
    if drawn < settings.chains:
        raise ValueError(
            f"drawn must be at least the number of chains, {settings.chains}, got {drawn}"
        )
    settings.check_drawn(drawn, num_classes)
    expected = num_classes * drawn * steps
    if evaluations != expected:
        wanted = f"{expected}, of {drawn} chains a class that were drawn"
        raise ValueError(f"evaluations must be {wanted}, got {evaluations}")


def _require_keys(what: str, given: Any, names: Sequence[str]) -> None:
    if not isinstance(given, dict):
        raise TypeError(f"{what} must be a dictionary, got {type(given).__name__}")
    missing = [name for name in names if name not in given]
    surplus = [name for name in given if name not in names]
    if missing:
        raise ValueError(f"{what} must hold {', '.join(missing)}, got none")
    if surplus:
        found = ", ".join(map(repr, surplus))
        raise ValueError(f"{what} must hold nothing but a bank's, got {found}")


def _check_timesteps(timesteps: Tensor) -> None:
    if timesteps.dtype not in _TIMESTEP_DTYPES or timesteps.ndim != 1:
        found = f"{timesteps.dtype} of shape {tuple(timesteps.shape)}"
        raise ValueError(f"timesteps must be numbers [steps], got {found}")
    if not (timesteps.isfinite() & (timesteps >= 0)).all():
        raise ValueError("timesteps must be finite and not negative")
    if (timesteps.diff() > 0).any():
        raise ValueError("timesteps must not increase")


def _check_table(
    name: str, table: Tensor, steps: int, dtype: torch.dtype, may_be_infinite: bool = False
) -> None:
    if table.dtype != dtype or table.shape != (steps,):
        found = f"{table.dtype} of shape {tuple(table.shape)}"
        raise ValueError(f"{name} must be {dtype} [{steps}], got {found}")
    valid = ~table.isnan() if may_be_infinite else table.isfinite()
    if not valid.all():
        raise ValueError(f"{name} must be finite, got {table[~valid][0].item()}")


def _check_transition(transition: ReverseTransition, settings: ChainSettings) -> None:
    """Raise ValueError for standard deviations that do not move or cannot score the chains."""
    if (transition.score_std < 0).any():
        raise ValueError(f"score_std must not be negative, got {transition.score_std.min().item()}")
    if not ((transition.std == 0) | (transition.std == transition.score_std)).all():
        raise ValueError("std must be 0 or score_std at every step")
    kept = transition.score_std[settings.burn_in :: settings.thin]
    kept = kept.clamp(min=float(settings.sigma_floor))
    inv_var, _ = normal_tables(kept)
    if inv_var.isinf().any():
        raise ValueError(
            "score_std of a kept step must be large enough to score, "
            f"got {kept.min().item()} with sigma_floor included"
        )


def _check_coefficients(
    tables: dict[str, Tensor],
    transition: ReverseTransition,
    settings: ChainSettings,
    log_variance_ratio: Tensor | None,
) -> None:
    """Raise ValueError for tables that are not those of steps whose mean is given.

    See `StepCoefficients.chain`, parameterization="mean".
    """
    constants = {"data": 1, "noisy": 0, "output": -1, "mean_noisy": 0, "mean_output": 1}
    for name, value in constants.items():
        if (tables[name] != value).any():
            wanted = f"{value} at every step, the mean being given"
            raise ValueError(f"coefficients.{name} must be {wanted}")
    std = tables["std"].double()
    score_std = transition.score_std
    scored = torch.ones_like(std, dtype=torch.bool)
    rounding = 8 * torch.finfo(tables["std"].dtype).eps
    if log_variance_ratio is None:
        fits = tables["std"] == transition.std.to(tables["std"].dtype)
    else:
        if (log_variance_ratio > 0).any():
            largest = log_variance_ratio.max().item()
            raise ValueError(f"log_variance_ratio must not be positive, got {largest}")
        # The larger of the two deviations between which the network chooses; the transition has
        # either of them.
        smaller = std * (log_variance_ratio / 2).exp()
        fits = (transition.std - std).abs() <= rounding * std
        fits |= (transition.std - smaller).abs() <= rounding * smaller
        # The step that adds no noise has a scoring deviation that is kept nowhere else.
        score_std = std
        scored = std > 0
    if not fits.all():
        raise ValueError(
            "coefficients.std must be the kernel's std at every step, "
            "or what log_variance_ratio makes of it"
        )
    expected = normal_tables(score_std.clamp(min=float(settings.sigma_floor)))
    for name, table in zip(("inv_var", "log_norm"), expected, strict=True):
        found = tables[name].double()[scored]
        if not torch.allclose(found, table[scored], rtol=rounding, atol=rounding):
            raise ValueError(
                f"coefficients.{name} must follow from score_std and sigma_floor at every step"
            )
