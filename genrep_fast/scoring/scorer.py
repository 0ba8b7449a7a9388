"""The streaming scorer: log-likelihoods of a batch from chunks of steps and of classes.

No chunk is kept: the memory does not grow with the number of steps.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import check_at_least, check_choice, require
from ..coefficients.tables import StepCoefficients
from ..ops.posterior import posterior
from ..ops.scoring import REDUCTIONS, chunk_arguments, result_shape, score_update
from ..reference.scoring import (
    accumulation_dtype,
    empty_state,
    merge_states,
    state_effective_components,
    state_log_likelihood,
    state_standard_error,
)

# Lists of classes whose tensors are kept: a stream comes back to the same few.
_KEPT_CLASS_LISTS = 256


class PosteriorScorer:
    """Likelihoods and posterior of a batch, from chunks of steps and of classes in any order.

    Keeps float64 running sums of 3 ("mixture") or 2 ("mean") numbers an image and class (and
    location), never a chunk: the memory does not grow with the number of steps. They are allocated
    by the first `update`, which fixes the batch's shape. Nothing carries a gradient.

    An update of the same shapes, dtypes and devices as the one before is not checked again. It
    waits for no device, so that a CUDA graph can capture it.

    Args:
        num_classes: K >= 1.
        reduction: "mixture" or "mean", as in `log_likelihood`.
        per_location: keep a likelihood for each location.

    Raises:
        TypeError, ValueError: for other values.
    """

    def __init__(self, num_classes: int, *, reduction: str = "mixture", per_location: bool = False):
        check_at_least(1, num_classes=num_classes)
        check_choice(reduction, "reduction", REDUCTIONS)
        self.num_classes = num_classes
        self.reduction = reduction
        self.per_location = per_location
        self._dtype = torch.float32
        # Steps seen.
        self._count: Tensor | None = None  # [K] int64
        self._state: Tensor | None = None  # [3 or 2, B, K, *loc] float64
        # `_signature` of the last update.
        self._checked: tuple | None = None
        # Checked lists of classes, as tensors on the device.
        self._class_lists: dict[tuple, Tensor] = {}
        # The last tensor of classes, its version, itself on the device.
        self._class_tensor: tuple[Tensor, int | None, Tensor] | None = None

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        model_output: Tensor,
        coefficients: StepCoefficients,
        x_t: Tensor | None = None,
        classes: Sequence[int] | Tensor | None = None,
    ) -> None:
        """Add a chunk of steps, and of classes, of the same images.

        Args:
            x, model_output, coefficients, x_t: as in `log_likelihood`; the chunk's class axis is
                [K] or, with `classes`, as long as they are.
            classes: the chunk's classes, distinct, in the order of its class axis; ints or an int64
                tensor. A tensor on a device is checked there. None: all.

        Raises:
            TypeError, ValueError: as in `log_likelihood`, for images that do not fit the earlier
                ones, and for classes out of range or given twice.
        """
        signature = _signature(x, model_output, x_t, coefficients)
        if signature is None or signature != self._checked:
            self._check_chunk(x, model_output, x_t, coefficients)
        noisy = None if x_t is None else _with_batch_axis(x_t, x)
        chunk = (x, _with_batch_axis(model_output, x), noisy)
        index = self._check_classes(classes, result_shape(*chunk, False)[1], x.device)
        count, state = self._allocate(self._result_shape(x), x.device)
        self._checked = signature
        dtype = accumulation_dtype(x)
        if dtype == torch.float64:
            self._dtype = dtype
        if len(coefficients) > 0:
            score_update(
                *chunk,
                coefficients.scoring_tables(dtype),
                index,
                self.reduction,
                self.per_location,
                count,
                state,
            )

    def reset(self) -> None:
        """Forget the steps seen, in place: the next batch has the same shape and device."""
        if self._count is not None and self._state is not None:
            self._dtype = torch.float32
            self._count.zero_()
            empty = empty_state(self._state.shape[1:], self.reduction, self._state.device)
            self._state.copy_(empty)

    def merge(self, other: PosteriorScorer) -> None:
        """Add the steps that `other` has seen, which stays as it is; associative.

        Raises:
            TypeError: where `other` is no PosteriorScorer.
            ValueError: where its classes, reduction, images or device differ.
        """
        if not isinstance(other, PosteriorScorer):
            raise TypeError(f"other must be a PosteriorScorer, got {type(other).__name__}")
        for name in ("num_classes", "reduction", "per_location"):
            own, given = getattr(self, name), getattr(other, name)
            if given != own:
                raise ValueError(f"other must have {name} {own!r}, got {given!r}")
        if other._state is None:
            return
        added_count, added = other._seen()
        if self._state is not None:
            self._check_fits(self._state, added.shape[1:], added.device, "other")
        count, state = self._allocate(added.shape[1:], added.device)
        state.copy_(merge_states(count, state, added_count, added, self.reduction))
        count += added_count
        self._dtype = torch.promote_types(self._dtype, other._dtype)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add the steps that every process of `group` has seen; all hold the same state then.

        The processes score the same images. A process without an `update` takes part as well; it
        gets the state on the current device of the others' kind. Call it once: a second call would
        count every process's steps again.

        Raises:
            ValueError: on every process, where they differ in classes, reduction or images.
        """
        self._agree_on_shape(group)
        if self._state is None:
            return
        count, state = self._seen()
        if self.reduction == "mixture":
            self._reduce_mixture(count, state, group)
        else:
            self._reduce_mean(count, state, group)

    def log_likelihood(self) -> Tensor:
        """Log-likelihood in nats of the steps seen, each class over its own.

        Returns:
            [B, K] or [B, K, *spatial], float32, or float64 once float64 inputs were seen; -inf for
            a class without steps.

        Raises:
            RuntimeError: before the first update, as the other queries do.
        """
        return state_log_likelihood(*self._seen(), self.reduction).to(self._dtype)

    def posterior(self, log_prior: Tensor | None = None, temperature: float = 1.0) -> Tensor:
        """log p(y|x) [B, K] or [B, K, *spatial], `genrep_fast.posterior` of `log_likelihood()`."""
        return posterior(self.log_likelihood(), log_prior=log_prior, temperature=temperature)

    def effective_components(self) -> Tensor:
        """Kish's effective number of components [B, K, *loc], (sum w)^2 / sum w^2.

        From 1 to the number of the class's steps; all of them for "mean".
        """
        return state_effective_components(*self._seen(), self.reduction).to(self._dtype)

    def standard_error(self) -> Tensor:
        """Standard error of `log_likelihood()` in nats for independent steps [B, K, *loc].

        By the delta method for "mixture"; NaN below 2 steps.
        """
        return state_standard_error(*self._seen(), self.reduction).to(self._dtype)

    def _seen(self) -> tuple[Tensor, Tensor]:
        if self._count is None or self._state is None:
            raise RuntimeError("PosteriorScorer has seen no images yet: call update first")
        return self._count, self._state

    def _allocate(self, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Count and state, which are allocated where there are none yet."""
        if self._count is None or self._state is None:
            self._count = torch.zeros(self.num_classes, dtype=torch.int64, device=device)
            self._state = empty_state(tuple(shape), self.reduction, device)
        return self._count, self._state

    @staticmethod
    def _check_fits(state: Tensor, shape: Sequence[int], device: torch.device, name: str) -> None:
        """Check that images of `shape` [B, K, *loc] on `device` are those that `state` is of."""
        expected = state.shape[1:]
        if tuple(shape) != tuple(expected):
            wanted = f"the images seen so far, [B, K, ...] = {tuple(expected)}"
            raise ValueError(f"{name} must fit {wanted}, got {tuple(shape)}")
        if device != state.device:
            raise ValueError(
                f"{name} must be on {state.device} like the images seen so far, got {device}"
            )

    def _check_chunk(
        self, x: Tensor, model_output: Tensor, x_t: Tensor | None, coefficients: StepCoefficients
    ) -> None:
        chunk_arguments(x, model_output, coefficients, x_t)
        if self._state is not None:
            self._check_fits(self._state, self._result_shape(x), x.device, "x")

    def _result_shape(self, x: Tensor) -> tuple[int, ...]:
        locations = x.shape[2:] if self.per_location else ()
        return (x.shape[0], self.num_classes, *locations)

    def _check_classes(
        self, classes: Sequence[int] | Tensor | None, chunk_classes: int, device: torch.device
    ) -> Tensor | None:
        if classes is None:
            if chunk_classes != self.num_classes:
                wanted = f"all {self.num_classes} classes where classes is None"
                raise ValueError(f"model_output must have {wanted}, got {chunk_classes}")
            return None
        if isinstance(classes, Tensor):
            index = self._classes_of_tensor(classes, device)
        elif isinstance(classes, Sequence):
            index = self._classes_of_list(tuple(classes), device)
        else:
            wanted = "a sequence of ints or an int64 tensor"
            raise TypeError(f"classes must be {wanted}, got {type(classes).__name__}")
        if index.shape[0] != chunk_classes:
            wanted = f"[{chunk_classes}] like the chunk's class axis"
            raise ValueError(f"classes must be {wanted}, got {tuple(index.shape)}")
        return index

    def _classes_of_list(self, classes: tuple[int, ...], device: torch.device) -> Tensor:
        if not all(type(label) is int for label in classes):
            raise TypeError(f"classes must be ints or an int64 tensor, got {list(classes)!r}")
        index = self._class_lists.get((classes, device))
        if index is None:
            index = torch.tensor(classes, dtype=torch.int64)
            self._require_classes(index)
            index = index.to(device)
            if len(self._class_lists) == _KEPT_CLASS_LISTS:
                self._class_lists.clear()
            self._class_lists[classes, device] = index
        return index

    def _classes_of_tensor(self, classes: Tensor, device: torch.device) -> Tensor:
        # The version changes with the tensor's values.
        version = None if classes.is_inference() else classes._version
        if self._class_tensor is not None:
            last, last_version, on_device = self._class_tensor
            if last is classes and last_version == version and version is not None:
                return on_device
        if classes.dtype != torch.int64:
            raise TypeError(f"classes must be int64, got {classes.dtype}")
        if classes.ndim != 1:
            raise ValueError(f"classes must have one dimension, got {tuple(classes.shape)}")
        self._require_classes(classes)
        on_device = classes.to(device)
        self._class_tensor = (classes, version, on_device)
        return on_device

    def _require_classes(self, classes: Tensor) -> None:
        in_range = ((classes >= 0) & (classes < self.num_classes)).all()
        require(in_range, f"classes must lie in 0...{self.num_classes - 1}", classes)
        distinct = (classes.sort().values.diff() != 0).all()
        require(distinct, "classes must be distinct", classes)

    def _agree_on_shape(self, group: dist.ProcessGroup | None) -> None:
        """Allocate a state where only other processes have one.

        Raises:
            ValueError: on every process, where they differ.
        """
        own = None if self._state is None else (tuple(self._state.shape), self._state.device.type)
        description = (self.num_classes, self.reduction, self.per_location, self._dtype, own)
        described: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(described, description, group)
        states = {state for *_, state in described if state is not None}
        if len({settings[:3] for settings in described}) > 1 or len(states) > 1:
            wanted = "the same classes and images the same way"
            raise ValueError(f"all processes must score {wanted}, got {described}")
        for shape, device_type in states:
            self._allocate(shape[1:], torch.device(device_type))
        if any(settings[3] == torch.float64 for settings in described):
            self._dtype = torch.float64

    def _reduce_mixture(
        self, count: Tensor, state: Tensor, group: dist.ProcessGroup | None
    ) -> None:
        neutral = empty_state(state.shape[1:], self.reduction, state.device)
        neutral[0] = state[0]
        dist.all_reduce(neutral[0], dist.ReduceOp.MAX, group)
        # Merging no weight at the common maximum rescales to it; after that the sums only add up.
        state.copy_(merge_states(count, state, count, neutral, self.reduction))
        dist.all_reduce(state[1:], group=group)
        dist.all_reduce(count, group=group)

    def _reduce_mean(self, count: Tensor, state: Tensor, group: dist.ProcessGroup | None) -> None:
        mean, squares = state
        own = count.double().reshape(-1, *[1] * (mean.ndim - 2))
        dist.all_reduce(count, group=group)
        total = count.double().reshape(own.shape).clamp(min=1)
        common = own * mean
        dist.all_reduce(common, group=group)
        common /= total
        squares += own * (mean - common).square()
        dist.all_reduce(squares, group=group)
        mean.copy_(common)


def _signature(
    x: Tensor, model_output: Tensor, x_t: Tensor | None, coefficients: StepCoefficients
) -> tuple | None:
    """All that `chunk_arguments` asks of a chunk.

    None for arguments that lack some of it, which `chunk_arguments` then refuses.
    """
    try:
        tensors = [x, model_output, coefficients.data]
        if x_t is not None:
            tensors.append(x_t)
        described = [(tensor.shape, tensor.dtype, tensor.device) for tensor in tensors]
        return (coefficients.unscorable, coefficients.needs_noisy, *described)
    except AttributeError:
        return None


def _with_batch_axis(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor if tensor.ndim == x.ndim + 2 else tensor.unsqueeze(0)
