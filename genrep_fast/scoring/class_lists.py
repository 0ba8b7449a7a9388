"""Classes as users list them: checked once, and kept as tensors on the device."""

from __future__ import annotations

import numbers
from collections.abc import Sequence

import torch
from torch import Tensor

from ..checks import check_dense, require

# Lists of classes whose tensors are kept: a stream comes back to the same few.
_KEPT_CLASS_LISTS = 256


class ClassLists:
    """Lists and tensors of distinct classes among `num_classes`, as indices on a device."""

    def __init__(self, num_classes: int) -> None:
        self._num_classes = num_classes
        # Checked lists of classes, as tensors on the device.
        self._kept: dict[tuple, Tensor] = {}
        # The last tensor of classes, its version, itself on the device.
        self._last: tuple[Tensor, int | None, Tensor] | None = None

    def index(self, classes: Sequence[int] | Tensor, device: torch.device) -> Tensor:
        """Checked classes as a tensor on `device`."""
        if isinstance(classes, Tensor):
            return self._of_tensor(classes, device)
        if isinstance(classes, Sequence) and not isinstance(classes, str):
            return self._of_list(tuple(classes), device)
        wanted = "a sequence of ints or an int64 tensor"
        raise TypeError(f"classes must be {wanted}, got {type(classes).__name__}")

    def _of_list(self, classes: tuple[int, ...], device: torch.device) -> Tensor:
        if not all(type(label) is int for label in classes):
            # NumPy's are no ints of Python, booleans are.
            is_integer = [isinstance(label, numbers.Integral) for label in classes]
            if not all(is_integer) or any(isinstance(label, bool) for label in classes):
                raise TypeError(f"classes must be ints or an int64 tensor, got {list(classes)!r}")
            classes = tuple(map(int, classes))
        index = self._kept.get((classes, device))
        if index is None:
            index = torch.tensor(classes, dtype=torch.int64)
            self._require(index)
            index = index.to(device)
            if len(self._kept) == _KEPT_CLASS_LISTS:
                self._kept.clear()
            self._kept[classes, device] = index
        return index

    def _of_tensor(self, classes: Tensor, device: torch.device) -> Tensor:
        check_dense(classes, "classes")
        # The version changes with the tensor's values.
        version = None if classes.is_inference() else classes._version
        if self._last is not None:
            last, last_version, on_device = self._last
            if last is classes and last_version == version and version is not None:
                return on_device
        if classes.dtype != torch.int64:
            raise TypeError(f"classes must be int64, got {classes.dtype}")
        if classes.ndim != 1:
            raise ValueError(f"classes must have one dimension, got {tuple(classes.shape)}")
        if classes.is_meta and device.type != "meta":
            raise ValueError("classes must have values, got a tensor on the device meta")
        self._require(classes)
        on_device = classes.to(device)
        self._last = (classes, version, on_device)
        return on_device

    def _require(self, classes: Tensor) -> None:
        in_range = ((classes >= 0) & (classes < self._num_classes)).all()
        require(in_range, f"classes must lie in 0...{self._num_classes - 1}", classes)
        distinct = (classes.sort().values.diff() != 0).all()
        require(distinct, "classes must be distinct", classes)
