"""What a run keeps of its data: names of the classes, and images whose part is an exception."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from ..files import read_json, write_atomically
from .splitting import PARTS

_FILE = "data.json"
_HASH = re.compile(r"[0-9a-f]{64}")
# Names in a message; the others are counted.
_NAMED = 5


@dataclass(frozen=True)
class DataRecord:
    """The file ``data.json`` of a run.

    Attributes:
        class_names: in the order of the labels.
        borrowed: part -> SHA-256 hashes (hexadecimal) of the images' files that are in it although
            the rule of the split gives them to another (`load_data`).
    """

    class_names: tuple[str, ...]
    borrowed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def save(self, run: Path) -> None:
        """Write it to the folder of a run, which exists.

        Raises:
            OSError: where it cannot be written.
        """
        write_atomically(run / _FILE, json.dumps(asdict(self), indent=1))

    @staticmethod
    def read(run: Path) -> DataRecord | None:
        """That of a run; None where it has none, as runs of versions before 0.2.

        Raises:
            ValueError: with the path in it, where it is damaged.
        """
        path = run / _FILE
        if not path.exists():
            return None
        content = read_json(path)
        if not _is_record(content):
            raise ValueError(f"{path} is damaged: it holds no class names and borrowed images")
        borrowed = {part: tuple(hashes) for part, hashes in content["borrowed"].items()}
        return DataRecord(tuple(content["class_names"]), borrowed)


def check_class_names(found: Sequence[str], expected: Sequence[str], argument: str) -> None:
    """Check that two lists of classes are the same, name by name.

    Args:
        found: the names that `argument` has, in the order of their labels.
        expected: those of the run or of the model.
        argument: what messages are about, for example "data".

    Raises:
        ValueError: with the names that are missing and those that are surplus; or that the order
            differs.
    """
    if list(found) == list(expected):
        return
    counts = f"{argument} must have the same {len(expected)} classes, got {len(found)}"
    differences = []
    for what, names, others in (("missing", expected, found), ("surplus", found, expected)):
        of_one = [name for name in names if name not in set(others)]
        if of_one:
            differences.append(f"{what}: {_listed(of_one)}")
    if differences:
        raise ValueError(f"{counts}; {'; '.join(differences)}")
    raise ValueError(f"{counts} in another order: {_listed(found)}, not {_listed(expected)}")


def _is_record(content: Any) -> bool:
    if not isinstance(content, dict) or content.keys() != {"class_names", "borrowed"}:
        return False
    names, borrowed = content["class_names"], content["borrowed"]
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return False
    if not isinstance(borrowed, dict) or not borrowed.keys() <= set(PARTS):
        return False
    if not all(isinstance(hashes, list) for hashes in borrowed.values()):
        return False
    every = [digest for hashes in borrowed.values() for digest in hashes]
    well_formed = all(isinstance(digest, str) and _HASH.fullmatch(digest) for digest in every)
    # An image that is in two parts is in none.
    return well_formed and len(set(every)) == len(every)


def _listed(names: Sequence[str]) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMED])
    return shown if len(names) <= _NAMED else f"{shown} and {len(names) - _NAMED} more"
