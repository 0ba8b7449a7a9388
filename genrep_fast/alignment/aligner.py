"""Gradients of several losses, taken from autograd and aligned group by group into ``.grad``.

Alignment needs the gradient of every loss by itself. Autograd makes a tensor for each of them
anyway, and hands it over where a parameter's ``.grad`` is None; a preset ``.grad`` would be added
to, which costs up to two more passes over memory. So `GradientAligner.collect` takes ``.grad`` away
before each block and keeps the tensors that the block leaves there: nothing is copied or
concatenated. Each gradient is then read once for the Gram matrices and once for the combination,
which is written over the first loss's gradient.

Every tensor has a Gram matrix of its own. Where its diagonal holds a zero, some loss does not reach
the tensor, though autograd made zeros of a missing gradient; the matrix of a group is the sum over
the tensors that every loss reaches.
"""

from __future__ import annotations

import contextlib
import itertools
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from ..checks import DTYPES, check_number, check_weights
from ..ops.alignment import (
    AlignmentStats,
    alignment_coefficients_operator,
    combine_operator,
    group_gram_operator,
    tensor_coefficients_operator,
)
from .collected import CollectedGradients
from .groups import check_names, check_not_sharded, key_function, label, named_parameters
from .layout import Layout
from .left_gradients import Fate, LeftGradients
from .rules import least_accurate_dtype, resolve_rule
from .tensor_grams import TensorGrams
from .wrappers import is_data_parallel, parameters_inside, plain_name, unwrapped, world_size


@dataclass(frozen=True)
class AlignerStats(AlignmentStats):
    """What an alignment of n losses did, group by group as in `GradientAligner.group_keys`.

    All are float64 tensors on the gradients' device.

    Attributes:
        cosine: [groups] between two gradients, [groups, n, n] between n > 2; 0 where one of them is
            zero.
        alpha: [groups], the damping rho of the rule "genrep"; None for other rules.
        norms: [groups, n], Euclidean norms of the gradients.
        coefficients: [groups, n], factors of the gradients in the result before clipping.
        total_norm: [], Euclidean norm of the result before clipping, over all parameters; None
            without `max_norm`. Its error is relative to sum_i |c_i| norm_i: where gradients cancel,
            it is an upper bound.
    """

    alpha: Tensor | None
    total_norm: Tensor | None


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


