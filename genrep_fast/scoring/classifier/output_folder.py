"""The folder of a classification that is written as images finish, and goes on where it ended.

``classification.json`` says what the results depend on, and is written first. ``parts/`` holds
rows of images. The newest part is written anew, whole or not at all, as long as it grows.
"""

from __future__ import annotations

import json
import re
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from ..._version import __version__
from ...files import read_json, remove_unfinished, write_atomically
from .description import differences
from .parts import TOLD, Layout, Part, preferred_kind

SETTINGS = "classification.json"
PARTS = "parts"
_FORMAT = 1
# Settings that results do not depend on, but for rounding.
_OF_NO_CONSEQUENCE = ("versions", "batch_size", "loaded_from")
# Of the time, that is spent on writing at most.
_SHARE = 1 / 20


class Finished(NamedTuple):
    """Images of former calls, by their ids in ascending order.

    Attributes:
        ids, labels, predictions, evaluations: int64 [n], −1 for no label.
        digests: of their content, [n].
    """

    ids: np.ndarray
    labels: np.ndarray
    predictions: np.ndarray
    evaluations: np.ndarray
    digests: np.ndarray

    def places(self, ids: list[int]) -> list[int]:
        """Of images by their ids, −1 for one that is not finished."""
        if not len(self.ids):
            return [-1] * len(ids)
        wanted = np.asarray(ids, dtype=np.int64)
        places = np.searchsorted(self.ids, wanted).clip(max=len(self.ids) - 1)
        return np.where(self.ids[places] == wanted, places, -1).tolist()


class OutputFolder:
    """Where parts are written, by the only writer of the folder.

    Args:
        path: the folder, which is locked.
        settings: what results depend on, without format and versions; `layout_of` reads some.

    Attributes:
        finished: what former calls left.

    Raises:
        FileExistsError: for a folder that holds something else.
        ValueError: for one of other settings, and for a damaged file; the message names it.
    """

    def __init__(self, path: Path, settings: dict[str, Any]) -> None:
        self.path = path
        kind = preferred_kind()
        self._unsaved: dict[str, Any] | None = None
        if (path / SETTINGS).exists() or (path / SETTINGS).is_symlink():
            former = read_settings(path)
            kind = former["parts"]
            _check_same(path, former, _plain(settings))
        else:
            _check_empty(path)
            self._unsaved = {"format": _FORMAT, "parts": kind, "versions": _versions(), **settings}
        for folder in (path, path / PARTS):
            remove_unfinished(folder)
        self.layout = layout_of({**settings, "parts": kind})
        former_parts = part_files(path, kind)
        self.finished = _finished(former_parts, self.layout)
        # Complete or not, they are left as they are.
        self._number = 1 + max((_number(path) for path in former_parts), default=-1)
        self._written = time.monotonic()
        self._seconds = 0.0

    def begin(self) -> None:
        """Write the settings, where they have not been written.

        Raises:
            OSError: where they cannot be.
        """
        if self._unsaved is not None:
            write_atomically(self.path / SETTINGS, json.dumps(self._unsaved, indent=2) + "\n")
            self._unsaved = None

    def is_due(self) -> bool:
        """Whether writing takes little of the time that has passed since it was last done."""
        return time.monotonic() - self._written >= self._seconds / _SHARE

    def write(self, part: Part, complete: bool) -> None:
        """Write the newest part; a `complete` one is followed by another.

        Raises:
            OSError: where it cannot be written; what was there before is kept.
        """
        started = time.monotonic()
        self.begin()
        (self.path / PARTS).mkdir(exist_ok=True)
        path = self.path / PARTS / f"part-{self._number:06d}.{self.layout.kind}"
        write_atomically(path, self.layout.encoded(part.columns()))
        self._number += complete
        self._written = time.monotonic()
        self._seconds = self._written - started


def part_files(folder: Path, kind: str) -> list[Path]:
    """The parts of a folder, in their order."""
    found = (folder / PARTS).glob(f"part-*.{kind}")
    return sorted(path for path in found if re.fullmatch("part-[0-9]{6,9}", path.stem))


