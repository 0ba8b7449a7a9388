"""Gradients as autograd hands them over: taken from ``.grad``, kept loss by loss, and added up."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Iterable, Sequence
from typing import NamedTuple, cast

import torch
from torch import Tensor

from .groups import label
from .sharded_tensors import around, local_part, placed_as
from .wrappers import is_sharded


class Collected(NamedTuple):
    """What an aligner hands over.

    The gradient of parameter ``indices[t]`` is the sum of its losses' gradients times row
    ``rows[t]``.
    """

    # For each loss, of every parameter.
    gradients: list[list[Tensor | None]]
    indices: list[int]
    rows: list[int]
    coefficients: Tensor  # [rows, n] float64
    # Whether the first loss's gradients are that sum already, the only ones, with rows (1, 0, …).
    combined: bool = False


class CollectedGradients:
    """The gradients of n losses for the same parameters, None where a loss does not reach one.

    They are the tensors that autograd made, which nobody copies; with `flat`, parts of one buffer a
    loss. Of DTensors they are what this process holds.

    Attributes:
        gradients: for each loss, one of every parameter.
        sharded: which parameters are DTensors.
    """

    def __init__(
        self,
        parameters: Sequence[Tensor],
        names: Sequence[str | None],
        n: int,
        *,
        flat: bool,
    ):
        self._parameters = parameters
        self._names = names
        self._n = n
        self._buckets = Buckets(n) if flat else None
        self._memory = HeldMemory()
        self.sharded = [is_sharded(parameter) for parameter in parameters]
        self.clear()

    def clear(self) -> None:
        """Forget everything."""
        # DTensors of which `gradients` has the local parts, by loss and parameter.
        self._whole: dict[tuple[int, int], Tensor] = {}
        self.gradients: list[list[Tensor | None]] = [
            [None] * len(self._parameters) for _ in range(self._n)
        ]
        self._memory.clear()

    def arrange(self, groups: list[int | None]) -> None:
        """Have flat buffers, where they are wanted, for what requires gradients now."""
        if self._buckets is None:
            return
        requiring = {i: local_part(p) for i, p in enumerate(self._parameters) if p.requires_grad}
        self._buckets.arrange(requiring, groups)

    @property
    def device(self) -> torch.device:
        """Where the gradients lie."""
        return self._parameters[0].device

    def present(self) -> list[list[bool]]:
        """For each loss, which parameters have a gradient."""
        return [[gradient is not None for gradient in of_loss] for of_loss in self.gradients]

    def of(self, indices: list[int]) -> list[Tensor | None]:
        """Gradients of parameters, flattened loss by loss."""
        return [of_loss[index] for of_loss in self.gradients for index in indices]

    def one_of_each(self, loss: int) -> dict[int, Tensor]:
        """By its index a gradient of every parameter that has one: that of `loss`, or the first."""
        found: dict[int, Tensor] = {}
        for index, gradient in enumerate(self.gradients[loss]):
            if gradient is None:
                of_losses = [of_loss[index] for of_loss in self.gradients]
                gradient = next((one for one in of_losses if one is not None), None)
            if gradient is not None:
                found[index] = gradient
        return found

    def result(self, loss: int, index: int) -> Tensor:
        """Where a parameter's aligned gradient is written, `loss` being the first to reach it.

        Raises RuntimeError where the parameter could not take it, as it was converted since.
        """
        if self._buckets is None:
            result = cast(Tensor, self.gradients[loss][index])
        else:
            result = self._buckets.views[0][index]
        parameter = self._parameters[index]
        dtype = getattr(parameter, "grad_dtype", parameter.dtype)
        if result.dtype != (dtype or result.dtype) or result.device != parameter.device:
            raise RuntimeError(
                f"the collected gradient of {label(self._names, index)} is {result.dtype} on "
                f"{result.device}, but it takes {dtype} on {parameter.device} now: the model was "
                "converted or moved after the collection, so start the step over with zero_grad()"
            )
        return result

    def wholes(self, indices: Iterable[int], gradients: Iterable[Tensor]) -> list[Tensor]:
        """Gradients as the ``.grad`` of their parameters: DTensors around what is here of them."""
        if not any(self.sharded):
            return list(gradients)
        return list(map(self._whole_gradient, indices, gradients))

    def _whole_gradient(self, index: int, gradient: Tensor) -> Tensor:
        if not self.sharded[index]:
            return gradient
        for loss in range(self._n):
            whole = self._whole.get((loss, index))
            if whole is not None and local_part(whole) is gradient:
                return whole
        return around(gradient, self._parameters[index])

    def take(self, loss: int) -> None:
        """Take every ``.grad`` over as, or into, the gradient of `loss`."""
        collected = self.gradients[loss]
        sums: list[Tensor] = []
        addends: list[Tensor] = []
        for index, parameter in enumerate(self._parameters):
            if parameter.grad is None:
                continue
            gradient, whole = parameter.grad, None
            if self.sharded[index]:
                whole = placed_as(gradient, parameter, label(self._names, index))
                gradient = local_part(whole)
            gradient = self._dense(index, gradient)
            earlier = collected[index]
            if earlier is None:
                own = collected[index] = self._own(loss, index, gradient)
                if whole is not None and local_part(whole) is own:
                    self._whole[loss, index] = whole
            else:
                self._check_new(index, gradient)
                sums.append(earlier)
                addends.append(gradient)
        if sums:
            torch._foreach_add_(sums, addends)

    def put_back(self, loss: int) -> None:
        """Let the next pass add to ``.grad``, as without an aligner.

        A data-parallel wrapper averages what ``.grad`` holds, which includes micro-batches that it
        did not average (``no_sync``).
        """
        collected = self.gradients[loss]
        self.drop(loss)
        for parameter, gradient in zip(self._parameters, collected, strict=True):
            if gradient is not None:
                parameter.grad = gradient

    def drop(self, loss: int) -> None:
        """Forget the gradients of `loss`."""
        self.gradients[loss] = [None] * len(self._parameters)
        self._whole = {key: whole for key, whole in self._whole.items() if key[0] != loss}
        self._memory.clear()
        for gradient in itertools.chain(*self.gradients):
            if gradient is not None:
                self._memory.claim(gradient)

    def _dense(self, index: int, gradient: Tensor) -> Tensor:
        """The gradient of a parameter as a dense tensor that carries no gradient."""
        # Made under inference_mode, it counts no writes.
        if gradient.is_inference():
            gradient = gradient.clone()
        # create_graph=True
        if gradient.requires_grad:
            gradient = gradient.detach()
        if gradient.layout != torch.strided:
            raise ValueError(
                f"the gradient of {label(self._names, index)} must be dense, "
                f"got layout {gradient.layout}: use sparse=False"
            )
        # Set by hand: it may be an expanded tensor.
        if not gradient.is_contiguous():
            parameter = local_part(self._parameters[index])
            if gradient.stride() != parameter.stride():
                gradient = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
        return gradient

    def _own(self, loss: int, index: int, gradient: Tensor) -> Tensor:
        """`gradient`, or a copy: in the flat buffers, and where another gradient has its memory."""
        if self._buckets is not None:
            bucket = self._checked_bucket(
                self._buckets.views[loss].get(index), index, gradient.dtype
            )
            return bucket.copy_(gradient)
        if self._memory.claim(gradient):
            return gradient
        self._check_new(index, gradient)
        return torch.empty_like(gradient).copy_(gradient)

    def _check_new(self, index: int, gradient: Tensor) -> None:
        for gradients in self.gradients:
            earlier = gradients[index]
            if earlier is not None and earlier.is_set_to(gradient):
                raise ValueError(
                    f"the gradient of {label(self._names, index)} lies where one that was "
                    "collected before does: clone it, or use flat=True"
                )

    def _checked_bucket(self, bucket: Tensor | None, index: int, dtype: torch.dtype) -> Tensor:
        """`bucket`, checked to be there and to take a gradient of `dtype`."""
        if bucket is None:
            raise RuntimeError(
                f"{label(self._names, index)} began to require a gradient within a step, "
                "which flat=True does not allow"
            )
        if bucket.dtype != dtype:
            raise ValueError(
                f"the gradient of {label(self._names, index)} must be {bucket.dtype} like its flat "
                f"buffer, got {dtype}"
            )
        return bucket


class HeldMemory:
    """The memory that gradients occupy, to find those that share some.

    Autograd may give several parameters views of one tensor.
    """

    def __init__(self) -> None:
        self.clear()

    def clear(self) -> None:
        """Hold nothing."""
        # Of each storage, which it keeps alive: no other one gets its address.
        self._first: dict[int, Tensor] = {}
        # Of storages that hold several tensors: first byte and end, in order.
        self._ranges: dict[int, list[tuple[int, int]]] = {}

    def claim(self, tensor: Tensor) -> bool:
        """Hold the memory of `tensor` if none of it is held; whether that is so."""
        storage = tensor.untyped_storage()._cdata
        if storage not in self._first:
            self._first[storage] = tensor
            return True
        ranges = self._ranges.setdefault(storage, [])
        if not ranges:
            ranges.append(_byte_range(self._first[storage]))
        start, end = _byte_range(tensor)
        place = bisect.bisect(ranges, (start, end))
        if place > 0 and ranges[place - 1][1] > start:
            return False
        if place < len(ranges) and ranges[place][0] < end:
            return False
        ranges.insert(place, (start, end))
        return True


def _byte_range(tensor: Tensor) -> tuple[int, int]:
    """First byte and end of `tensor` in its storage."""
    span = 0
    if tensor.numel():
        axes = zip(tensor.shape, tensor.stride(), strict=True)
        span = int(sum((size - 1) * stride for size, stride in axes)) + 1
    start = int(tensor.storage_offset())
    return start * tensor.element_size(), (start + span) * tensor.element_size()


class _Part(NamedTuple):
    """A parameter of which a flat buffer holds the gradient."""

    parameter: int
    # -1: in no group.
    group: int
    # Of its gradient.
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, index: int, parameter: Tensor, group: int | None) -> _Part:
        # A grad_dtype of None allows any dtype.
        dtype = getattr(parameter, "grad_dtype", None) or parameter.dtype
        return cls(index, -1 if group is None else group, dtype, parameter.device)

    def order(self) -> tuple[str, bool, int, int]:
        """Its place in the buffer: by groups, behind which what is in none."""
        return str(self.dtype), self.group < 0, self.group, self.parameter


class Buckets:
    """For each loss (and dtype) one flat buffer, in which parameters lie group by group."""

    def __init__(self, n: int):
        # For each loss, parameter -> its part of the buffer.
        self.views: list[dict[int, Tensor]] = [{} for _ in range(n)]
        self._parts: list[_Part] | None = None

    def arrange(self, parameters: dict[int, Tensor], groups: list[int | None]) -> None:
        """Allocate buffers for `parameters`, unless they are there."""
        parts = [_Part.of(index, p, groups[index]) for index, p in parameters.items()]
        if self._parts == parts:
            return
        self._parts = parts
        starts: dict[int, int] = {}
        sizes: dict[torch.dtype, int] = {}
        for part in sorted(parts, key=_Part.order):
            starts[part.parameter] = sizes.get(part.dtype, 0)
            sizes[part.dtype] = starts[part.parameter] + parameters[part.parameter].numel()
        for views in self.views:
            views.clear()
            buffers = {}
            for dtype, size in sizes.items():
                buffers[dtype] = torch.empty(size, dtype=dtype, device=parts[0].device)
            for part in parts:
                like = parameters[part.parameter]
                strides = torch.empty_like(like, device="meta").stride()
                buffer = buffers[part.dtype]
                start = starts[part.parameter]
                views[part.parameter] = buffer.as_strided(like.shape, strides, start)
