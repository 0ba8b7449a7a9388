"""The walk through a folder of images: which files count, for which class and which part.

- A class is a sub-folder of the root; the images are all files below it.
- A name that begins with a dot is hidden, at any depth: what bears it is left out.
- Links are followed, but none to a folder that the walk is in; a file that is reached twice within
  a class counts once.
- A root with ``train/`` and ``val/`` or ``test/`` (or both) holds the splits, each with the same
  class folders.
"""

from __future__ import annotations

import errno
import os
import re
import stat
import unicodedata
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from .images import image_extensions
from .record import check_class_names
from .splitting import PARTS

# Folders of splits, in lower case.
_SPLIT_NAMES = {
    "train": ("train", "training"),
    "validation": ("val", "valid", "validation"),
    "test": ("test", "testing"),
}
# What the images of each folder are for, by the folders that are there.
_PARTS_OF = {
    ("train", "validation", "test"): (("train",), ("calibration",), ("test",)),
    ("train", "test"): (("train", "calibration"), ("test",)),
    ("train", "validation"): (("train", "calibration"), ("test",)),
}
# Skipped files in a message; the others are counted.
_NAMED = 5


class Source(NamedTuple):
    """A folder of class folders.

    Attributes:
        folder: of which the classes are sub-folders.
        parts: what its images are for.
        classes: name -> path, in the order of the labels.
    """

    folder: str
    parts: tuple[str, ...]
    classes: dict[str, str]


@dataclass
class Skipped:
    """Files below `root` that are no images, for one warning about all of them."""

    root: str
    names: list[str] = field(default_factory=list)

    def add(self, path: str) -> None:
        self.names.append(os.path.relpath(path, self.root))

    def warn(self) -> None:
        if not self.names:
            return
        shown = ", ".join(repr(name) for name in self.names[:_NAMED])
        more = len(self.names) - _NAMED
        if more > 0:
            shown += f" and {more} more"
        verb = "file is no image" if len(self.names) == 1 else "files are no images"
        count = f"{len(self.names)} {verb} of a class and left out"
        warnings.warn(f"data folder {self.root}: {count}: {shown}", stacklevel=2)


def find_sources(root: Path, skipped: Skipped) -> list[Source]:
    """The folders of class folders in `root`: `root` itself, or those of its splits.

    Raises:
        FileNotFoundError: where `root` is no folder.
        ValueError: for fewer than two classes, splits of different classes, two folders of one
            class, and names that are no text.
    """
    require_folder(root)
    splits = _split_folders(str(root))
    if not splits:
        return [Source(str(root), PARTS, _class_folders(str(root), str(root), skipped))]
    for entry in _entries(str(root)):
        if entry.path not in splits.values():
            skipped.add(entry.path)
    names = tuple(splits)
    sources = []
    for folder, parts in zip(splits.values(), _PARTS_OF[names], strict=True):
        sources.append(Source(folder, parts, _class_folders(folder, str(root), skipped)))
        check_class_names(list(sources[-1].classes), list(sources[0].classes), f"data: {folder}")
    return sources


def image_files(class_folder: str, root: str, skipped: Skipped) -> list[str]:
    """The paths of the images below a class folder of the data folder `root`, in no order."""
    extensions = image_extensions()
    seen = _above(root) | _above(os.path.dirname(os.path.realpath(class_folder)))
    pending = [class_folder]
    files = []
    while pending:
        folder = pending.pop()
        real = os.path.realpath(folder)
        if real in seen:
            continue
        seen.add(real)
        for entry in _entries(folder):
            mode = _mode(entry)
            if stat.S_ISDIR(mode):
                pending.append(entry.path)
                continue
            target = os.path.join(real, entry.name)
            if entry.is_symlink():
                target = os.path.realpath(entry.path)
            if target in seen:
                continue
            seen.add(target)
            extension = os.path.splitext(entry.name)[1].lower()
            if stat.S_ISREG(mode) and extension in extensions:
                files.append(entry.path)
            else:
                skipped.add(entry.path)
    return files


