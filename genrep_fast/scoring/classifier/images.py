"""Images as a diffusion classifier gets them: a batch or a stream of batches, of several kinds."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ...checks import DTYPES
from .batches import Batch, integers, of_mapping

# Beyond the largest latent, below the range of 8-bit images.
_LARGEST_LATENT = 64.0


class Images(NamedTuple):
    """A checked batch.

    Attributes:
        images: [B, C, H, W] floating point.
        ids: of their noise, [B].
        labels: int64 [B], or None.
        names: [B], or None.
    """

    images: Tensor
    ids: list[int]
    labels: Tensor | None
    names: list[str] | None = None


class ImageStream:
    """Iterates over `Images`, each checked before it is given out.

    Args:
        images: a batch, or an iterable of batches. A batch is a tensor [B, C, H, W] in −1…1 (or
            uint8 in 0…255), an array of uint8 [B, H, W, C], a PIL image, a list of PIL images,
            arrays or tensors of one image, a pair (batch, labels), or a dictionary that holds
            pixel_values, images or image, and maybe labels, image_ids and names.
        image_ids: distinct integers in [0, 2³²), one an image of the whole stream, or None for
            those of the batches, else 0, 1, 2, …
        labels: integers, one an image of the whole stream, or None for those of the batches.
        shape: (C, H, W) that is wanted, or None where the first image tells it.
        pixels: whether values beyond −1…1 are refused, as of images for a VAE.
        num_classes: labels lie below it.

    Attributes:
        total: images in all, or None for a stream that does not say.
        exhausted: whether all were read.
    """

    def __init__(
        self,
        images: Any,
        *,
        image_ids: Sequence[int] | Tensor | None,
        labels: Sequence[int] | Tensor | None,
        shape: tuple[int, ...] | None,
        pixels: bool,
        num_classes: int,
    ) -> None:
        is_one = _is_batch(images) or _unpacked(images).images is not images
        self._batches: Iterable[Any] = [images] if is_one else images
        if not isinstance(self._batches, Iterable):
            wanted = "a tensor, PIL images, uint8 arrays, or an iterable of batches"
            raise TypeError(f"images must be {wanted}, got {type(images).__name__}")
        self.total = _length(images)
        self.exhausted = False
        self._ids = None if image_ids is None else integers("image_ids", image_ids)
        self._labels = None if labels is None else integers("labels", labels)
        # Those that batches brought.
        self._seen_ids: set[int] = set()
        self._shape = shape
        self._pixels = pixels
        self._num_classes = num_classes
        self._check_given()

    def __iter__(self) -> Iterator[Images]:
        seen = 0
        for number, given in enumerate(self._batches):
            try:
                batch = _unpacked(given)
                images = self._checked(as_images(batch.images, self._shape))
                labels = batch.labels
                if self._labels is not None:
                    labels = self._part("labels", seen, images)
                self._check_labels(labels, len(images))
                ids = self._ids_of(batch, seen, images)
                if batch.names is not None and len(batch.names) != len(images):
                    raise ValueError(
                        f"names must be one an image, got {len(batch.names)} for {len(images)}"
                    )
            except (TypeError, ValueError) as error:
                if number == 0:
                    raise
                raise type(error)(f"{error} (batch {number} of the stream)") from error
            seen += len(images)
            yield Images(images, ids, labels, batch.names)
        self.exhausted = True
        if seen == 0:
            raise ValueError("images must hold at least one image, got none")
        for name, values in (("image_ids", self._ids), ("labels", self._labels)):
            if values is not None and len(values) != seen:
                raise ValueError(f"{name} must be one an image, got {len(values)} for {seen}")

    def _check_given(self) -> None:
        """What can be checked before the first image is read."""
        for name, values in (("image_ids", self._ids), ("labels", self._labels)):
            if values is not None and self.total not in (None, len(values)):
                raise ValueError(
                    f"{name} must be one an image, got {len(values)} for {self.total} images"
                )
        if self._ids is not None:
            _check_ids(self._ids)

    def _ids_of(self, batch: Batch, seen: int, images: Tensor) -> list[int]:
        """Of the noise of a batch after `seen` images."""
        if self._ids is not None:
            return self._part("image_ids", seen, images).tolist()
        # All batches bring ids, or none does.
        if (batch.ids is None) != (not self._seen_ids) and seen:
            raise ValueError("image_ids must come with every batch or with none")
        if batch.ids is None:
            return list(range(seen, seen + len(images)))
        if len(batch.ids) != len(images):
            raise ValueError(
                f"image_ids must be one an image, got {len(batch.ids)} for {len(images)} images"
            )
        _check_ids(batch.ids)
        ids = batch.ids.tolist()
        repeated = sorted(self._seen_ids.intersection(ids))
        if repeated:
            raise ValueError(_repeated_ids(repeated))
        self._seen_ids.update(ids)
        return ids

    def _part(self, name: str, start: int, images: Tensor) -> Tensor:
        values = self._ids if name == "image_ids" else self._labels
        assert values is not None
        part = values[start : start + len(images)]
        if len(part) < len(images):
            raise ValueError(f"{name} must be one an image, got {len(values)} for more images")
        return part

    def _checked(self, images: Tensor) -> Tensor:
        if images.ndim != 4 or (self._shape is not None and images.shape[1:] != self._shape):
            sizes = ("C", "H", "W") if self._shape is None else self._shape
            wanted = ", ".join(map(str, sizes))
            raise ValueError(f"images must be [B, {wanted}], got {list(images.shape)}")
        # All images of a call have one size.
        self._shape = tuple(images.shape[1:])
        finite = images.flatten(1).isfinite().all(1)
        if not finite.all():
            bad = (~finite).nonzero().flatten()[:5].tolist()
            raise ValueError(f"images must be finite, got NaN or infinity in images {bad}")
        largest = 1.01 if self._pixels else _LARGEST_LATENT
        if len(images) and images.abs().max() > largest:
            raise ValueError(
                "images must lie in -1...1 (or be uint8 in 0...255), "
                f"got values from {images.min().item():.4g} to {images.max().item():.4g}"
            )
        return images

    def _check_labels(self, labels: Tensor | None, count: int) -> None:
        if labels is None:
            return
        if len(labels) != count:
            raise ValueError(f"labels must be one an image, got {len(labels)} for {count} images")
        if ((labels < 0) | (labels >= self._num_classes)).any():
            raise ValueError(
                f"labels must lie in [0, {self._num_classes}), "
                f"got {labels.min().item()} to {labels.max().item()}"
            )


def as_images(batch: Any, shape: tuple[int, ...] | None) -> Tensor:
    """A floating-point tensor of a batch of any kind; 0…255 becomes −1…1.

    Raises:
        TypeError, ValueError: for another kind, and images of several sizes.
    """
    if isinstance(batch, Tensor):
        return _as_floating(batch)
    if isinstance(batch, np.ndarray):
        images = torch.from_numpy(np.ascontiguousarray(batch))
        if batch.dtype != np.uint8:
            return _as_floating(images)
        if batch.ndim not in (2, 3, 4):
            raise ValueError(
                f"images must be uint8 arrays [B, H, W, C] or [H, W], got {list(batch.shape)}"
            )
        # Grey images [B, H, W] have no axis of channels; one image has no axis of images.
        if batch.ndim == 3 and batch.shape[-1] in (1, 3, 4):
            images = images[None]
        elif batch.ndim < 4:
            images = images.reshape(-1, *batch.shape[-2:], 1)
        return _as_floating(images.permute(0, 3, 1, 2))
    if _is_pil(batch):
        batch = [batch]
    if not isinstance(batch, list | tuple) or len(batch) == 0:
        wanted = "tensors, PIL images or uint8 arrays"
        found = "no image" if isinstance(batch, list | tuple) else type(batch).__name__
        raise TypeError(f"images must be {wanted}, got {found}")
    single = [_single(image, shape) for image in batch]
    sizes = {tuple(image.shape) for image in single}
    if len(sizes) > 1:
        raise ValueError(f"images must have one size, got [C, H, W] of {sorted(sizes)}")
    return torch.stack(single)


def _single(image: Any, shape: tuple[int, ...] | None) -> Tensor:
    """One image [C, H, W]."""
    if isinstance(image, Tensor):
        return _as_floating(image)
    if _is_pil(image):
        image = _pil_array(image, shape)
    if isinstance(image, np.ndarray) and image.dtype == np.uint8 and image.ndim in (2, 3):
        if image.ndim == 2:
            image = image[:, :, None]
        return _as_floating(torch.from_numpy(np.ascontiguousarray(image)).permute(2, 0, 1))
    wanted = "tensors, PIL images or uint8 arrays"
    raise TypeError(f"images must be {wanted}, got a list of {type(image).__name__}")


def _pil_array(image: Any, shape: tuple[int, ...] | None) -> np.ndarray:
    """A PIL image, upright, in the wanted number of channels; it is not resized."""
    from PIL import ImageOps

    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        raise ValueError(f"images must have 8 bits a channel, got a PIL image of mode {image.mode}")
    grey = shape[0] == 1 if shape is not None else image.mode in ("1", "L")
    return np.array(ImageOps.exif_transpose(image).convert("L" if grey else "RGB"))


def _as_floating(images: Tensor) -> Tensor:
    if images.dtype == torch.uint8:
        return images.float() / 127.5 - 1
    if images.dtype not in DTYPES:
        raise TypeError(f"images must be floating point in -1...1 or uint8, got {images.dtype}")
    return images


def _is_pil(value: Any) -> bool:
    # Not by its class: PIL need not be installed.
    return hasattr(value, "getbands") and hasattr(value, "convert")


def _is_batch(images: Any) -> bool:
    if isinstance(images, Tensor | np.ndarray) or _is_pil(images):
        return True
    if not isinstance(images, list | tuple) or len(images) == 0:
        return False
    first = images[0]
    if isinstance(first, np.ndarray):
        return first.ndim < 4
    return _is_pil(first) or (isinstance(first, Tensor) and first.ndim < 4)


def _unpacked(given: Any) -> Batch:
    """A batch of a stream, with what came along."""
    if isinstance(given, Mapping):
        return of_mapping(given)
    if isinstance(given, list | tuple) and len(given) == 2:
        batch, labels = given
        if _is_batch(batch) and isinstance(labels, Tensor | np.ndarray) and labels.ndim == 1:
            return Batch(batch, integers("labels", labels))
    return Batch(given)


def _check_ids(ids: Tensor) -> None:
    if ((ids < 0) | (ids >= 2**32)).any():
        raise ValueError("image_ids must lie in [0, 2**32)")
    values, counts = ids.unique(return_counts=True)
    if len(values) < len(ids):
        raise ValueError(_repeated_ids(values[counts > 1].tolist()))


def _repeated_ids(repeated: list[int]) -> str:
    return (
        "image_ids must be distinct, since images of one id share their noise, "
        f"got {repeated[:5]} more than once"
    )


def _length(images: Any) -> int | None:
    images = _unpacked(images).images
    if not _is_batch(images):
        dataset = getattr(images, "dataset", None)
        # A DataLoader over a data set whose length is known, and all of which it gives out.
        if dataset is not None and hasattr(dataset, "__len__"):
            if getattr(images, "drop_last", False) or getattr(images, "batch_size", 0) is None:
                return None
            sampler = getattr(images, "sampler", dataset)
            return len(sampler) if hasattr(sampler, "__len__") else None
        if isinstance(images, list | tuple) and all(isinstance(part, Tensor) for part in images):
            return sum(map(len, images))
        return None
    if _is_pil(images):
        return 1
    if isinstance(images, np.ndarray) and images.dtype == np.uint8 and images.ndim < 4:
        return 1 if images.ndim == 2 or images.shape[-1] in (1, 3, 4) else len(images)
    return len(images)
