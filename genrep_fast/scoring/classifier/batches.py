"""What a batch of a stream brings along: labels, ids and names beside its images."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

# Of a batch that is a dictionary, as data sets of Hugging Face give them; the first that is there.
_IMAGES = ("pixel_values", "images", "image")
_LABELS = ("labels", "label")
_IDS = ("image_ids", "image_id")
_NAMES = ("names", "name")


class Batch(NamedTuple):
    """A batch as it was given.

    Attributes:
        images: of any kind.
        labels, ids: int64 [B], or None.
        names: of the images, or None.
    """

    images: Any
    labels: Tensor | None = None
    ids: Tensor | None = None
    names: list[str] | None = None


def of_mapping(given: Mapping[str, Any]) -> Batch:
    """The batch that a dictionary holds; what it has no use for is skipped.

    Raises:
        TypeError: for one without images, and for labels, ids and names of another kind.
    """
    key = next((key for key in _IMAGES if key in given), None)
    if key is None:
        raise TypeError(
            f"images: a dictionary must hold {', '.join(_IMAGES[:-1])} or {_IMAGES[-1]}, "
            f"got {', '.join(map(repr, given)) or 'an empty one'}"
        )
    labels, ids = (_of_one(given, keys) for keys in (_LABELS, _IDS))
    names = _of_one(given, _NAMES)
    if names is not None:
        names = [names] if isinstance(names, str) else list(names)
        for name in names:
            if not isinstance(name, str):
                raise TypeError(f"names must be text, got {type(name).__name__}")
    if labels is not None:
        labels = integers("labels", labels)
    if ids is not None:
        ids = integers("image_ids", ids)
    return Batch(given[key], labels, ids, names)


def integers(name: str, values: Any) -> Tensor:
    """int64 [N] on the CPU of a sequence of integers.

    Raises:
        TypeError: for anything else.
    """
    try:
        tensor = torch.as_tensor(values).cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(f"{name} must be integers, got {type(values).__name__}") from error
    if tensor.ndim != 1 or tensor.is_floating_point() or tensor.is_complex():
        found = f"{tensor.dtype} of shape {list(tensor.shape)}"
        raise TypeError(f"{name} must be a sequence of integers, got {found}")
    if tensor.dtype == torch.bool:
        raise TypeError(f"{name} must be integers, got {tensor.dtype}")
    return tensor.long()


def _of_one(given: Mapping[str, Any], keys: tuple[str, ...]) -> Any:
    """The value of the first of `keys`; of one image, a sequence of one."""
    value: Any = next((given[key] for key in keys if key in given), None)
    is_number = isinstance(value, int | np.integer) and not isinstance(value, bool)
    if is_number or (isinstance(value, Tensor | np.ndarray) and value.ndim == 0):
        return [int(value)]
    return value
