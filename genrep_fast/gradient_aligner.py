"""Gradients of several losses for the same parameters: taken over from autograd, aligned group by group, written to ``.grad``.

Alignment needs the gradient of every loss by itself. Autograd makes a tensor for each of them anyway, and hands it over where a parameter's
``.grad`` is None; a preset ``.grad`` would be added to, which costs up to two more passes over memory. So `GradientAligner.collect` takes
``.grad`` away after each loss and keeps the tensors as they are: nothing is copied or concatenated. From then on each gradient is read once
for the Gram matrices and once for the combination, which is written over the first loss's gradient.

The Gram matrix of a group is the sum of its tensors' own, always in the same order. A tensor's own matrix can be computed as soon as the
last loss has delivered its gradient: backward calls for it in batches whose gradients are still in cache, and goes on.
"""

from __future__ import annotations

import contextlib
import contextvars
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .gradient_storage import Buckets, HeldMemory, TensorGrams
from .ops.alignment import (
    DTYPES,
    MAX_LOSSES,
    AlignmentStats,
    alignment_coefficients_operator,
    check_number,
    check_weights,
    combine_operator,
)
from .rules import least_accurate_dtype, resolve_rule

# Parameters' elements whose Gram matrices are worth a call while backward runs: reading them takes much longer than the call itself, and
# they are still in the last-level cache. With a quarter of it the calls cost 1 % of a small transformer's training step on the CPU.
_BATCH_ELEMENTS = 1 << 22


@dataclass(frozen=True)
class AlignerStats(AlignmentStats):
    """What an alignment of n losses did, group by group as in `GradientAligner.group_keys`: float64 tensors on the gradients' device.

    Attributes:
        cosine: [groups] between two gradients, [groups, n, n] between n > 2; 0 where one of them is zero.
        alpha: [groups], the damping rho of the rule "genrep"; None for other rules.
        norms: [groups, n], Euclidean norms of the gradients.
        coefficients: [groups, n], factors of the gradients in the result before clipping.
        total_norm: [], Euclidean norm of the result before clipping, over all parameters; None without `max_norm`. Its error is relative to
            sum_i |c_i| norm_i: where gradients cancel, it is an upper bound.
    """

    alpha: Tensor | None
    total_norm: Tensor | None


class Combination(NamedTuple):
    """What is left to do: the gradient of parameter ``indices[t]`` is the sum of its losses' gradients times row ``rows[t]``."""

    indices: list[int]
    rows: list[int]
    coefficients: Tensor  # [groups + 1, n] float64, the last row for what is not aligned


