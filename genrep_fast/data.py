"""Labelled images by name, in three splits: training, calibration, test.

Images are float32 [C, H, W] in [-1, 1], labels are Python ints; a data set is read, checked and
kept in memory when it is loaded.
"""

from __future__ import annotations

import dataclasses
import inspect
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol, cast

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

DEFAULT_IMAGE_SIZE = 32
DIGITS_CALIBRATION = 200
DIGITS_TEST = 500
CALIBRATION_FRACTION = 0.1
TEST_FRACTION = 0.2

_GREY_MODES = ("1", "L", "LA", "I;16", "I;16B")


class LabelledImages(Protocol):
    """A map-style dataset: an item is an image, float32 [C, H, W] in [-1, 1], and its label.

    All labels, int64 [N], are known without reading an image.
    """

    @property
    def labels(self) -> Tensor: ...

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> tuple[Tensor, int]: ...


class ImageDataset(Dataset[tuple[Tensor, int]]):
    """Images [N, C, H, W] float32 in [-1, 1] with labels [N] int64.

    An item is an image [C, H, W] and its label, a Python int.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        if len(images) == 0:
            raise ValueError("images must hold at least one image, got none")
        if len(images) != len(labels):
            raise ValueError(
                f"labels must hold one label an image, got {len(labels)} for {len(images)} images"
            )
        self.images = images
        self.labels = labels

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.images[index], int(self.labels[index])


@dataclass(frozen=True)
class DataSplits:
    """Three disjoint splits of one data set.

    Items are (image float32 [C, H, W] in [-1, 1], label int).

    Attributes:
        train: what networks are fitted on.
        calibration: for temperatures and choices, never for training.
        test: for final numbers alone.
        class_names: one name a class, in the order of the labels.
        image_shape: (C, H, W).
        name: as `load_data` was told it.
    """

    train: LabelledImages
    calibration: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    name: str = ""

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


def load_data(name: str, *, image_size: int | None = None, seed: int = 0) -> DataSplits:
    """Load a data set by name.

    Args:
        name: ``digits``, the 1797 images 8x8 that scikit-learn ships (1097 training, 200
            calibration, 500 test; stratified and fixed); ``folder:PATH``, a folder with a
            sub-folder of images for each class (70/10/20 per cent of every class; grey where all
            are, else RGB); ``torchvision:NAME``, a class of `torchvision.datasets`, downloaded
            where missing (10 per cent of its training split become calibration).
        image_size: height and width to which images are resized and centre-cropped; None: 8 for
            digits, 32 for the others.
        seed: of the random split of ``folder:`` and ``torchvision:`` data. Not the training seed:
            another split trains on test images.

    Raises:
        ValueError: for an unknown name, an empty folder or class, or an unreadable image, which is
            named.
        FileNotFoundError: where the folder does not exist.
        ImportError: where torchvision is asked for and not installed.
    """
    if image_size is not None and image_size < 1:
        raise ValueError(f"image_size must be positive, got {image_size}")
    kind, _, argument = name.partition(":")
    if kind == "digits" and not argument:
        splits = _load_digits(image_size)
    elif kind == "folder" and argument:
        splits = _load_folder(Path(argument).expanduser(), image_size or DEFAULT_IMAGE_SIZE, seed)
    elif kind == "torchvision" and argument:
        splits = _load_torchvision(argument, image_size or DEFAULT_IMAGE_SIZE, seed)
    else:
        raise ValueError(
            f"data must be 'digits', 'folder:PATH' or 'torchvision:NAME', got {name!r}"
        )
    return dataclasses.replace(splits, name=name)


def as_tensors(dataset: LabelledImages) -> tuple[Tensor, Tensor]:
    """All of a map-style dataset of (image, label): images [N, C, H, W] float32, labels [N] int64.

    Raises ValueError where it is empty.
    """
    if len(dataset) == 0:
        raise ValueError("dataset must hold at least one image, got none")
    images, labels = zip(*(dataset[index] for index in range(len(dataset))), strict=True)
    return torch.stack(images), torch.tensor(labels)


def batches(
    dataset: LabelledImages,
    batch_size: int,
    indices: Sequence[int] | Tensor | None = None,
    *,
    num_workers: int = 0,
) -> Iterator[tuple[Tensor, Tensor]]:
    """Batches of a dataset, in order: images [B, C, H, W] float32 and labels [B] int64.

    Args:
        dataset: is read one batch after the other.
        batch_size: B, of all batches but the last.
        indices: of the items, in their order; None for all.
        num_workers: processes that read ahead; 0 reads in this one.
    """
    order = range(len(dataset)) if indices is None else [int(index) for index in indices]
    loader = DataLoader(cast(Dataset, dataset), batch_size, sampler=order, num_workers=num_workers)
    yield from loader


def few_labels(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Choose `per_class` images of every class at random: a bool mask shaped as `labels`, [N].

    It chooses all of a class that has no more.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be positive, got {per_class}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for members in _members_of_classes(labels, generator):
        chosen[members[:per_class]] = True
    return chosen


def _load_digits(image_size: int | None) -> DataSplits:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    if image_size is not None:
        size = (image_size, image_size)
        resize = torch.nn.functional.interpolate
        images = resize(images, size=size, mode="bilinear", antialias=True)
    labels = torch.from_numpy(digits.target).long()
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=DIGITS_TEST, stratify=labels, random_state=0
    )
    train, calibration = train_test_split(
        rest, test_size=DIGITS_CALIBRATION, stratify=labels[rest], random_state=0
    )
    whole = ImageDataset(images, labels)
    class_names = [str(digit) for digit in digits.target_names]
    return _splits(
        _subset(whole, train), _subset(whole, calibration), _subset(whole, test), class_names
    )


def _load_folder(root: Path, image_size: int, seed: int) -> DataSplits:
    from PIL import Image

    if not root.is_dir():
        raise FileNotFoundError(f"data folder {root} does not exist or is not a folder")
    folders = sorted(path for path in root.iterdir() if path.is_dir() and not _is_hidden(path))
    if len(folders) < 2:
        raise ValueError(
            f"data folder {root} must hold a sub-folder of images for each of at least two "
            f"classes, got {len(folders)}"
        )
    extensions = Image.registered_extensions()
    files: list[Path] = []
    labels: list[int] = []
    for label, folder in enumerate(folders):
        candidates = [path for path in folder.rglob("*") if not _is_hidden(path)]
        members = sorted(path for path in candidates if path.suffix.lower() in extensions)
        if len(members) < 3:
            raise ValueError(
                f"class folder {folder} must hold at least three images, one a split, "
                f"got {len(members)}"
            )
        files += members
        labels += [label] * len(members)
    # The mode is in the header; pixels are decoded only once the mode of all is known.
    mode = _common_mode(_open_image(file).mode for file in files)
    images = torch.stack([_file_to_tensor(file, image_size, mode) for file in files])
    whole = ImageDataset(images, torch.tensor(labels))
    fractions = (CALIBRATION_FRACTION, TEST_FRACTION)
    train, calibration, test = _split_by_class(whole.labels, fractions, seed)
    class_names = [folder.name for folder in folders]
    return _splits(
        _subset(whole, train), _subset(whole, calibration), _subset(whole, test), class_names
    )


def _is_hidden(path: Path) -> bool:
    return path.name.startswith(".")


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
        sources = [factory(root, train=train, download=True) for train in (True, False)]
    elif "split" in parameters:
        sources = [factory(root, split=split, download=True) for split in ("train", "test")]
    else:
        raise ValueError(
            f"torchvision.datasets.{name} must take a train or a split argument, "
            "so that its test images are known"
        )
    mode = _common_mode([sources[0][0][0].mode])
    training, test = (_pairs_to_dataset(source, image_size, mode) for source in sources)
    train, calibration = _split_by_class(training.labels, (CALIBRATION_FRACTION,), seed)
    class_names = getattr(sources[0], "classes", None) or range(int(training.labels.max()) + 1)
    return _splits(
        _subset(training, train),
        _subset(training, calibration),
        test,
        [str(class_name) for class_name in class_names],
    )


def _splits(
    train: ImageDataset, calibration: ImageDataset, test: ImageDataset, class_names: Sequence[str]
) -> DataSplits:
    channels, height, width = train.images.shape[1:]
    return DataSplits(train, calibration, test, tuple(class_names), (channels, height, width))


def _subset(dataset: ImageDataset, indices: Tensor | np.ndarray) -> ImageDataset:
    return ImageDataset(dataset.images[indices], dataset.labels[indices])


def _members_of_classes(labels: Tensor, generator: torch.Generator) -> Iterable[Tensor]:
    """The indices of every class that occurs, each in random order."""
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        yield members[torch.randperm(len(members), generator=generator)]


def _split_by_class(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Indices of the rest, then of one part for each fraction.

    A part takes at least one image of every class.
    """
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for members in _members_of_classes(labels, torch.Generator().manual_seed(seed)):
        sizes = [max(1, round(fraction * len(members))) for fraction in fractions]
        pieces = members.split([len(members) - sum(sizes), *sizes])
        for part, indices in zip(parts, pieces, strict=True):
            part.append(indices)
    return [torch.cat(part).sort().values for part in parts]


