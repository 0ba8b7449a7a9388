"""Tells the batch that a scorer is of from another one of the same shape."""

from __future__ import annotations

import weakref
from collections.abc import Hashable
from typing import Any

import torch
from torch import Tensor

from ..dispatch.operators import in_function_transform

_PLAIN_TENSORS = (Tensor, torch.nn.Parameter)


class SeenImages:
    """What is known of the images seen so far: their id, and on the CPU themselves.

    The tensor that was looked at last is the same without another look where nobody wrote to it
    since, as far as PyTorch knows: writes through `.data` or NumPy go unnoticed. Others on the CPU
    are compared with a copy of the first. On a device, where a comparison would wait,
    the id alone tells. So it does where one is given: images that are computed again for every
    chunk may differ in their last bits.

    Attributes:
        batch_id: that of the images; None where none was given.
    """

    def __init__(self) -> None:
        self.forget()

    def forget(self) -> None:
        """Take the next images, whatever they are."""
        self.batch_id: Hashable = None
        self._any = False
        # The tensor that was looked at last, and where it lay in which version then.
        self._last: weakref.ref[Tensor] | None = None
        self._place: tuple | None = None
        self._copy: Tensor | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A weak reference can be neither copied nor pickled.
        return self.__dict__ | {"_last": None, "_place": None}

    def are(self, x: Tensor, batch_id: Hashable) -> bool:
        """Whether `x` is the tensor of the last images, and nobody wrote to it since."""
        if self._last is None or batch_id is not None or torch.compiler.is_compiling():
            return False
        if self._last() is not x:
            return False
        try:
            return _place(x) == self._place
        # Tensors of inference mode have no version, wrapped ones no address.
        except RuntimeError:
            return False

    def check(self, x: Tensor, batch_id: Hashable) -> None:
        """Raise TypeError or ValueError where `x` are other images than those seen so far."""
        if batch_id is not None:
            check_batch_id(batch_id)
        if not self._any:
            return
        if batch_id != self.batch_id:
            raise ValueError(
                f"batch_id must be {self.batch_id!r} like that of the images seen so far, got "
                f"{batch_id!r}: call reset() before another batch"
            )
        if batch_id is None and not self._agree(self._copy, x):
            raise ValueError(
                "x must be the images seen so far, got others of the same shape: call reset() "
                "before another batch, or give the same batch_id with every update where they "
                "are computed again"
            )

    def remember(self, x: Tensor, batch_id: Hashable) -> None:
        """Note images that `check` has passed."""
        if not self._any:
            self._any = True
            self.batch_id = batch_id
            if batch_id is None and _can_be_read(x):
                self._copy = x.detach().clone()
        if self._copy is not None and _can_be_read(x) and not x.is_inference():
            self._last = weakref.ref(x)
            self._place = _place(x)

    def check_merged(self, other: SeenImages) -> None:
        """Raise ValueError where a scorer of `other` images cannot be merged."""
        if not (self._any and other._any):
            return
        if other.batch_id != self.batch_id:
            raise ValueError(
                f"other must have the batch_id {self.batch_id!r} of the images seen so far, "
                f"got {other.batch_id!r}"
            )
        if other._copy is not None and not self._agree(self._copy, other._copy):
            raise ValueError(
                "other must have seen the same images, got others of the same shape: "
                "give both the same batch_id where they are computed again"
            )

    def adopt(self, other: SeenImages) -> None:
        """Know what `other` knows, where nothing is known yet."""
        if not self._any:
            self.__dict__.update(other.__dict__)

    def adopt_id(self, batch_id: Hashable) -> None:
        """Take over an id, where nothing is known yet."""
        if not self._any:
            self._any, self.batch_id = True, batch_id

    @staticmethod
    def _agree(one: Tensor | None, other: Tensor) -> bool:
        """Whether images are the same, NaN included, where that can be told."""
        if one is None or not _can_be_read(other) or one.dtype != other.dtype:
            return True
        if torch.equal(one, other):
            return True
        return bool(((one == other) | (one.isnan() & other.isnan())).all())


def _place(x: Tensor) -> tuple:
    """Where a tensor lies, how, and how often it was written to."""
    return x.data_ptr(), x._version, x.stride(), x.shape, x.dtype


def check_batch_id(batch_id: Hashable) -> None:
    """Check that `batch_id` can be compared, as a tensor cannot."""
    if isinstance(batch_id, Tensor) or not isinstance(batch_id, Hashable):
        wanted = "an int, a string or another hashable value"
        raise TypeError(f"batch_id must be {wanted}, got {type(batch_id).__name__}")


def _can_be_read(x: Tensor) -> bool:
    """Whether the values of `x` are there without waiting."""
    if x.device.type != "cpu" or type(x) not in _PLAIN_TENSORS:
        return False
    return not (torch.compiler.is_compiling() or in_function_transform())