class GradientAligner:
    """Collects the gradients of n losses and writes their aligned sum to ``.grad``.

    With an `AlignedAdamW` attached it keeps them for its ``step`` instead.

    The parameters of a group share one Gram matrix, from which the rule makes one coefficient a
    loss. A parameter that has no group or that some loss does not reach takes the sum of its
    gradients times `weights`; one that no loss reaches keeps ``.grad`` None. A loss does not reach
    a parameter whose gradient is None or exactly zero everywhere, as autograd makes it of None in
    compiled, checkpointed and sliced models. Parameters count while they require gradients, now or
    later. Nothing here waits for the device, except TorchJD's weightings and what asks whether
    gradients were zeroed. The rule "genrep" is that of `align_gradients` (GenRep, Li, Yang and
    Wang, ICLR 2026); `genrep_fast.rules` has the others and their papers.

    Args:
        params: parameters, pairs of a name and a parameter, or a module; float32, bfloat16, float16
            or float64, on one device. Names come without what torch.compile,
            DistributedDataParallel, DataParallel, AveragedModel and Lightning Fabric put before
            them.
        names: of the n losses, 2 to 8.
        weights: n numbers, one a loss; None: (0.7, 0.3) for the rule "genrep" and ones for every
            other. Of all rules, "genrep" alone uses them for parameters that are aligned.
        power: damping exponent of the rule "genrep", >= 0; 0 gives the plain weighted sum.
        groups: "all" (one group), "tensor" (each parameter is one), "block" (a name up to its first
            number, "blocks.3" for "blocks.3.norm.weight", or its module where it has no number), or
            a function from a parameter's name to a key (None: no group).
        rule: a name in `genrep_fast.rules.RULES`, a function from Gram matrices [groups, n, n] to
            coefficients [groups, n], both of float64, or a Weighting of TorchJD.
        flat: copy the gradients of a loss into one contiguous buffer, group by group, as
            communication wants them. It costs the copies, and buffers that stay allocated.

    Attributes:
        stats: AlignerStats of the last alignment, by `align`, `backward` or an `AlignedAdamW`'s
            ``step``; None before the first.
        parameters, parameter_names: lists of the parameters, and of their names (None where they
            have none).
        module: the module that `params` is, without its wrappers; None where it is none.

    Raises:
        TypeError: for an argument of a wrong type, or a parameter of a wrong dtype.
        ValueError: for a wrong value, and where `groups` needs names that parameters do not have.
        RuntimeError: for parameters that FSDP has flattened or sharded.
    """

    def __init__(
        self,
        params: torch.nn.Module | Iterable[Tensor] | Iterable[tuple[str, Tensor]],
        *,
        names: Sequence[str] = ("perception", "generation"),
        weights: Sequence[float] | None = None,
        power: float = 2.0,
        groups: str | Callable[[str], Hashable | None] = "all",
        rule: str | Callable[[Tensor], Tensor] = "genrep",
        flat: bool = False,
    ):
        self.names = check_names(names)
        is_genrep = isinstance(rule, str) and rule == "genrep"
        self.weights = _default_weights(is_genrep, len(self.names)) if weights is None else weights
        self.module = unwrapped(params) if isinstance(params, torch.nn.Module) else None
        source = params if self.module is None else self.module
        self.parameters, self.parameter_names = named_parameters(source)
        self._known = {id(parameter) for parameter in self.parameters}
        self.stats: AlignerStats | None = None
        self._power = power
        resolved = resolve_rule(rule, self.weights, power, len(self.names))
        # None: the operator, which has statistics, too.
        self._rule = None if is_genrep else resolved
        self._group_key = key_function(groups, self.parameter_names)
        self._group_rows: dict[Hashable, int] = {}
        # -1: in no group; None: has not required a gradient yet.
        self._groups: list[int | None] = [None] * len(self.parameters)
        self._assign_groups()
        self._collected = CollectedGradients(
            self.parameters, self.parameter_names, len(self.names), flat=flat
        )
        self._grams = TensorGrams(len(self.names))
        self._left = LeftGradients()
        self._layout: Layout | None = None
        # A weak reference.
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = lambda: None
        self._scaler_expected = True
        # Which loss.
        self._collecting: int | None = None
        # Whether zero_grad was called in the block.
        self._emptied = False
        self._data_parallel: bool | None = None
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
        """What the rows of the statistics stand for, in order of first appearance.

        "all", parameters' names or indices, or blocks.
        """
        return list(self._group_rows)

    def backward(
        self, *losses: Tensor, backward: Callable[..., Any] | None = None
    ) -> AlignerStats | None:
        """Run one backward pass a loss over their shared graph, and align the gradients.

        The last pass frees the graph. With an `AlignedAdamW` attached the gradients are kept for
        its `step`, and those of further calls are added.

        Args:
            losses: n tensors of one element, in the order of `names`.
            backward: called as ``backward(loss, retain_graph=...)``, e.g. ``accelerator.backward``;
                None: ``loss.backward``.

        Returns:
            The statistics; None with an `AlignedAdamW`, whose `step` puts them into
            `GradientAligner.stats`.

        Raises:
            TypeError: for a loss that is not a tensor.
            ValueError: for a wrong number of losses, and for a loss of more than one element.
            RuntimeError: under DistributedDataParallel and in a process group of more than one
                process, where the gradient of one backward pass alone is reduced; and as `collect`
                and `align`.
        """
        if len(losses) != len(self.names):
            raise ValueError(
                f"losses must be one for each of {', '.join(self.names)}, got {len(losses)}"
            )
        for name, loss in zip(self.names, losses, strict=True):
            if not isinstance(loss, Tensor):
                raise TypeError(f"the loss {name} must be a tensor, got {type(loss).__name__}")
            if loss.numel() != 1:
                raise ValueError(
                    f"the loss {name} must have one element, got shape {tuple(loss.shape)}"
                )
        self._check_outside("backward")
        self._check_one_reducer()
        self._check_free()
        before = list(self._passes)
        try:
            for position, (name, loss) in enumerate(zip(self.names, losses, strict=True)):
                self._clear_gradients()
                retain_graph = position < len(losses) - 1
                with self._block(name):
                    if backward is None:
                        loss.backward(retain_graph=retain_graph)
                    else:
                        backward(loss, retain_graph=retain_graph)
        except BaseException:
            if not any(before):
                self._reset()
            elif self._passes != before:
                self._broken = True
            self._leave()
            raise
        if self._optimizer() is None:
            return self.align()
        self._leave()
        return None

    @contextlib.contextmanager
    def collect(self, name: str) -> Iterator[None]:
        """Take over the gradients that the block leaves in ``.grad`` as those of the loss `name`.

        What the block does to ``.grad``, such as clipping it, counts. Several blocks of the same
        name in one step, as for micro-batches, each find ``.grad`` empty, and add their gradients
        up. Until the next block the gradients can be read in ``.grad``; to write to them is an
        error, and to drop them, as ``zero_grad`` does, drops everything that was collected. If the
        block raises, its gradients are dropped. Gradients are taken over as they are and written
        to: what else still holds their memory, as the caller of
        ``parameter.view(-1).backward(gradient)`` holds ``gradient``, sees that. Only where they
        overlap each other they are copied.

        In several processes the last block of each name must be one whose gradients the
        data-parallel wrapper averages: a forward pass for each loss, through the wrapper. There
        ``.grad`` holds what was collected in the blocks before.

        Args:
            name: one of `names`.

        Raises:
            ValueError: for an unknown name, and for a sparse gradient.
            RuntimeError: inside another block, where `backward`, `align` and the optimizer's step
                do not work either; where a parameter holds a ``.grad`` already or what was
                collected was written to; and after a block that raised where others of its name had
                been collected before: start the step over with `zero_grad`.
        """
        if name not in self.names:
            raise ValueError(f"name must be one of {', '.join(self.names)}, got {name!r}")
        self._check_outside(f"collect({name!r})")
        self._check_free()
        try:
            with self._block(name):
                yield
        finally:
            self._leave(latest=self.names.index(name))

    @torch.no_grad()
    def align(self, max_norm: float | None = None) -> AlignerStats:
        """Write the aligned sum of the collected gradients to ``.grad``.

        It takes the memory of the first loss's gradients.

        Args:
            max_norm: shorten the result to this Euclidean norm over all parameters where it is
                longer, as `torch.nn.utils.clip_grad_norm_` does; infinity only measures. Under a
                GradScaler ``.grad`` is still scaled: clip after ``unscale_`` instead.

        Returns:
            The statistics; they stay in `GradientAligner.stats`.

        Raises:
            RuntimeError: where a loss has not been collected, no loss reached a parameter, what was
                collected was dropped or written to since, or a loss reached parameters of the
                module that the aligner does not know.
            TypeError, ValueError: for a `max_norm` that is not a number, or not positive.
        """
        collected = self.hand_over(max_norm)
        reached_first = zip(self._layout.first, collected.indices, strict=True)
        results = [self._collected.result(loss, index) for loss, index in reached_first]
        gradients = self._collected.of(collected.indices)
        combine_operator(gradients, collected.coefficients, collected.rows, [], results)
        self._left.clear()
        for index, result in zip(collected.indices, results, strict=True):
            self.parameters[index].grad = result
        self.finish()
        return self.stats

    def zero_grad(self) -> None:
        """Drop everything that was collected, and set every parameter's ``.grad`` to None.

        Inside a block of `collect` that includes what the block has done; what it does afterwards
        counts.
        """
        self._reset()
        self._emptied = self._collecting is not None
        self._clear_gradients()

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise TypeError(
            "a GradientAligner, which belongs to its parameters, cannot be copied or pickled: "
            "save state_dict() of model and optimizer, and make a new aligner"
        )

    # For optimizers that consume collected gradients

    def describe(self, index: int) -> str:
        """Name of a parameter, for messages."""
        return label(self.parameter_names, index)

    def attach(self, optimizer: torch.optim.Optimizer) -> None:
        """Keep gradients for `optimizer`, in place of one attached before."""
        self._optimizer = weakref.ref(optimizer)

    def attached(self, optimizer: torch.optim.Optimizer) -> bool:
        """Whether gradients are kept for `optimizer`."""
        return self._optimizer() is optimizer

    @property
    def empty(self) -> bool:
        """Whether nothing has been collected."""
        return not any(self._passes) and not self._broken

    def hand_over(self, max_norm: float | None, grad_scale: Tensor | None = None) -> Collected:
        """The collected gradients and their coefficients, divided by `grad_scale`.

        `max_norm` and the statistics are free of the scale. The gradients stay here until `finish`.
        """
        check_max_norm(max_norm)
        self._check_outside("align" if self._optimizer() is None else "step")
        # It looked for non-finite values.
        self._check_left(written_by_scaler=grad_scale is not None)
        self._check_collected()
        if self._optimizer() is not None:
            self._check_nothing_else()
        layout = self._current_layout()
        self._check_reached(layout)
        grams, groups, rows = self._tensor_grams(layout, everything=max_norm is not None)
        if grad_scale is not None:
            grad_scale = grad_scale.to(grams)
            grams = grams / grad_scale**2
        gram = group_gram_operator(grams, groups, len(self._group_rows))
        coefficients, cosine, alpha, norms = self._coefficients(gram)
        table = tensor_coefficients_operator(coefficients, grams, groups, list(self._weights))
        total_norm = None
        if max_norm is not None:
            total_norm = (table[:, :, None] * grams * table[:, None, :]).sum().clamp(min=0).sqrt()
            table = table * (max_norm / (total_norm + 1e-6)).clamp(max=1)
        else:
            table = torch.cat([table, self._row_of_weights(table.device)])
        if grad_scale is not None:
            table = table / grad_scale
        self.stats = AlignerStats(cosine, alpha, norms, coefficients, total_norm)
        return Collected(self._collected.gradients, layout.indices, rows, table)

    def overflow(self) -> Tensor:
        """0 where all that was collected is finite, NaN otherwise; float64 without axes."""
        grams, _, _ = self._tensor_grams(self._current_layout(), everything=True)
        return grams.sum() * 0

    @property
    def marker_checked(self) -> bool:
        """Whether the ``.grad`` left for a GradScaler says if all that was collected is finite."""
        return self._marker_checked

    def finish(self, *, scaler_used: bool = False) -> None:
        """Forget the collected gradients, which were consumed, and remember how the step went."""
        self._scaler_expected = scaler_used
        self._reset()

    @contextlib.contextmanager
    def _block(self, name: str) -> Iterator[None]:
        """Take over what the block leaves in ``.grad``, without removing it there."""
        self._left.take_back()
        self._grams.clear()
        self._assign_groups()
        if not any(self._passes):
            self._collected.arrange(self._groups)
        self._collecting = self.names.index(name)
        self._emptied = False
        if (world_size() or 1) > 1:
            self._collected.put_back(self._collecting)
        try:
            yield
            if self._emptied and all(parameter.grad is None for parameter in self.parameters):
                self._dropped = True
            else:
                self._collected.take(self._collecting)
                self._passes[self._collecting] += 1
        except BaseException:
            self._abandon()
            raise
        finally:
            self._collecting = None

    def _check_outside(self, call: str) -> None:
        if self._collecting is not None:
            block = f"the block that collects {self.names[self._collecting]!r}"
            why = f"{call} inside {block}, which takes .grad over when it ends"
            raise RuntimeError(f"{why}: call it behind the block")

    def _check_free(self) -> None:
        """Raise RuntimeError where ``.grad`` holds more than what was left there before a block."""
        self._check_whole()
        self._check_left()
        stranger = self._left.stranger(self.parameters)
        if stranger is not None:
            raise RuntimeError(
                f"{self.describe(stranger)} holds a .grad already, to which backward would add: "
                "call optimizer.zero_grad(set_to_none=True) first. "
                "To add up micro-batches, collect all of them before align(), "
                "or attach an AlignedAdamW"
            )
        if world_size() is not None:
            for parameter in self.parameters:
                check_not_sharded(parameter)

    def _abandon(self) -> None:
        """Drop the gradients of the block that raised."""
        self._clear_gradients()
        if self._passes[self._collecting]:
            # They may have been added to those of earlier blocks.
            self._broken = True
        else:
            self._collected.drop(self._collecting)

    def _clear_gradients(self) -> None:
        for parameter in self.parameters:
            parameter.grad = None

    @torch.no_grad()
    def _leave(self, latest: int = 0) -> None:
        """Leave in ``.grad`` what shows whether somebody drops or changes what was collected.

        That is a gradient of each parameter, of the loss `latest` where it has one. Where a
        GradScaler is expected, the smallest is a copy: GradScaler looks for values that are not
        finite in ``.grad`` alone.
        """
        if self._broken:
            return
        shown = list(self._collected.gradients[latest])
        for gradients in self._collected.gradients:
            for index, gradient in enumerate(gradients):
                if shown[index] is None:
                    shown[index] = gradient
        watched: list[int] = []
        if all(self._passes):
            watched = self._current_layout().watched
            if watched and self._optimizer() is not None and self._scaler_expected:
                shown[watched[0]] = self._with_overflow(shown[watched[0]])
        indices = [index for index, gradient in enumerate(shown) if gradient is not None]
        self._left.leave(
            [self.parameters[index] for index in indices],
            [shown[index] for index in indices],
            [shown[index] for index in watched],
        )

    def _with_overflow(self, gradient: Tensor) -> Tensor:
        """A copy of `gradient` for a GradScaler: NaN where anything collected is not finite."""
        self._marker_checked = True
        return gradient + self.overflow().to(gradient.dtype)

    def _check_left(self, *, written_by_scaler: bool = False) -> None:
        """Drop what was collected where ``zero_grad`` dropped what was left of it.

        Raises RuntimeError where what was left was changed.
        """
        message = (
            "a .grad was written to, replaced or set to None after its gradient had been "
            "collected, which does not change what the aligner holds: "
            "write to .grad inside the block of collect, clip with max_norm, "
            "or start the step over with zero_grad()"
        )
        fate = self._left.fate(written_by_scaler=written_by_scaler)
        if fate is Fate.CHANGED:
            raise RuntimeError(message)
        if fate is Fate.DROPPED:
            self._reset()
            self._dropped = True
        else:
            self._left.assert_values(message)

    def _check_nothing_else(self) -> None:
        stranger = self._left.stranger(self.parameters)
        if stranger is not None:
            raise RuntimeError(
                f"{self.describe(stranger)} holds a .grad that the aligner did not leave there, "
                "and which the optimizer would ignore: collect it in a block, "
                f"or add its loss to one of {', '.join(self.names)}"
            )

    def _check_whole(self) -> None:
        if self._broken:
            raise RuntimeError(
                "a pass raised after others of this step: start the step over with zero_grad()"
            )

    def _check_collected(self) -> None:
        self._check_whole()
        passes_of = dict(zip(self.names, self._passes, strict=True))
        missing = [name for name, passes in passes_of.items() if not passes]
        if missing and self._dropped:
            raise RuntimeError(
                f"no gradients of {', '.join(missing)} to align: they were dropped after they had "
                "been collected, by zero_grad or whatever else emptied .grad"
            )
        if missing:
            raise RuntimeError(
                f"no gradients of {', '.join(missing)} to align: "
                "run its backward pass inside `with aligner.collect(name):`"
            )

    def _check_reached(self, layout: Layout) -> None:
        if self.module is not None and any(map(self._is_unknown, parameters_inside(self.module))):
            named = self.module.named_parameters()
            unknown = next(name for name, parameter in named if self._is_unknown(parameter))
            raise RuntimeError(
                f"a loss reached {plain_name(unknown)}, "
                "which is not among the aligner's parameters: it joined the module or was "
                "replaced (as by load_state_dict(assign=True)) after the aligner was made. "
                "Make a new aligner and a new optimizer"
            )
        if not layout.indices:
            raise RuntimeError(
                f"no loss reached any of the aligner's {len(self.parameters)} parameters: "
                "if the model has others now (as after load_state_dict(assign=True)), "
                "make a new aligner and a new optimizer"
            )

    def _is_unknown(self, parameter: Tensor) -> bool:
        """Whether a loss reached `parameter`, which is not the aligner's."""
        return parameter.grad is not None and id(parameter) not in self._known

    def _check_one_reducer(self) -> None:
        """Raise RuntimeError where data parallelism would reduce one of several backward passes."""
        processes = world_size()
        if processes is None:
            return
        if processes == 1:
            if self._data_parallel is None:
                self._data_parallel = is_data_parallel(self.parameters)
            if not self._data_parallel:
                return
        last_call = "aligner.align()" if self._optimizer() is None else "optimizer.step()"
        running = "process is" if processes == 1 else "processes are"
        raise RuntimeError(
            "backward runs several backward passes over one graph, "
            "of which DistributedDataParallel reduces but one, "
            f"and {processes} {running} running. "
            "Run a forward pass for each loss, through the wrapper, "
            "and its backward pass inside `with aligner.collect(name):`, "
            f"then call {last_call}. "
            "Where a loss does not reach every parameter, wrap with find_unused_parameters=True; "
            "with Accelerate's gradient accumulation, also pass "
            "GradientAccumulationPlugin(num_steps=..., sync_each_batch=True)"
        )

    def _current_layout(self) -> Layout:
        key = (self._collected.present(), len(self._group_rows))
        if self._layout is None or self._layout.key != key:
            self._layout = Layout.of(key, self._groups, self.parameters)
        return self._layout

    def _tensor_grams(
        self, layout: Layout, everything: bool
    ) -> tuple[Tensor, list[int], list[int]]:
        """Gram matrices [T, n, n], the groups of these T tensors, and the row of every parameter.

        The tensors are what is aligned, or `everything`. Without `everything` the row T is that of
        what is not aligned.
        """
        indices, groups, rows = layout.aligned, layout.aligned_groups, layout.rows
        if everything:
            indices, groups, rows = layout.indices, layout.groups, layout.places
        if indices:
            return self._grams.matrices(indices, self._collected.of), groups, rows
        n, device = len(self.names), self.parameters[0].device
        return torch.zeros(0, n, n, dtype=torch.float64, device=device), groups, rows

    def _row_of_weights(self, device: torch.device) -> Tensor:
        if self._weight_row is None or self._weight_row.device != device:
            self._weight_row = torch.tensor([self._weights], dtype=torch.float64, device=device)
        return self._weight_row

    def _coefficients(self, gram: Tensor) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
        """Coefficients, cosine, alpha and norms of the groups' Gram matrices."""
        norms = gram.diagonal(dim1=1, dim2=2).sqrt()
        if self._rule is None:
            return *alignment_coefficients_operator(gram, self._weights, self._power), norms
        products = norms[:, :, None] * norms[:, None, :]
        cosine = gram / norms[:, :, None] / norms[:, None, :]
        cosine = torch.where(products == 0, 0.0, cosine).clamp(-1, 1)
        if len(self.names) == 2:
            cosine = cosine[:, 0, 1]
        dtype = least_accurate_dtype(itertools.chain(*self._collected.gradients))
        return self._rule(gram, dtype), cosine, None, norms

    def _reset(self) -> None:
        self._collected.clear()
        self._passes = [0] * len(self.names)
        # Whether gradients of a pass that raised have been added to others.
        self._broken = False
        self._dropped = False
        # Whether the gradient that was left tells a GradScaler if all is finite.
        self._marker_checked = False
        self._grams.clear()
        self._left.take_back()

    def _assign_groups(self) -> None:
        """Give the parameters that require a gradient for the first time their rows."""
        for index, parameter in enumerate(self.parameters):
            if self._groups[index] is not None or not parameter.requires_grad:
                continue
            if parameter.dtype not in DTYPES:
                raise TypeError(
                    f"{self.describe(index)} must be float32, bfloat16, float16 or float64, "
                    f"got {parameter.dtype}"
                )
            key = self._group_key(index)
            if not isinstance(key, Hashable):
                raise TypeError(
                    "groups must return a hashable key or None, "
                    f"got {type(key).__name__} for {self.describe(index)}"
                )
            if key is None:
                self._groups[index] = -1
            else:
                self._groups[index] = self._group_rows.setdefault(key, len(self._group_rows))


def check_max_norm(max_norm: float | None) -> float | None:
    """Check that `max_norm` is None or a positive number."""
    if max_norm is not None:
        check_number(max_norm, "max_norm")
        if not max_norm > 0:
            raise ValueError(f"max_norm must be positive or None, got {max_norm}")
    return max_norm


def _default_weights(is_genrep: bool, n: int) -> tuple[float, ...]:
    """GenRep's weights are its paper's; the papers of all other rules sum losses."""
    return (0.7, 0.3) if is_genrep and n == 2 else (1.0,) * n
