"""An independent classifier of real images: the judge of generated ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import LabelledImages, batches

NUM_FEATURES = 32
# 32 tell a thousand classes apart in 300 steps no better than chance would, 64 do.
MANY_CLASSES = 100
NUM_FEATURES_OF_MANY = 64
MAX_IMAGE_SIZE = 32
# Of the longer side to the shorter one, as far as features tell it.
MAX_ASPECT = 4
STEPS = 300
BATCH_SIZE = 128
LEARNING_RATE = 5e-3


class ImageClassifier(nn.Module):
    """A small convolutional network over images [B, C, H, W] of any size.

    Its last hidden layer has `NUM_FEATURES` units; from `MANY_CLASSES` on, `NUM_FEATURES_OF_MANY`.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        self.num_features = NUM_FEATURES
        if num_classes >= MANY_CLASSES:
            self.num_features = NUM_FEATURES_OF_MANY
        size = min(height, width, MAX_IMAGE_SIZE)
        # Features of a longer side are as fine as those of the shorter one.
        down, across = (
            min(MAX_ASPECT, round(side / min(height, width))) for side in (height, width)
        )
        # Larger images are shrunk first, so that fitting takes no longer for them.
        layers: list[nn.Module] = []
        if size == MAX_IMAGE_SIZE:
            layers = [nn.AdaptiveAvgPool2d((size * down, size * across))]
        layers += _convolution(channels, 32)
        while size > 8:
            size = (size + 1) // 2
            layers += [nn.MaxPool2d(2, ceil_mode=True), *_convolution(32, 32)]
        layers += [*_convolution(32, 32), nn.MaxPool2d(2, ceil_mode=True), *_convolution(32, 64)]
        layers += [
            nn.AdaptiveAvgPool2d((4 * down, 4 * across)),
            nn.Flatten(),
            nn.Linear(64 * 16 * down * across, self.num_features),
            nn.ReLU(),
        ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(self.num_features, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [B, K]."""
        return self.head(self.body(images))

    @torch.no_grad()
    def judge(self, images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Features [N, num_features] and predicted labels [N] of batches [B, C, H, W].

        Leaves the classifier in eval mode.
        """
        self.eval()
        features = torch.cat([self.body(batch) for batch in images])
        return features, self.head(features).argmax(1)


def fit_classifier(
    train: LabelledImages, num_classes: int, *, seed: int, num_workers: int = 0
) -> ImageClassifier:
    """Fit an `ImageClassifier` to real training images alone.

    Args:
        train: images [C, H, W] in [-1, 1] with their labels.
        num_classes: K.
        seed: of the initialisation and of the batches; the global random state is left as it was.
        num_workers: processes that read ahead; 0 reads in this one.
    """
    channels, height, width = train[0][0].shape
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        classifier = ImageClassifier((channels, height, width), num_classes)
        optimizer = torch.optim.AdamW(classifier.parameters(), lr=LEARNING_RATE)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, LEARNING_RATE, total_steps=STEPS)
        drawn = torch.randint(len(train), (STEPS, BATCH_SIZE)).flatten()
        for images, labels in batches(train, BATCH_SIZE, drawn, num_workers=num_workers):
            loss = F.cross_entropy(classifier(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
    return classifier.eval().requires_grad_(False)


def _convolution(channels: int, width: int) -> list[nn.Module]:
    return [nn.Conv2d(channels, width, 3, padding=1), nn.BatchNorm2d(width), nn.ReLU()]
