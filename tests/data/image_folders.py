"""Folders of tiny images that the tests of data share; no two images of a folder are equal."""

import numpy as np
from PIL import Image


def save_image(path, seed, size=(8, 8)):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, size[::-1], dtype=np.uint8)
    Image.fromarray(pixels).save(path)


def save_classes(root, counts, first=0):
    """`counts[name]` images of each class, all different."""
    for label, (name, count) in enumerate(counts.items()):
        for index in range(count):
            save_image(root / name / f"{index:03}.png", [first, label, index])
    return root


def contents(dataset):
    """The bytes of every image."""
    return [image.numpy().tobytes() for image, _ in dataset]