class GradientAligner:
    """Collects the gradients of n losses and writes their aligned sum to ``.grad``, or keeps them for `AlignedAdamW.step`.

    The parameters of a group share one Gram matrix, from which the rule makes one coefficient a loss. A parameter that has no group or that
    some loss does not reach takes the sum of its gradients times `weights`; one that no loss reaches keeps ``.grad`` None. Parameters count
    while they require gradients, now or later. Nothing here waits for the device, except TorchJD's weightings. The rule "genrep" is that of
    `align_gradients` (GenRep, Li, Yang and Wang, ICLR 2026); `genrep_fast.rules` has the others and their papers.

    Args:
        params: parameters, pairs of a name and a parameter, or a module; float32, bfloat16, float16 or float64, on one device.
        names: of the n losses, 2 to 8.
        weights: n numbers, one a loss; of all rules, "genrep" alone uses them for parameters that are aligned.
        power: damping exponent of the rule "genrep", >= 0; 0 gives the plain weighted sum.
        groups: "all" (one group), "tensor" (each parameter is one), "block" (a name up to its first number, "blocks.3" for
            "blocks.3.norm.weight", or its module where it has no number), or a function from a parameter's name to a key (None: no group).
        rule: a name in `genrep_fast.rules.RULES`, a function from Gram matrices [groups, n, n] to coefficients [groups, n], both of
            float64, or a Weighting of TorchJD.
        flat: copy the gradients of a loss into one contiguous buffer as they come, group by group, as communication wants them. It costs
            the copies, and buffers that stay allocated.

    Attributes:
        stats: AlignerStats of the last alignment, by `align`, `backward` or an `AlignedAdamW`'s ``step``; None before the first.
        parameters, parameter_names: lists of the parameters, and of their names (None where they have none).

    Raises:
        TypeError: for an argument of a wrong type, or a parameter of a wrong dtype.
        ValueError: for a wrong value, and where `groups` needs names that parameters do not have.
    """

    def __init__(
        self,
        params: torch.nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        *,
        names: Sequence[str] = ("perception", "generation"),
        weights: Sequence[float] = (0.7, 0.3),
        power: float = 2.0,
        groups: str | Callable[[str], Hashable | None] = "all",
        rule: str | Callable[[Tensor], Tensor] = "genrep",
        flat: bool = False,
    ):
        self.names = _check_names(names)
        self.weights = weights
        self.parameters, self.parameter_names = _named_parameters(params)
        self.stats: AlignerStats | None = None
        self._power = power
        resolved = resolve_rule(rule, self.weights, power, len(self.names))
        self._rule = None if isinstance(rule, str) and rule == "genrep" else resolved  # None: the operator, which has statistics, too
        self._group_key = _key_function(groups, self.parameter_names)
        self._group_rows: dict[Hashable, int] = {}
        self._groups: list[int | None] = [None] * len(self.parameters)  # -1: in no group; None: has not required a gradient yet
        self._assign_groups()
        self._buckets = Buckets(len(self.names)) if flat else None
        self._grams = TensorGrams(len(self.names))
        self._memory = HeldMemory()
        self._elements = sum(parameter.numel() for parameter in self.parameters)
        self._hooks = [partial(self._take, index) for index in range(len(self.parameters))]
        self._layout: _Layout | None = None
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = lambda: None  # a weak reference
        self._marker: _Marker | None = None
        self._collecting: int | None = None  # which loss
        self._stream: Any = None
        self._context: contextvars.Context | None = None
        self._expected_passes = len(self.names)  # of a whole step, known from the last one
        self._rest_expected = False  # whether the last step asked for the norms of gradients that are not aligned
        self._scaler_expected = True
        self._reset()

    @property
    def weights(self) -> tuple[float, ...]:
        """One a loss; a new sequence of n numbers may be set between two alignments."""
        return self._weights

    @weights.setter
    def weights(self, weights: Sequence[float]) -> None:
        self._weights = tuple(check_weights(weights, len(self.names)))
        self._weight_row: Tensor | None = None

    @property
    def group_keys(self) -> list[Hashable]:
        """What the rows of the statistics stand for, in order of first appearance: "all", parameters' names or indices, or blocks."""
        return list(self._group_rows)

    def backward(self, *losses: Tensor, backward: Callable[..., Any] | None = None) -> AlignerStats | None:
        """Run one backward pass a loss over their shared graph, which the last one frees, and align the gradients.

        With an `AlignedAdamW` attached the gradients are kept for its `step`, and those of further calls are added.

        Args:
            losses: n tensors of one element, in the order of `names`.
            backward: called as ``backward(loss, retain_graph=...)``, e.g. ``accelerator.backward``; None: ``loss.backward``.

        Returns:
            The statistics; None with an `AlignedAdamW`, whose `step` puts them into `GradientAligner.stats`.

        Raises:
            TypeError: for a loss that is not a tensor.
            ValueError: for a wrong number of losses, and for a loss of more than one element.
            RuntimeError: in a process group of more than one process, where wrappers reduce the gradient of one backward pass alone; and as
                `collect` and `align`.
        """
        if len(losses) != len(self.names):
            raise ValueError(f"losses must be one for each of {', '.join(self.names)}, got {len(losses)}")
        for name, loss in zip(self.names, losses, strict=True):
            if not isinstance(loss, Tensor):
                raise TypeError(f"the loss {name} must be a tensor, got {type(loss).__name__}")
            if loss.numel() != 1:
                raise ValueError(f"the loss {name} must have one element, got shape {tuple(loss.shape)}")
        if _world_size() > 1:
            raise RuntimeError(
                f"backward runs several backward passes over one graph, of which data-parallel wrappers reduce but one, and "
                f"{_world_size()} processes are running. Run a forward pass for each loss, and its backward pass inside `with "
                f"aligner.collect(name):`, then call aligner.align()"
            )
        before = list(self._passes)
        try:
            for position, (name, loss) in enumerate(zip(self.names, losses, strict=True)):
                retain_graph = position < len(losses) - 1
                with self.collect(name):
                    if backward is None:
                        loss.backward(retain_graph=retain_graph)
                    else:
                        backward(loss, retain_graph=retain_graph)
        except BaseException:
            if any(before):
                self._broken |= self._passes != before
            else:
                self._reset()
            raise
        return self.align() if self._optimizer() is None else None

    @contextlib.contextmanager
    def collect(self, name: str) -> Iterator[None]:
        """Take over the gradients that the block leaves in ``.grad`` as those of the loss `name`.

        Several blocks of the same name in one step, as for micro-batches, add their gradients up. If the block raises, its gradients are
        dropped. Gradients are taken over as they are and written to: what else still holds their memory, as the caller of
        ``parameter.view(-1).backward(gradient)`` holds ``gradient``, sees that. Only where they overlap each other they are copied.

        In several processes the last block of each name must be one whose gradients the data-parallel wrapper averages: a forward pass for
        each loss, through the wrapper.

        Args:
            name: one of `names`.

        Raises:
            ValueError: for an unknown name, and for a sparse gradient.
            RuntimeError: inside another block, where a parameter holds a ``.grad`` already, and after a block that raised where others of
                its name had been collected before: start the step over with `zero_grad`.
        """
        self._begin(name)
        # Without hooks gradients stay in `.grad` until the block ends: as good where nothing is to be done with them before, and necessary
        # where a data-parallel wrapper has yet to average them.
        distributed = _world_size() > 1
        hooked = (self._early or self._passes[self._collecting] > 0 or self._buckets is not None) and not distributed
        handles = []
        if distributed:
            self._put_back()
        try:
            if hooked:
                for parameter, hook in zip(self.parameters, self._hooks, strict=True):
                    if parameter.requires_grad:
                        handles.append(parameter.register_post_accumulate_grad_hook(hook))
            yield
            for index, parameter in enumerate(self.parameters):
                if parameter.grad is not None:
                    self._take(index, parameter)
            self._passes[self._collecting] += 1
        except BaseException:
            self._abandon()
            raise
        finally:
            self._collecting = self._stream = self._context = None
            for handle in handles:
                handle.remove()
        if self._optimizer() is not None and all(self._passes):
            self._leave_marker()

    @torch.no_grad()
    def align(self, max_norm: float | None = None) -> AlignerStats:
        """Write the aligned sum of the collected gradients to ``.grad``, over the memory of the first loss's gradients.

        Args:
            max_norm: shorten the result to this Euclidean norm over all parameters where it is longer, as
                `torch.nn.utils.clip_grad_norm_` does; infinity only measures. Under a GradScaler ``.grad`` is still scaled: clip after
                ``unscale_`` instead.

        Returns:
            The statistics; they stay in `GradientAligner.stats`.

        Raises:
            RuntimeError: where a loss has not been collected.
            TypeError, ValueError: for a `max_norm` that is not a number, or not positive.
        """
        combination = self.combination(max_norm)
        layout = self._layout
        if layout.tensors:
            gradients = self._gradients_of(layout.tensors)
            results = [self._gradients[loss][index] for loss, index in zip(layout.first, layout.indices, strict=True)]
            out = results
            if self._buckets is not None:
                views, runs = self._buckets.views[0], layout.runs
                results = [views[index] for index in layout.indices]
                out = [self._buckets.span(0, runs[tensor]) if tensor in runs else views[tensor] for tensor in layout.tensors]
            combine_operator(gradients, combination.coefficients, layout.tensor_rows, [], out)
            for index, result in zip(layout.indices, results, strict=True):
                self.parameters[index].grad = result
        self.finish()
        return self.stats

    def zero_grad(self) -> None:
        """Drop everything that was collected, and set every parameter's ``.grad`` to None."""
        self._reset()
        for parameter in self.parameters:
            parameter.grad = None

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise TypeError(
            "a GradientAligner, which belongs to its parameters, cannot be copied or pickled: save state_dict() of model and "
            "optimizer, and make a new aligner"
        )

    # For optimizers that consume collected gradients

    def describe(self, index: int) -> str:
        """Name of a parameter, for messages."""
        return self.parameter_names[index] or f"params[{index}]"

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep gradients for `optimizer`, in place of one attached before."""
        self._optimizer = weakref.ref(optimizer)

    def attached(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether gradients are kept for `optimizer`."""
        return self._optimizer() is optimizer

    @property
    def gradients(self) -> list[list[Tensor | None]]:
        """For each loss, what was collected for each of `parameters`."""
        return self._gradients

    def combination(self, max_norm: float | None, grad_scale: Tensor | None = None) -> Combination:
        """Coefficients of the collected gradients, divided by their `grad_scale`; `max_norm` and the statistics are free of it."""
        check_max_norm(max_norm)
        self._check_collected()
        layout = self._current_layout()
        gram = self._gram_matrices(layout, rest=max_norm is not None)
        if grad_scale is not None:
            grad_scale = grad_scale.to(gram)
            gram = gram / grad_scale**2
        coefficients, cosine, alpha, norms = self._coefficients(gram[: len(self._group_rows)])
        if self._weight_row is None or self._weight_row.device != gram.device:
            self._weight_row = torch.tensor([self._weights], dtype=torch.float64, device=gram.device)
        rows, total_norm = torch.cat([coefficients, self._weight_row]), None
        if max_norm is not None:
            total_norm = (rows[:, :, None] * gram * rows[:, None, :]).sum().clamp(min=0).sqrt()
            rows = rows * (max_norm / (total_norm + 1e-6)).clamp(max=1)
        if grad_scale is not None:
            rows = rows / grad_scale
        self.stats = AlignerStats(cosine, alpha, norms, coefficients, total_norm)
        return Combination(layout.indices, layout.rows, rows)

    def overflow(self) -> Tensor:
        """0 where all that was collected is finite, NaN otherwise; float64 without axes."""
        return self._gram_matrices(self._current_layout(), rest=True).sum() * 0

    @property
    def marker_checked(self) -> bool:
        """Whether the ``.grad`` that was left for a GradScaler says if all that was collected is finite."""
        return self._marker is not None and self._marker.checked

    @property
    def marker_changed(self) -> bool:
        """Whether somebody wrote to the ``.grad`` that was left for a GradScaler."""
        return self._marker is not None and self._marker.tensor._version != self._marker.version

    def finish(self, *, scaler_used: bool = False) -> None:
        """Forget the collected gradients, which have been consumed, but remember how the step went."""
        self._expected_passes = sum(self._passes)
        self._rest_expected = self._rest_used
        self._scaler_expected = scaler_used
        self._reset()

    def _begin(self, name: str) -> None:
        if name not in self.names:
            raise ValueError(f"name must be one of {', '.join(self.names)}, got {name!r}")
        if self._collecting is not None:
            raise RuntimeError(f"{name!r} cannot be collected while {self.names[self._collecting]!r} is")
        self._check_whole()
        own = None if self._marker is None else self._marker.tensor
        for index, parameter in enumerate(self.parameters):
            if parameter.grad is not None and parameter.grad is not own:
                raise RuntimeError(
                    f"{self.describe(index)} holds a .grad already, to which backward would add: call "
                    f"optimizer.zero_grad(set_to_none=True) first. To add up micro-batches, collect all of them before align(), or attach "
                    f"an AlignedAdamW"
                )
        self._remove_marker()
        self._assign_groups()
        if self._buckets is not None:
            self._grams.clear()  # pieces of the buckets may change
            requiring = {index: parameter for index, parameter in enumerate(self.parameters) if parameter.requires_grad}
            if not any(self._passes) and self._buckets.arrange(requiring, self._groups):
                self._layout = None  # its runs are neighbours in the buckets of before
        self._collecting = self.names.index(name)
        # Gradients of several passes are complete in the last one alone, which the last step tells.
        last = sum(self._passes) + 1 == self._expected_passes
        self._early = last and self._buckets is None and self._elements >= _BATCH_ELEMENTS
        self._stream = _current_stream(self.parameters[0].device)
        self._context = contextvars.copy_context()  # use_backend holds for the threads of backward, too

    def _take(self, index: int, parameter: Tensor) -> None:
        """Take ``parameter.grad`` over as, or into, the gradient of the loss that is being collected."""
        gradient, parameter.grad = parameter.grad, None
        if gradient.requires_grad:  # create_graph=True
            gradient = gradient.detach()
        if gradient.layout != torch.strided:
            raise ValueError(f"the gradient of {self.describe(index)} must be dense, got layout {gradient.layout}: use sparse=False")
        if not gradient.is_contiguous() and gradient.stride() != parameter.stride():  # set by hand; it may be an expanded tensor
            gradient = torch.empty_like(parameter, dtype=gradient.dtype).copy_(gradient)
        losses = [gradients[index] for gradients in self._gradients]
        collected = losses[self._collecting]
        self._grams.forget(index)
        if collected is not None:
            self._check_new(index, gradient)
            collected.add_(gradient)
        else:
            if self._buckets is not None:
                gradient = self._bucket(index, gradient.dtype).copy_(gradient)
            elif not self._memory.claim(gradient):
                self._check_new(index, gradient)
                gradient = torch.empty_like(gradient).copy_(gradient)
            self._gradients[self._collecting][index] = losses[self._collecting] = gradient
        if self._early and (self._groups[index] >= 0 or self._rest_expected) and all(loss is not None for loss in losses):
            self._grams.submit(index, gradient.numel())
            # What other streams computed is certain to be there only after backward.
            if self._grams.elements >= _BATCH_ELEMENTS and self._stream == _current_stream(gradient.device):
                self._context.run(self._grams.compute, self._gradients_of)

    def _put_back(self) -> None:
        """Let the next pass add to ``.grad``, as without an aligner.

        A data-parallel wrapper averages what ``.grad`` holds, which includes micro-batches that it did not average (``no_sync``).
        """
        collected = self._gradients[self._collecting]
        self._gradients[self._collecting] = [None] * len(self.parameters)
        for parameter, gradient in zip(self.parameters, collected, strict=True):
            if gradient is not None:
                parameter.grad = gradient
        self._claim_collected()

    def _claim_collected(self) -> None:
        self._memory.clear()
        for gradient in itertools.chain(*self._gradients):
            if gradient is not None:
                self._memory.claim(gradient)

    def _check_new(self, index: int, gradient: Tensor) -> None:
        if any(gradients[index] is not None and gradients[index].is_set_to(gradient) for gradients in self._gradients):
            raise ValueError(
                f"the gradient of {self.describe(index)} lies where one that was collected before does: clone it, or use flat=True"
            )

    def _bucket(self, index: int, dtype: torch.dtype) -> Tensor:
        bucket = self._buckets.views[self._collecting].get(index)
        if bucket is None:
            raise RuntimeError(f"{self.describe(index)} began to require a gradient within a step, which flat=True does not allow")
        if bucket.dtype != dtype:
            raise ValueError(f"the gradient of {self.describe(index)} must be {bucket.dtype} like its flat buffer, got {dtype}")
        return bucket

    def _abandon(self) -> None:
        """Drop the gradients of the block that raised."""
        for parameter in self.parameters:
            parameter.grad = None
        self._grams.clear()
        if self._passes[self._collecting]:  # they have been added to those of earlier blocks
            self._broken = True
        else:
            self._gradients[self._collecting] = [None] * len(self.parameters)
            self._claim_collected()

    def _check_whole(self) -> None:
        if self._broken:
            raise RuntimeError("a pass raised after others of this step: start the step over with zero_grad()")

    def _check_collected(self) -> None:
        self._check_whole()
        missing = [name for name, passes in zip(self.names, self._passes, strict=True) if not passes]
        if missing:
            raise RuntimeError(f"no gradients of {', '.join(missing)} to align: run its backward pass inside `with aligner.collect(name):`")

    def _current_layout(self) -> _Layout:
        present = [[gradient is not None for gradient in gradients] for gradients in self._gradients]
        key = (present, len(self._group_rows))
        if self._layout is None or self._layout.key != key:
            self._layout = self._new_layout(key)
        return self._layout

    def _new_layout(self, key: tuple[list[list[bool]], int]) -> _Layout:
        present, rest = key
        losses = {t: [loss for loss, there in enumerate(column) if there] for t, column in enumerate(zip(*present, strict=True))}
        losses = {index: reaching for index, reaching in losses.items() if reaching}
        whole = {index for index, reaching in losses.items() if len(reaching) == len(self.names)}
        rows = {index: self._groups[index] if index in whole and self._groups[index] >= 0 else rest for index in losses}
        runs = [[index] for index in rows] if self._buckets is None else self._buckets.runs(rows, whole)
        not_empty = [index for index in rows if self.parameters[index].numel()]
        return _Layout(
            key,
            indices=list(rows),
            rows=list(rows.values()),
            first=[reaching[0] for reaching in losses.values()],
            tensors=[run[0] for run in runs],
            tensor_rows=[rows[run[0]] for run in runs],
            runs={run[0]: run for run in runs if len(run) > 1},
            smallest=min(not_empty, key=lambda index: self.parameters[index].numel(), default=None),
        )

    def _gradients_of(self, tensors: list[int]) -> list[Tensor | None]:
        """Gradients of `tensors` of a layout, flattened loss by loss."""
        if self._buckets is None:
            return [gradients[index] for gradients in self._gradients for index in tensors]
        runs = self._layout.runs
        return [
            self._buckets.span(loss, runs[index]) if index in runs else gradients[index]
            for loss, gradients in enumerate(self._gradients)
            for index in tensors
        ]

    def _gram_matrices(self, layout: _Layout, rest: bool) -> Tensor:
        """[groups, n, n], with `rest` [groups + 1, n, n]: the last matrix is that of what is not aligned, missing gradients being zero."""
        self._rest_used |= rest
        groups = len(self._group_rows)
        tensors, rows = layout.tensors, layout.tensor_rows
        if not rest:
            tensors = [tensor for tensor, row in zip(tensors, rows, strict=True) if row < groups]
            rows = [row for row in rows if row < groups]
        if not tensors:
            return torch.zeros(groups + rest, *[len(self.names)] * 2, dtype=torch.float64, device=self.parameters[0].device)
        return self._grams.sums(tensors, rows, groups, rest, self._gradients_of)

    def _coefficients(self, gram: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Coefficients, cosine, alpha and norms of the groups' Gram matrices."""
        norms = gram.diagonal(dim1=1, dim2=2).sqrt()
        if self._rule is None:
            return *alignment_coefficients_operator(gram, self._weights, self._power), norms
        cosine = torch.where(norms[:, :, None] * norms[:, None, :] == 0, 0.0, gram / norms[:, :, None] / norms[:, None, :]).clamp(-1, 1)
        dtype = least_accurate_dtype(gradient for gradients in self._gradients for gradient in gradients)
        return self._rule(gram, dtype), cosine if len(self.names) > 2 else cosine[:, 0, 1], None, norms

    @torch.no_grad()
    def _leave_marker(self) -> None:
        """Leave one gradient in ``.grad``, or, where a GradScaler is expected, a copy that is NaN where any gradient is not finite.

        GradScaler looks for such values in ``.grad`` alone, and insists on finding one there.
        """
        layout = self._current_layout()
        if layout.smallest is not None:
            gradient = next(gradients[layout.smallest] for gradients in self._gradients if gradients[layout.smallest] is not None)
            tensor = gradient + self.overflow().to(gradient.dtype) if self._scaler_expected else gradient
            self.parameters[layout.smallest].grad = tensor
            self._marker = _Marker(self.parameters[layout.smallest], tensor, tensor._version, self._scaler_expected)

    def _remove_marker(self) -> None:
        if self._marker is not None and self._marker.parameter.grad is self._marker.tensor:
            self._marker.parameter.grad = None
        self._marker = None

    def _reset(self) -> None:
        self._gradients: list[list[Tensor | None]] = [[None] * len(self.parameters) for _ in self.names]
        self._passes = [0] * len(self.names)
        self._broken = False  # whether gradients of a pass that raised have been added to others
        self._rest_used = False
        self._grams.clear()
        self._memory.clear()
        self._remove_marker()

    def _assign_groups(self) -> None:
        """Give the parameters that require a gradient for the first time their rows."""
        for index, parameter in enumerate(self.parameters):
            if self._groups[index] is None and parameter.requires_grad:
                if parameter.dtype not in DTYPES:
                    raise TypeError(f"{self.describe(index)} must be float32, bfloat16, float16 or float64, got {parameter.dtype}")
                key = self._group_key(index)
                if not isinstance(key, Hashable):
                    raise TypeError(f"groups must return a hashable key or None, got {type(key).__name__} for {self.describe(index)}")
                self._groups[index] = -1 if key is None else self._group_rows.setdefault(key, len(self._group_rows))


class _Layout(NamedTuple):
    """Which gradients belong where, as long as `key` holds: which there are, and the number of groups.

    Operators see tensors: parameters' gradients, or runs of them that are neighbours in flat buckets. A run bears its first one's index.
    """

    key: tuple[list[list[bool]], int]
    indices: list[int]  # parameters that some loss reaches
    rows: list[int]  # of the coefficients, for each of them
    first: list[int]  # which loss is the first to reach it
    tensors: list[int]
    tensor_rows: list[int]
    runs: dict[int, list[int]]  # tensors of several parameters
    smallest: int | None  # of the parameters with elements


class _Marker(NamedTuple):
    """The ``.grad`` that is left for a GradScaler."""

    parameter: Tensor
    tensor: Tensor
    version: int  # counts writes to the tensor
    checked: bool


def check_max_norm(max_norm: float | None) -> float | None:
    """Check that `max_norm` is None or a positive number."""
    if max_norm is not None:
        check_number(max_norm, "max_norm")
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive or None, got {max_norm}")
    return max_norm


def _world_size() -> int:
    available = torch.distributed.is_available() and torch.distributed.is_initialized()
    return torch.distributed.get_world_size() if available else 1


def _current_stream(device: torch.device) -> Any:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def _check_names(names: Sequence[str]) -> tuple[str, ...]:
    if isinstance(names, str) or not isinstance(names, Sequence) or not all(isinstance(name, str) for name in names):
        raise TypeError(f"names must be a sequence of strings, got {names!r}")
    if not 2 <= len(names) <= MAX_LOSSES or len(set(names)) < len(names):
        raise ValueError(f"names must be 2 to {MAX_LOSSES} different ones, got {names!r}")
    return tuple(names)


def _named_parameters(params: torch.nn.Module | Iterable) -> tuple[list[Tensor], list[str | None]]:
    if isinstance(params, Tensor) or not isinstance(params, (torch.nn.Module, Iterable)):
        raise TypeError(f"params must be parameters, named parameters or a module, got {type(params).__name__}")
    items = list(params.named_parameters() if isinstance(params, torch.nn.Module) else params)
    named = [item if isinstance(item, (tuple, list)) else (None, item) for item in items]
    for position, (name, parameter) in enumerate(named):
        called = name or f"params[{position}]"
        if not isinstance(parameter, Tensor):
            raise TypeError(f"{called} must be a parameter, got {type(parameter).__name__}")
        if not parameter.is_leaf:
            raise ValueError(f"{called} must be a leaf tensor, got the result of an operation")
        if parameter.device != named[0][1].device:
            raise ValueError(f"{called} must be on {named[0][1].device} like the first parameter, got {parameter.device}")
    parameters = [parameter for _, parameter in named]
    if not parameters:
        raise ValueError("params must hold at least one parameter, got none")
    if len({id(parameter) for parameter in parameters}) < len(parameters):
        raise ValueError("params must be different tensors, got one of them twice")
    return parameters, [name for name, _ in named]


def _key_function(groups: str | Callable[[str], Hashable | None], names: list[str | None]) -> Callable[[int], Hashable | None]:
    """The function from a parameter's index to the key of its group."""
    if groups == "all":
        return lambda index: "all"
    if groups == "tensor":
        return lambda index: index if names[index] is None else names[index]
    if groups != "block" and not callable(groups):
        raise ValueError(f'groups must be "all", "tensor", "block" or a function of a parameter\'s name, got {groups!r}')
    if None in names:
        raise ValueError(f"params must be named for groups={groups!r}: pass a module or its named_parameters()")
    key = _block if groups == "block" else groups
    return lambda index: key(names[index])


def _block(name: str) -> str:
    """ "blocks.3" of "blocks.3.norm.weight"; "head" of "head.weight"."""
    components = name.split(".")
    for position, component in enumerate(components):
        if component.isdecimal():
            return ".".join(components[: position + 1])
    return ".".join(components[:-1]) or name