def layout_of(settings: dict[str, Any]) -> Layout:
    """Of the rows of a folder."""
    has_lift = settings.get("null_class") is not None
    return Layout(settings["num_classes"], has_lift, settings["parts"])


def _number(path: Path) -> int:
    return int(path.stem.removeprefix("part-"))


def read_settings(folder: Path) -> dict[str, Any]:
    """What ``classification.json`` says.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is damaged; the message names it.
    """
    file = folder / SETTINGS
    if not file.exists():
        raise FileNotFoundError(f"folder: {file} does not exist; none was classified into {folder}")
    settings = read_json(file)
    if not isinstance(settings, dict) or settings.get("format") != _FORMAT:
        raise ValueError(f"{file} is damaged: its format must be {_FORMAT}")
    if settings.get("parts") not in ("parquet", "csv"):
        raise ValueError(f'{file} is damaged: parts must be "parquet" or "csv"')
    num_classes, temperature = settings.get("num_classes"), settings.get("temperature")
    if not isinstance(num_classes, int) or not 2 <= num_classes < 10**6:
        raise ValueError(f"{file} is damaged: num_classes must be at least 2, got {num_classes!r}")
    if not isinstance(temperature, float) or not temperature > 0:
        raise ValueError(f"{file} is damaged: temperature must be positive, got {temperature!r}")
    share = settings.get("coarse_share")
    if not isinstance(share, int | float) or not share >= 0:
        raise ValueError(f"{file} is damaged: coarse_share must not be negative, got {share!r}")
    return settings


def _plain(settings: dict[str, Any]) -> dict[str, Any]:
    """As JSON gives them back."""
    return json.loads(json.dumps(settings))


def _versions() -> dict[str, str]:
    return {"genrep_fast": __version__, "torch": str(torch.__version__)}


def _check_empty(path: Path) -> None:
    """Refuse a folder with files of others."""
    others = sorted(entry.name for entry in path.iterdir() if not entry.name.startswith("."))
    if others:
        raise FileExistsError(
            f"output: {path} holds {others[0]!r} and no {SETTINGS}; "
            "choose an empty folder, or that of a classification to go on with"
        )


def _check_same(path: Path, former: dict[str, Any], now: dict[str, Any]) -> None:
    head = ("format", "parts")
    kept = {name: value for name, value in former.items() if name not in head}
    found = [
        phrase
        for phrase in differences(kept, now)
        if not set(phrase.split(" ", 1)[0].split(".")).intersection(_OF_NO_CONSEQUENCE)
    ]
    if found:
        more = f", and {len(found) - 3} more" if len(found) > 3 else ""
        raise ValueError(
            f"output: {path} holds images of other settings: {', '.join(found[:3])}{more}; "
            "choose another folder"
        )


def _finished(parts: list[Path], layout: Layout) -> Finished:
    """The images of all parts.

    Raises:
        ValueError: for a damaged part, and an image that is in two.
    """
    found: dict[str, list[np.ndarray]] = {name: [] for name in TOLD}
    owners = []
    for number, path in enumerate(parts):
        columns = layout.read(path, TOLD)
        for name in TOLD:
            found[name].append(np.asarray(columns[name]))
        owners.append(np.full(len(columns["image_id"]), number))
    if not parts:
        nothing = np.empty(0, dtype=np.int64)
        return Finished(nothing, nothing, nothing, nothing, np.empty(0, dtype="U16"))
    joined = {name: np.concatenate(columns) for name, columns in found.items()}
    order = np.argsort(joined["image_id"], kind="stable")
    ids = joined["image_id"][order]
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        owner = np.concatenate(owners)[order]
        first, second = (parts[owner[twice[0] + place]] for place in (0, 1))
        raise ValueError(
            f"output: the image with id {ids[twice[0]]} is in {first} and in {second.name}; "
            "remove one of them"
        )
    told = {name: joined[name][order] for name in TOLD}
    return Finished(ids, told["label"], told["prediction"], told["evaluations"], told["digest"])
