"""Map-style datasets of labelled images, and how they are read in batches."""

from __future__ import annotations

import os
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, default_collate

from ..endings import ignore_interrupts
from .images import file_to_tensor, image_to_tensor

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage


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


class DecodedOnReading(Dataset[tuple[Tensor, int]]):
    """What datasets have in common whose images are decoded when an item is read.

    Args:
        labels: int64 [N].
        size: (height, width) of an item.
        mode: "L" for one channel, "RGB" for three.
    """

    def __init__(self, labels: Tensor, size: tuple[int, int], mode: str) -> None:
        self.labels = labels
        self.size = size
        self.mode = mode

    @property
    def images(self) -> Tensor:
        """All images [N, C, H, W], decoded anew: as much memory as they take."""
        return as_tensors(self)[0]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        return self.resized(index, self.size), int(self.labels[index])

    def resized(self, index: int, size: tuple[int, int]) -> Tensor:
        """The image of an item at another size (height, width): float32 [C, height, width]."""
        raise NotImplementedError


class FolderImages(DecodedOnReading):
    """Image files; an item is decoded when it is read. It holds their paths and labels alone.

    Args:
        root: folder of all files.
        paths: of the files, relative to `root`.
        labels: int64 [N].
        size: (height, width) to which images are resized and centre-cropped.
        mode: "L" for one channel, "RGB" for three.

    Raises:
        ValueError: from an item, with the file's name, where it has gone or is damaged.
    """

    def __init__(
        self,
        root: str,
        paths: Sequence[str],
        labels: Tensor,
        size: tuple[int, int],
        mode: str,
    ) -> None:
        super().__init__(labels, size, mode)
        self.root = os.path.abspath(root)
        # One object for all: a list would be copied to each worker as soon as it is read.
        encoded = [os.fsencode(path) for path in paths]
        self._paths = b"".join(encoded)
        self._ends = np.cumsum([len(path) for path in encoded], dtype=np.int64)

    def path(self, index: int) -> str:
        """The path of an image file."""
        index = range(len(self))[index]
        start = int(self._ends[index - 1]) if index else 0
        return os.path.join(self.root, os.fsdecode(self._paths[start : int(self._ends[index])]))

    def resized(self, index: int, size: tuple[int, int]) -> Tensor:
        return file_to_tensor(self.path(index), size, self.mode)


class SourceImages(DecodedOnReading):
    """Items of another map-style dataset of (PIL image, label), decoded when they are read.

    Args:
        source: the other dataset.
        indices: of its items.
        labels: int64 [N], one an index.
        size: (height, width) to which images are resized and centre-cropped.
        mode: "L" for one channel, "RGB" for three.
    """

    def __init__(
        self,
        source: Sequence[tuple[PILImage, int]],
        indices: Tensor,
        labels: Tensor,
        size: tuple[int, int],
        mode: str,
    ) -> None:
        super().__init__(labels, size, mode)
        self.source = source
        self.indices = indices

    def resized(self, index: int, size: tuple[int, int]) -> Tensor:
        image, _ = self.source[int(self.indices[index])]
        return image_to_tensor(image, size, self.mode)


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
        borrowed: part -> hashes of the images that are in it although the split by content gives
            them to another; a `DataRecord` keeps them.
    """

    train: LabelledImages
    calibration: LabelledImages
    test: LabelledImages
    class_names: tuple[str, ...]
    image_shape: tuple[int, int, int]
    name: str = ""
    borrowed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    @property
    def num_classes(self) -> int:
        return len(self.class_names)


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

    Torch's random state is left as it is.

    Args:
        dataset: is read one batch after the other.
        batch_size: B, of all batches but the last.
        indices: of the items, in their order; None for all.
        num_workers: processes that read ahead; 0 reads in this one. They end with the iterator.

    Raises:
        ValueError, OSError: of an item that cannot be read, with its message alone, from whatever
            process.
    """
    order = range(len(dataset)) if indices is None else [int(index) for index in indices]
    loader = DataLoader(
        Told(dataset),
        batch_size,
        sampler=order,
        num_workers=num_workers,
        collate_fn=collate,
        generator=torch.Generator(),
        worker_init_fn=undisturbed,
    )
    yield from checked(loader)


class Failure(NamedTuple):
    """In the place of an item that cannot be read: the error, which PyTorch would wrap in the
    traceback of a worker.
    """

    error: Exception


class Told(Dataset[Any]):
    """A dataset with a `Failure` in the place of an item that raises ValueError or OSError."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: Any) -> Any:
        try:
            return self.dataset[index]
        except (ValueError, OSError) as error:
            return Failure(error)


def undisturbed(worker: int) -> None:
    """Let signals to all processes of a terminal end the workers' parent alone, which ends them."""
    ignore_interrupts()


def collate(items: list[Any]) -> Any:
    """`torch.utils.data.default_collate`, or the first `Failure` among the items."""
    for item in items:
        if isinstance(item, Failure):
            return item
    return default_collate(items)


def checked(loader: Iterable[Any]) -> Generator[Any, None, None]:
    """The batches of a loader of `Told` items that `collate` put together.

    The workers of the loader end when this is closed.

    Raises:
        ValueError, OSError: that of a `Failure`.
    """
    for batch in loader:
        if isinstance(batch, Failure):
            raise batch.error
        yield batch
