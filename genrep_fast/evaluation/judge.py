"""An independent classifier of real images: the judge of generated ones."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data import LabelledImages, batches

NUM_FEATURES = 32
MAX_IMAGE_SIZE = 32
STEPS = 300
BATCH_SIZE = 128
LEARNING_RATE = 5e-3


class ImageClassifier(nn.Module):
    """A small convolutional network over images [B, C, H, W] of any size.

    Its last hidden layer has `NUM_FEATURES` units.
    """

    def __init__(self, image_shape: tuple[int, int, int], num_classes: int) -> None:
        super().__init__()
        channels, height, width = image_shape
        # Larger images are shrunk first, so that fitting takes no longer for them.
        size = min(height, width, MAX_IMAGE_SIZE)
        layers: list[nn.Module] = [nn.AdaptiveAvgPool2d(size)] if size == MAX_IMAGE_SIZE else []
        layers += _convolution(channels, 32)
        while size > 8:
            size = (size + 1) // 2
            layers += [nn.MaxPool2d(2, ceil_mode=True), *_convolution(32, 32)]
        layers += [*_convolution(32, 32), nn.MaxPool2d(2, ceil_mode=True), *_convolution(32, 64)]
        layers += [
            nn.AdaptiveAvgPool2d(4),
            nn.Flatten(),
            nn.Linear(64 * 16, NUM_FEATURES),
            nn.ReLU(),
        ]
        self.body = nn.Sequential(*layers)
        self.head = nn.Linear(NUM_FEATURES, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Class logits [B, K]."""
        return self.head(self.body(images))

    @torch.no_grad()
    def judge(self, images: Iterable[Tensor]) -> tuple[Tensor, Tensor]:
        """Features [N, NUM_FEATURES] and predicted labels [N] of batches [B, C, H, W].

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
