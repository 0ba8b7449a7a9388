"""The streaming scorer: log-likelihoods of a batch from chunks of steps and of classes.

No chunk is kept: the memory does not grow with the number of steps.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from ..checks import (
    check_at_least,
    check_choice,
    check_flag,
    check_floating,
)
from ..coefficients.tables import StepCoefficients
from ..ops.posterior import posterior
from ..ops.scoring import (
    REDUCTIONS,
    chunk_arguments,
    result_shape,
    score_update,
    step_log_likelihoods,
)
from ..reference.scoring import (
    accumulation_dtype,
    add_steps,
    empty_state,
    merge_states,
    state_effective_components,
    state_log_likelihood,
    state_standard_error,
)
from .class_lists import ClassLists
from .class_pairs import ClassPairs
from .seen_images import SeenImages


class PosteriorScorer:
    """Likelihoods and posterior of a batch, from chunks of steps and of classes in any order.

    Keeps float64 running sums of 3 ("mixture") or 2 ("mean") numbers an image and class (and
    location), never a chunk: the memory does not grow with the number of steps. They are allocated
    by the first `update`, which fixes the batch's shape. Nothing carries a gradient.

    An update of the same shapes, dtypes and devices as the one before is not checked again. It
    waits for no device, so that a CUDA graph can capture it.

    The queries take `classes`, distinct ones, ints or an int64 tensor: the class axis of their
    result is in that order; None is all. Classes that have seen more steps than others cannot be
    ranked against these, as the steps themselves differ by more than classes do: `posterior` and
    `paired_standard_error` compare those that have seen the most steps of the classes asked for.

    Args:
        num_classes: K >= 1.
        reduction: "mixture" or "mean", as in `log_likelihood`.
        per_location: keep a likelihood for each location.
        paired: keep what `paired_standard_error` needs, float64 [B, K, K] (and locations). An
            update then takes a kernel a step and some operations on that.

    Raises:
        TypeError, ValueError: for other values.
    """

    def __init__(
        self,
        num_classes: int,
        *,
        reduction: str = "mixture",
        per_location: bool = False,
        paired: bool = False,
    ):
        check_at_least(1, num_classes=num_classes)
        check_choice(reduction, "reduction", REDUCTIONS)
        check_flag(per_location, "per_location")
        check_flag(paired, "paired")
        self.num_classes = int(num_classes)
        self.reduction = reduction
        self.per_location = per_location
        self.paired = paired
        self._dtype = torch.float32
        # Steps seen.
        self._count: Tensor | None = None  # [K] int64
        self._state: Tensor | None = None  # [3 or 2, B, K, *loc] float64
        self._pairs: ClassPairs | None = None
        self._images = SeenImages()
        # `_signature` of the last update.
        self._checked: tuple | None = None
        self._classes = ClassLists(self.num_classes)

    @torch.no_grad()
    def update(
        self,
        x: Tensor,
        model_output: Tensor,
        coefficients: StepCoefficients,
        x_t: Tensor | None = None,
        classes: Sequence[int] | Tensor | None = None,
        batch_id: Hashable = None,
    ) -> None:
        """Add a chunk of steps, and of classes, of the same images.

        Images other than those of the first update since `reset` are refused. On the CPU their
        values tell, on a GPU, which would have to be waited for, their `batch_id` alone.

        Args:
            x, model_output, coefficients, x_t: as in `log_likelihood`; the chunk's class axis is
                [K] or, with `classes`, as long as they are.
            classes: the chunk's classes, distinct, in the order of its class axis; ints or an int64
                tensor. A tensor on a device is checked there. None: all.
            batch_id: what tells the batch from others, as an int or a string; the same with every
                update of it, whose images are not compared then.

        Raises:
            TypeError, ValueError: as in `log_likelihood`, for images that do not fit the earlier
                ones or are others, and for classes out of range or given twice.
            RuntimeError: inside `torch.func.vmap`.
        """
        signature = _signature(x, model_output, x_t, coefficients)
        if signature is None or signature != self._checked:
            self._check_chunk(x, model_output, x_t, coefficients)
        noisy = None if x_t is None else _with_batch_axis(x_t, x)
        chunk = (x, _with_batch_axis(model_output, x), noisy)
        index = self._check_classes(classes, result_shape(*chunk, False)[1], x.device)
        known = self._images.are(x, batch_id)
        if not known:
            self._images.check(x, batch_id)
        count, state = self._allocate(self._result_shape(x), x.device)
        if not known:
            self._images.remember(x, batch_id)
        self._checked = signature
        dtype = accumulation_dtype(x)
        if dtype == torch.float64:
            self._dtype = dtype
        if len(coefficients) == 0:
            return
        tables = coefficients.scoring_tables(dtype)
        if self._pairs is not None:
            self._update_pairs(self._pairs, (*chunk, tables), index, count, state)
        else:
            score_update(*chunk, tables, index, self.reduction, self.per_location, count, state)

    def reset(self) -> None:
        """Forget the steps seen, in place: the next batch has the same shape and device."""
        self._images.forget()
        if self._pairs is not None:
            self._pairs.reset()
        if self._count is not None and self._state is not None:
            self._dtype = torch.float32
            self._count.zero_()
            empty = empty_state(self._state.shape[1:], self.reduction, self._state.device)
            self._state.copy_(empty)

    def merge(self, other: PosteriorScorer) -> None:
        """Add the steps that `other` has seen, which stays as it is; associative.

        Raises:
            TypeError: where `other` is no PosteriorScorer.
            ValueError: where its classes, reduction, images or device differ, or it keeps no pairs
                of classes and this one does.
        """
        if not isinstance(other, PosteriorScorer):
            raise TypeError(f"other must be a PosteriorScorer, got {type(other).__name__}")
        for name in ("num_classes", "reduction", "per_location", "paired"):
            own, given = getattr(self, name), getattr(other, name)
            if given != own:
                raise ValueError(f"other must have {name} {own!r}, got {given!r}")
        if other._state is None:
            return
        added_count, added = other._seen()
        if self._state is not None:
            self._check_fits(self._state, added.shape[1:], added.device, "other")
        self._images.check_merged(other._images)
        count, state = self._allocate(added.shape[1:], added.device)
        self._images.adopt(other._images)
        merged = merge_states(count, state, added_count, added, self.reduction)
        if self._pairs is not None and other._pairs is not None:
            before = ((count, state[0]), (added_count, added[0]))
            self._pairs.merge(other._pairs, before, merged[0])
        state.copy_(merged)
        count += added_count
        self._dtype = torch.promote_types(self._dtype, other._dtype)

    def all_reduce(self, group: dist.ProcessGroup | None = None) -> None:
        """Add the steps that every process of `group` has seen; all hold the same state then.

        The processes score the same images. A process without an `update` takes part as well; it
        gets the state on the current device of the others' kind. Call it once: a second call would
        count every process's steps again.

        Raises:
            ValueError: on every process, where they differ in classes, reduction, the images' shape
                or batch_id.
        """
        self._agree_on_shape(group)
        if self._state is None:
            return
        count, state = self._seen()
        before = (count.clone(), state[0].clone())
        if self.reduction == "mixture":
            self._reduce_mixture(count, state, group)
        else:
            self._reduce_mean(count, state, group)
        if self._pairs is not None:
            self._pairs.all_reduce(*before, state[0], group)

    def log_likelihood(self, classes: Sequence[int] | Tensor | None = None) -> Tensor:
        """Log-likelihood in nats of the steps seen, each class over its own.

        Returns:
            [B, K] or [B, K, *spatial], float32, or float64 once float64 inputs were seen; -inf for
            a class without steps. Values of classes that have seen different steps cannot be
            compared.

        Raises:
            TypeError, ValueError: for classes that are none, out of range or given twice, as the
                other queries do.
            RuntimeError: before the first update, as the other queries do.
        """
        count, state = self._seen(classes)
        return state_log_likelihood(count, state, self.reduction).to(self._dtype)

    def posterior(
        self,
        log_prior: Tensor | None = None,
        temperature: float = 1.0,
        classes: Sequence[int] | Tensor | None = None,
    ) -> Tensor:
        """log p(y|x) [B, K] or [B, K, *spatial], `genrep_fast.posterior` of `log_likelihood()`.

        A class that has seen fewer steps than another one of `classes` has -inf, as one without
        steps does: with the same noise for every class, steps differ among each other by more than
        classes do, so that the average over other steps says nothing about a class. Ask for the
        classes that share their steps, e.g. those that were kept.

        Args:
            log_prior: of all K classes, [K] or [B, K], also where `classes` are some of them.
            temperature: as in `genrep_fast.posterior`.
            classes: as for all queries.
        """
        count, state = self._seen(classes)
        likelihood = self._of_most_steps(count, state).to(self._dtype)
        if log_prior is not None and classes is not None:
            log_prior = self._prior_of(log_prior, classes)
        return posterior(likelihood, log_prior=log_prior, temperature=temperature)

    def effective_components(self, classes: Sequence[int] | Tensor | None = None) -> Tensor:
        """Kish's effective number of components [B, K, *loc], (sum w)^2 / sum w^2.

        From 1 to the number of the class's steps; all of them for "mean".
        """
        count, state = self._seen(classes)
        return state_effective_components(count, state, self.reduction).to(self._dtype)

    def standard_error(self, classes: Sequence[int] | Tensor | None = None) -> Tensor:
        """Standard error of `log_likelihood()` in nats for independent steps [B, K, *loc].

        By the delta method for "mixture"; NaN below 2 steps.
        """
        count, state = self._seen(classes)
        return state_standard_error(count, state, self.reduction).to(self._dtype)

    def paired_standard_error(self, classes: Sequence[int] | Tensor | None = None) -> Tensor:
        """Standard error of a class's log-likelihood less the leader's, in nats [B, K, *loc].

        With the same noise for every class the steps' errors are common to all of them and drop out
        of a difference, which is known far better than either likelihood. The leader of an image
        (and location) is the likeliest of the classes that have seen the most steps; its own value
        is 0. For independent steps; by the delta method for "mixture".

        NaN below 2 steps, and for a class that has not seen each of its and the leader's steps in
        the same update as the leader: give all classes of a step together.

        Raises:
            RuntimeError: where the scorer was made without ``paired=True``.
        """
        if not self.paired:
            raise RuntimeError(
                "paired_standard_error needs PosteriorScorer(..., paired=True), "
                "which keeps moments of pairs of classes"
            )
        count, state = self._seen()
        index = self._query_index(classes)
        everything = torch.arange(self.num_classes, device=count.device)
        index = everything if index is None else index
        leader = self._of_most_steps(count[index], state[:, :, index]).argmax(1)
        # Of `_allocate`.
        assert self._pairs is not None
        error = self._pairs.standard_error(count, state, index[leader])
        return error.index_select(1, index).to(self._dtype)

    def _of_most_steps(self, count: Tensor, state: Tensor) -> Tensor:
        """Log-likelihood, -inf for classes that have seen fewer steps than another one."""
        likelihood = state_log_likelihood(count, state, self.reduction)
        behind = count < count.max()
        return likelihood.masked_fill(behind.reshape(-1, *[1] * (state.ndim - 3)), -math.inf)

    def _prior_of(self, log_prior: Tensor, classes: Sequence[int] | Tensor) -> Tensor:
        """The columns of a prior of all classes."""
        check_floating(log_prior, "log_prior")
        if log_prior.ndim not in (1, 2) or log_prior.shape[-1] != self.num_classes:
            raise ValueError(
                f"log_prior must hold all {self.num_classes} classes of the scorer, [K] or [B, K], "
                f"also where classes are some of them, got {tuple(log_prior.shape)}"
            )
        index = self._classes.index(classes, log_prior.device)
        return log_prior.index_select(-1, index)

    def _update_pairs(
        self,
        pairs: ClassPairs,
        chunk: tuple[Tensor, Tensor, Tensor | None, Tensor],
        index: Tensor | None,
        count: Tensor,
        state: Tensor,
    ) -> None:
        """Add a chunk to the state and to the moments of pairs, from the same numbers."""
        steps = step_log_likelihoods(*chunk, self.per_location).double()
        chosen = slice(None) if index is None else index
        before = (count[chosen].clone(), state[0][:, chosen].clone())
        labels = index
        if labels is None:
            labels = torch.arange(self.num_classes, device=count.device)
        add_steps(steps, labels, self.reduction, count, state)
        pairs.update(steps, index, *before, state[0][:, chosen])

    def _seen(self, classes: Sequence[int] | Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Count and state of `classes`."""
        if self._count is None or self._state is None:
            raise RuntimeError("PosteriorScorer has seen no images yet: call update first")
        index = self._query_index(classes)
        if index is None:
            return self._count, self._state
        return self._count.index_select(0, index), self._state.index_select(2, index)

    def _query_index(self, classes: Sequence[int] | Tensor | None) -> Tensor | None:
        if classes is None or self._state is None:
            return None
        index = self._classes.index(classes, self._state.device)
        if index.shape[0] == 0:
            raise ValueError("classes must hold at least one class, got none")
        return index

    def _allocate(self, shape: Sequence[int], device: torch.device) -> tuple[Tensor, Tensor]:
        """Count and state, which are allocated where there are none yet."""
        if self._count is None or self._state is None:
            # Tensors of inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                self._count = torch.zeros(self.num_classes, dtype=torch.int64, device=device)
                self._state = empty_state(tuple(shape), self.reduction, device)
                if self.paired:
                    self._pairs = ClassPairs(shape, self.reduction, device)
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
        index = self._classes.index(classes, device)
        if index.shape[0] != chunk_classes:
            wanted = f"[{chunk_classes}] like the chunk's class axis"
            raise ValueError(f"classes must be {wanted}, got {tuple(index.shape)}")
        return index

    def _agree_on_shape(self, group: dist.ProcessGroup | None) -> None:
        """Allocate a state where only other processes have one.

        Raises:
            ValueError: on every process, where they differ.
        """
        own = None
        if self._state is not None:
            own = (tuple(self._state.shape), self._state.device.type, self._images.batch_id)
        settings = (self.num_classes, self.reduction, self.per_location, self.paired)
        description = (settings, self._dtype, own)
        described: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(described, description, group)
        states = {state for *_, state in described if state is not None}
        if len({settings for settings, *_ in described}) > 1 or len(states) > 1:
            wanted = "the same classes and images the same way"
            raise ValueError(f"all processes must score {wanted}, got {described}")
        for shape, device_type, batch_id in states:
            self._allocate(shape[1:], torch.device(device_type))
            self._images.adopt_id(batch_id)
        if any(dtype == torch.float64 for _, dtype, _ in described):
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
        described = [
            (type(tensor), tensor.layout, tensor.shape, tensor.dtype, tensor.device)
            for tensor in tensors
        ]
        return (coefficients.unscorable, coefficients.needs_noisy, *described)
    # Nested tensors and parameters of lazy modules have no shape.
    except (AttributeError, RuntimeError):
        return None


def _with_batch_axis(tensor: Tensor, x: Tensor) -> Tensor:
    return tensor if tensor.ndim == x.ndim + 2 else tensor.unsqueeze(0)