def _common_mode(modes: Iterable[str]) -> str:
    return "L" if all(mode in _GREY_MODES for mode in modes) else "RGB"


def _open_image(file: Path) -> PILImage:
    from PIL import Image

    try:
        return Image.open(file)
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:
        raise ValueError(f"cannot read image {file}: {error}") from error


def _file_to_tensor(file: Path, image_size: int, mode: str) -> Tensor:
    with _open_image(file) as image:
        try:
            return image_to_tensor(image, (image_size, image_size), mode)
        except (OSError, SyntaxError, ValueError) as error:
            raise ValueError(f"cannot read image {file}: {error}") from error


def image_to_tensor(image: PILImage, size: tuple[int, int], mode: str) -> Tensor:
    """A PIL image, turned upright, resized and centre-cropped, as a tensor.

    The tensor is float32 [C, height, width] in [-1, 1].

    Args:
        image: PIL image of any mode with 8 or 16 bits a channel.
        size: (height, width).
        mode: "L" for C = 1, "RGB" for C = 3.

    Raises:
        ValueError: for an image whose values have no fixed range.
    """
    from PIL import Image, ImageOps

    if image.mode in ("I", "F"):
        raise ValueError(
            f"mode {image.mode!r} has no fixed range of values; save it with 8 or 16 bits a channel"
        )
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        # convert("L") would clip at 255 instead of scaling.
        upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
    height, width = size
    pixels = np.asarray(ImageOps.fit(upright.convert(mode), (width, height)), dtype=np.float32)
    channels_last = torch.from_numpy(pixels.reshape(height, width, -1))  # [height, width, C]
    return channels_last.permute(2, 0, 1).contiguous() / 127.5 - 1


def _pairs_to_dataset(
    pairs: Sequence[tuple[PILImage, int]], image_size: int, mode: str
) -> ImageDataset:
    images, labels = zip(*(pairs[index] for index in range(len(pairs))), strict=True)
    size = (image_size, image_size)
    tensors = [image_to_tensor(image, size, mode) for image in images]
    return ImageDataset(torch.stack(tensors), torch.tensor(labels))
