"""The micro-batches of a run: each follows from the seed and its index alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import LabelledImages, few_labels
from ..data.datasets import DecodedOnReading, Told, collate, undisturbed
from .config import TrainingConfig

# Images [B, C, H, W], labels int64 [B], and which of them the perception loss may use, bool [B].
Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]

# How much larger an image is than its random crop.
_MARGIN = 1 / 8


def seed_of(seed: int, index: int) -> int:
    """The seed of the micro-batch, or the epoch, `index` of a run with the seed `seed`."""
    return (seed * 1_000_003 + index) % 2**64


def seeded_loader(config: TrainingConfig, dataset: LabelledImages, *, start: int) -> DataLoader:
    """A loader of the micro-batches `start` … of a run with `config`, to its end.

    They are the same for any number of workers. `data.datasets.checked` raises the error of an
    image that cannot be read.

    Args:
        config: of the run.
        dataset: its training images.
        start: the first micro-batch, 0 for a new run.
    """
    labels = dataset.labels
    labelled = torch.ones(len(labels), dtype=torch.bool)
    if config.labelled_per_class is not None:
        labelled = few_labels(labels, config.labelled_per_class, config.seed)
    return DataLoader(
        Told(_TrainingImages(dataset, labelled, config)),
        batch_sampler=_SeededBatches(config, labels, start),
        collate_fn=collate,
        num_workers=config.dataloader_num_workers,
        # In place of torch's random state, which the steps seed.
        generator=torch.Generator(),
        worker_init_fn=undisturbed,
    )


class _Drawn(NamedTuple):
    """An item of a micro-batch.

    Attributes:
        image: its index.
        seed: of its augmentation.
    """

    image: int
    seed: tuple[int, ...]


class _TrainingImages(Dataset[tuple[torch.Tensor, int, bool]]):
    """Items (image, label, whether the perception loss may use the label), augmented."""

    def __init__(
        self, dataset: LabelledImages, labelled: torch.Tensor, config: TrainingConfig
    ) -> None:
        self.dataset = dataset
        self.labelled = labelled
        self.crops = config.random_crop
        self.flips = config.random_flip

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, item: _Drawn) -> tuple[torch.Tensor, int, bool]:
        image, label = self._augmented(item)
        return image, label, bool(self.labelled[item.image])

    def _augmented(self, item: _Drawn) -> tuple[torch.Tensor, int]:
        if not (self.crops or self.flips):
            return self.dataset[item.image]
        # All three in any case: an image is flipped in the same steps with crops and without.
        down, right, flip = np.random.default_rng(item.seed).random(3)
        if self.crops:
            image, label, (height, width) = _enlarged(self.dataset, item.image)
            top = int(down * (image.shape[1] - height + 1))
            left = int(right * (image.shape[2] - width + 1))
            image = image[:, top : top + height, left : left + width]
        else:
            image, label = self.dataset[item.image]
        if self.flips and flip < 0.5:
            image = image.flip(-1)
        return image, label


class _SeededBatches(Sampler[list[_Drawn]]):
    """Micro-batches `start` … of a run, to its end.

    Each epoch is an order that follows from the seed and the epoch alone.
    """

    def __init__(self, config: TrainingConfig, labels: torch.Tensor, start: int) -> None:
        self.labels = labels
        self.batch_size = min(config.batch_size, len(labels))
        self.balanced = config.class_balanced
        self.seed = config.seed
        self.start = start
        self.total = sum(config.stage_steps) * config.gradient_accumulation_steps

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[_Drawn]]:
        per_epoch = len(self.labels) // self.batch_size
        for number in range(self.start, self.total):
            epoch, place = divmod(number, per_epoch)
            if place == 0 or number == self.start:
                order = self._order(epoch)
            indices = order[place * self.batch_size : (place + 1) * self.batch_size].tolist()
            yield [_Drawn(index, (self.seed, number, row)) for row, index in enumerate(indices)]

    def _order(self, epoch: int) -> torch.Tensor:
        """Indices of the images of an epoch, int64 [N]."""
        generator = torch.Generator().manual_seed(seed_of(self.seed, epoch))
        if self.balanced:
            return _balanced(self.labels, generator)
        return torch.randperm(len(self.labels), generator=generator)


def _balanced(labels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """As many indices as there are labels, equally many of each class, in random order.

    Of a class with more images than its share a random choice is taken, and of one with fewer each
    image as often as another, give or take one.
    """
    classes = labels.unique()
    shares = torch.full((len(classes),), len(labels) // len(classes))
    # What is left over goes to classes at random.
    left_over = torch.randperm(len(classes), generator=generator)[: len(labels) % len(classes)]
    shares[left_over] += 1
    chosen = []
    for label, share in zip(classes, shares.tolist(), strict=True):
        members = (labels == label).nonzero().squeeze(1)
        for taken in range(0, share, len(members)):
            order = members[torch.randperm(len(members), generator=generator)]
            chosen.append(order[: share - taken])
    indices = torch.cat(chosen)
    return indices[torch.randperm(len(indices), generator=generator)]


def _enlarged(dataset: LabelledImages, index: int) -> tuple[torch.Tensor, int, tuple[int, int]]:
    """Image, larger than the dataset's by `_MARGIN`, and label of an item, and the usual size."""
    if isinstance(dataset, DecodedOnReading):
        height, width = dataset.size
        image = dataset.resized(index, (_with_margin(height), _with_margin(width)))
        return image, int(dataset.labels[index]), dataset.size
    image, label = dataset[index]
    _, height, width = image.shape
    larger = F.interpolate(
        image[None],
        size=(_with_margin(height), _with_margin(width)),
        mode="bilinear",
        antialias=True,
    )
    return larger[0], label, (height, width)


def _with_margin(side: int) -> int:
    return side + max(1, round(side * _MARGIN))
