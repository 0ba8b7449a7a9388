"""The micro-batches of a run: each follows from the seed and its index alone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TypeAlias

import torch
from torch.utils.data import DataLoader, Dataset, Sampler

from ..data import LabelledImages, few_labels
from .config import TrainingConfig

# Images [B, C, H, W], labels int64 [B], and which of them the perception loss may use, bool [B].
Batch: TypeAlias = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


def seeded_loader(config: TrainingConfig, dataset: LabelledImages, *, start: int) -> DataLoader:
    """A loader of the micro-batches `start` … of a run with `config`, to its end.

    Args:
        config: of the run.
        dataset: its training images.
        start: the first micro-batch, 0 for a new run.
    """
    labels = dataset.labels
    labelled = torch.ones(len(labels), dtype=torch.bool)
    if config.labelled_per_class is not None:
        labelled = few_labels(labels, config.labelled_per_class, config.seed)
    total = sum(config.stage_steps) * config.gradient_accumulation_steps
    sampler = _SeededBatches(len(labels), config.batch_size, config.seed, start, total)
    return DataLoader(_PartlyLabelled(dataset, labelled), batch_sampler=sampler)


class _PartlyLabelled(Dataset[tuple[torch.Tensor, int, bool]]):
    """Items (image, label, whether the perception loss may use the label)."""

    def __init__(self, dataset: LabelledImages, labelled: torch.Tensor) -> None:
        self.dataset = dataset
        self.labelled: list[bool] = labelled.tolist()

    def __len__(self) -> int:
        return len(self.labelled)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int, bool]:
        image, label = self.dataset[index]
        return image, label, self.labelled[index]


class _SeededBatches(Sampler[list[int]]):
    """Micro-batches `start` … `total` − 1 of a run.

    Each epoch is a permutation that follows from the seed and the epoch alone.
    """

    def __init__(self, length: int, batch_size: int, seed: int, start: int, total: int) -> None:
        self.length = length
        self.batch_size = min(batch_size, length)
        self.seed = seed
        self.start = start
        self.total = total

    def __len__(self) -> int:
        return self.total - self.start

    def __iter__(self) -> Iterator[list[int]]:
        per_epoch = self.length // self.batch_size
        for index in range(self.start, self.total):
            epoch, place = divmod(index, per_epoch)
            if place == 0 or index == self.start:
                generator = torch.Generator().manual_seed(self.seed * 1_000_003 + epoch)
                order = torch.randperm(self.length, generator=generator).tolist()
            yield order[place * self.batch_size : (place + 1) * self.batch_size]