def require_folder(root: Path) -> None:
    """Raise FileNotFoundError where `root` is no folder."""
    if not root.is_dir():
        raise FileNotFoundError(f"data folder {root} does not exist or is not a folder")


def require_classes(root: str, count: int) -> None:
    """Raise ValueError for fewer than two classes."""
    if count < 2:
        raise ValueError(
            f"data folder {root} must hold a sub-folder of images for each of at least two "
            f"classes, got {count}"
        )


def require_images(class_folder: str, count: int, parts: Sequence[str], kind: str = "") -> None:
    """Raise ValueError for fewer images than parts."""
    wanted = {1: "one image", 2: f"two {kind}images", 3: f"three {kind}images"}[len(parts)]
    each = "" if len(parts) == 1 else f", one a split ({', '.join(parts)})"
    if count < len(parts):
        raise ValueError(
            f"class folder {class_folder} must hold at least {wanted}{each}, got {count}"
        )


def _split_folders(root: str) -> dict[str, str]:
    """Split -> path, where the root has such folders; none where its sub-folders are classes."""
    found: dict[str, str] = {}
    for entry in _entries(root):
        for split, names in _SPLIT_NAMES.items():
            if entry.name.lower() in names and entry.is_dir():
                if split in found:
                    both = f"{os.path.basename(found[split])!r} and {entry.name!r}"
                    raise ValueError(f"data folder {root} must hold one {split} split, got {both}")
                found[split] = entry.path
    if "train" not in found or len(found) == 1:
        return {}
    # A class may be called "train", but then it holds images.
    if not any(entry.is_dir() for entry in _entries(found["train"])):
        return {}
    return {split: found[split] for split in _SPLIT_NAMES if split in found}


def _class_folders(folder: str, root: str, skipped: Skipped) -> dict[str, str]:
    above = _above(root) | _above(folder)
    classes: dict[str, str] = {}
    real: dict[str, str] = {}
    for entry in _entries(folder):
        target = os.path.realpath(entry.path)
        if not stat.S_ISDIR(_mode(entry)):
            skipped.add(entry.path)
            continue
        if target in above:
            continue
        name = _class_name(entry)
        if name in classes or target in real:
            other = os.path.basename(real.get(target) or classes[name])
            same = f"{other!r} and {entry.name!r}, which are the same"
            raise ValueError(f"data folder {folder} must hold one folder a class, got {same}")
        classes[name] = real[target] = entry.path
    require_classes(folder, len(classes))
    if all(re.fullmatch(r"[+-]?[0-9]+", name) for name in classes):
        return {name: classes[name] for name in sorted(classes, key=lambda name: (int(name), name))}
    return {name: classes[name] for name in sorted(classes)}


def _class_name(entry: os.DirEntry[str]) -> str:
    """The name of a class, in Unicode's composed form, as not every filesystem keeps it."""
    try:
        entry.name.encode("utf-8")
    except UnicodeEncodeError as error:
        shown = ascii(os.fsencode(entry.path))
        raise ValueError(f"class folder {shown} must have a name in UTF-8") from error
    return unicodedata.normalize("NFC", entry.name)


def _entries(folder: str) -> Iterator[os.DirEntry[str]]:
    """What is in a folder and not hidden, by name."""
    with os.scandir(folder) as entries:
        found = [entry for entry in entries if not entry.name.startswith(".")]
    yield from sorted(found, key=lambda entry: entry.name)


def _mode(entry: os.DirEntry[str]) -> int:
    """The mode of what is there, links followed; 0 for a link that leads nowhere."""
    try:
        return entry.stat().st_mode
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ELOOP, errno.ENOTDIR) and entry.is_symlink():
            return 0
        raise


def _above(folder: str) -> set[str]:
    """The real paths of a folder and of all folders that it is in."""
    real = Path(os.path.realpath(folder))
    return {str(path) for path in (real, *real.parents)}
