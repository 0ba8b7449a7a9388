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
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from typing import Any, NoReturn, SupportsIndex, cast

import torch
from torch import Tensor

from ..checks import check_flag, check_max_norm, check_weights
from ..ops.alignment import combine_operator
from .collected import Collected, CollectedGradients
from .data_parallel.choice import strategy_for
from .groups import ParameterGroups, check_names, check_not_flattened, label, named_parameters
from .layout import Layout, LayoutKey
from .left_gradients import Fate, LeftGradients
from .passes import Passes
from .rules import default_weights, resolve_rule
from .tensor_coefficients import AlignerStats, TensorCoefficients
from .wrappers import check_no_stranger, unwrapped, world_size


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
            or float64, on one device; DTensors too (FSDP2, HSDP, tensor parallelism). Names come
            without what torch.compile, DistributedDataParallel, DataParallel, AveragedModel and
            Lightning Fabric put before them.
        names: of the n losses, 2 to 8.
        weights: n numbers, one a loss; None: (0.7, 0.3) for the rule "genrep" and ones for every
            other. Of all rules, "genrep" alone uses them for parameters that are aligned.
        power: damping exponent of the rule "genrep", >= 0; 0 gives the plain weighted sum.
        groups: "all" (one group), "tensor" (each parameter is one), "block" (a name up to its first
            number, "blocks.3" for "blocks.3.norm.weight", or its module where it has no number), or
            a function from a parameter's name to a key (None: no group).
        rule: a name in `genrep_fast.rules.RULES`, a function from Gram matrices [groups, n, n] to
            coefficients [groups, n], both of float64, or a Weighting of TorchJD.
        flat: copy the gradients of a loss into one contiguous buffer, group by group. It costs
            the copies, and buffers that stay allocated.
        process_group: of processes that train the same parameters, each with its part of a batch,
            without DistributedDataParallel or with several. None: that of the
            DistributedDataParallel that `params` are; without one, gradients are taken as they are.
        reduce: how gradients are averaged. "no_sync": by all-reduces in `align` or the optimizer's
            step, with DistributedDataParallel's own switched off as long as the aligner lives.
            "sharded": likewise, in shards, with three quarters of the bytes. "hook": by
            DistributedDataParallel in every backward pass, with a communication hook that computes
            Gram matrices. "auto": "no_sync". See docs/distributed.md.

    Attributes:
        stats: AlignerStats of the last alignment, by `align`, `backward` or an `AlignedAdamW`'s
            ``step``; None before the first.
        parameters, parameter_names: lists of the parameters, and of their names (None where they
            have none).
        module: the module that `params` is, without its wrappers; None where it is none.
        sharded: whether some of the parameters are DTensors.

    Raises:
        TypeError: for an argument of a wrong type, or a parameter of a wrong dtype.
        ValueError: for a wrong value, and where `groups` needs names that parameters do not have.
            For a `reduce` that needs what `params` are not.
        RuntimeError: for parameters that FSDP1 has flattened or that FSDP2 has gathered.
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
        process_group: torch.distributed.ProcessGroup | None = None,
        reduce: str = "auto",
    ):
        self.names = check_names(names)
        check_flag(flat, "flat")
        is_genrep = isinstance(rule, str) and rule == "genrep"
        self.weights = default_weights(rule, len(self.names)) if weights is None else weights
        self.module = unwrapped(params) if isinstance(params, torch.nn.Module) else None
        source = params if self.module is None else self.module
        self.parameters, self.parameter_names = named_parameters(source)
        self._known = {id(parameter) for parameter in self.parameters}
        self.stats: AlignerStats | None = None
        resolved = resolve_rule(rule, self.weights, power, len(self.names))
        self._groups = ParameterGroups(self.parameters, self.parameter_names, groups)
        self._passes = Passes(self.names)
        self._parallel = strategy_for(
            params, self.parameters, self.names, self._passes, process_group, reduce
        )
        flat = self._parallel.flat(flat)
        self._collected = CollectedGradients(
            self.parameters, self.parameter_names, len(self.names), flat=flat
        )
        # GenRep's operator has statistics, too.
        own_rule = None if is_genrep else resolved
        self.sharded = any(self._collected.sharded)
        self._coefficients = TensorCoefficients(
            len(self.names), own_rule, power, self._parallel.reduce_grams
        )
        alike = (rule, groups, str(float(power)))  # what processes must have so
        self._settings = [one if isinstance(one, str) else "" for one in alike]
        self._left = LeftGradients(self.parameters, self.parameter_names)
        self._layout: Layout | None = None
        # A weak reference.
        self._optimizer: Callable[[], torch.optim.Optimizer | None] = lambda: None
        self._scaler_expected = True
        # Whether the gradient that was left tells a GradScaler if all is finite.
        self._marker_checked = False
        # Whether zero_grad was called in the block.
        self._emptied = False

    @property
    def weights(self) -> tuple[float, ...]:
        """One a loss; a new sequence of n numbers may be set between two alignments."""
        return self._weights

    @weights.setter
    def weights(self, weights: Sequence[float]) -> None:
        self._weights = tuple(check_weights(weights, len(self.names)))

    @property
    def group_keys(self) -> list[Hashable]:
        """What the rows of the statistics stand for, in order of first appearance.

        "all", parameters' names or indices, or blocks.
        """
        return self._groups.keys

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
            RuntimeError: in several processes where the aligner knows neither a
                DistributedDataParallel nor a group; and as `collect` and `align`.
        """
        self._passes.check_losses(losses)
        self._passes.check_outside("backward")
        last_call = "aligner.align()" if self._optimizer() is None else "optimizer.step()"
        self._parallel.check_joint(last_call)
        self._check_free()
        before = list(self._passes.counts)
        try:
            for position, (name, loss) in enumerate(zip(self.names, losses, strict=True)):
                self._clear_gradients()
                retain_graph = position < len(losses) - 1
                with self._block(name):
                    self._parallel.arm(loss)
                    (backward or Tensor.backward)(loss, retain_graph=retain_graph)
        except BaseException:
            if not any(before):
                self._reset()
            elif self._passes.counts != before:
                self._passes.broken = True
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

        In several processes ``.grad`` is that of this process where the aligner averages itself
        (see `reduce`). Where a data-parallel wrapper does, the last block of each name must be one
        of which it averages the gradients: a forward pass for each loss, through the wrapper.
        There ``.grad`` holds what was collected in the blocks before.

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
        self._passes.check_outside(f"collect({name!r})")
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
                collected was dropped or written to since, the model was converted or moved since,
                or a loss reached parameters of the module that the aligner does not know.
            TypeError, ValueError: for a `max_norm` that is not a number, or not positive.
        """
        collected = self.hand_over(max_norm)
        if collected.combined:
            results = [cast(Tensor, collected.gradients[0][i]) for i in collected.indices]
        else:
            results = self._combine(collected)
        self._left.clear()
        for index, result in zip(collected.indices, results, strict=True):
            self.parameters[index].grad = result
        self.finish()
        # Of `hand_over`.
        assert self.stats is not None
        return self.stats

    def _combine(self, collected: Collected) -> list[Tensor]:
        """The aligned gradients, in the memory of the first loss's."""
        places = zip(self._current_layout().first_losses, collected.indices, strict=True)
        results = [self._collected.result(loss, index) for loss, index in places]
        gradients = self._collected.of(collected.indices)
        combine_operator(gradients, collected.coefficients, collected.rows, [], results)
        return self._collected.wholes(collected.indices, results)

    def zero_grad(self) -> None:
        """Drop everything that was collected, and set every parameter's ``.grad`` to None.

        Inside a block of `collect` that includes what the block has done; what it does afterwards
        counts.
        """
        self._reset()
        self._emptied = self._passes.collecting is not None
        self._clear_gradients()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
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
        return self._passes.empty

    def hand_over(self, max_norm: float | None, grad_scale: Tensor | None = None) -> Collected:
        """The collected gradients and their coefficients, divided by `grad_scale`.

        `max_norm` and the statistics are free of the scale. The gradients stay here until `finish`.
        """
        check_max_norm(max_norm)
        self._average(max_norm, grad_scale)
        layout = self._current_layout()
        if not layout.reached.indices:
            raise RuntimeError(
                f"no loss reached any of the aligner's {len(self.parameters)} parameters: "
                "if the model has others now (as after load_state_dict(assign=True)), "
                "make a new aligner and a new optimizer"
            )
        # The norm of the result takes the matrices of all that some loss reaches.
        tensors = layout.aligned if max_norm is None else layout.reached
        coefficients, self.stats = self._coefficients.rows(
            tensors,
            self._collected,
            layout.key.num_groups,
            self._weights,
            max_norm=max_norm,
            grad_scale=self._parallel.scaled(grad_scale),
        )
        indices = layout.reached.indices
        collected = Collected(self._collected.gradients, indices, tensors.rows, coefficients)
        if self._parallel.averages and grad_scale is not None:
            # While what was averaged is there.
            self.overflow()
        return self._parallel.whole(collected)

    def overflow(self) -> Tensor:
        """0 where all that was collected is finite, NaN otherwise; float64 without axes."""
        return self._coefficients.grams(self._current_layout().reached, self._collected).sum() * 0

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
        loss = self.names.index(name)
        self._left.take_back()
        self._coefficients.clear()
        self._groups.assign()
        if not any(self._passes.counts):
            self._collected.arrange(self._groups.of)
        self._parallel.begin(loss, self._collected, self._passes.others_are_complete(loss))
        self._passes.collecting = loss
        self._emptied = False
        if self._parallel.adds_up:
            self._collected.put_back(loss)
        try:
            yield
            self._parallel.end(loss, name, self._coefficients.tensor_grams)
            if self._emptied and all(parameter.grad is None for parameter in self.parameters):
                self._passes.dropped = True
            else:
                self._collected.take(loss)
                self._passes.counts[loss] += 1
                # What began to require a gradient in the block.
                self._groups.assign()
        except BaseException:
            self._clear_gradients()
            if self._passes.counts[loss]:
                # They may have been added to those of earlier blocks.
                self._passes.broken = True
            else:
                self._collected.drop(loss)
            raise
        finally:
            self._passes.collecting = None

    def _check_free(self) -> None:
        """Raise RuntimeError where ``.grad`` holds more than what was left there before a block."""
        self._passes.check_whole()
        self._check_left()
        self._left.check_alone(
            "already, to which backward would add: call optimizer.zero_grad(set_to_none=True) "
            "first. To add up micro-batches, collect all of them before align(), "
            "or attach an AlignedAdamW",
        )
        if world_size() is not None:
            check_not_flattened(self.parameters)

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
        if self._passes.broken:
            return
        shown = self._collected.one_of_each(latest)
        complete = all(self._passes.counts)
        watched = self._current_layout().watched if complete else []
        if complete and self._optimizer() is not None and self._scaler_expected:
            # NaN where anything collected is not finite.
            overflow = self.overflow()
            facts = self._facts("a block of collect")
            overflow = self._parallel.add_up(overflow, self._collected, facts)
            if watched:
                smallest = shown[watched[0]]
                shown[watched[0]] = smallest + overflow.to(smallest.dtype)
                self._marker_checked = True
        self._left.leave(
            [self.parameters[index] for index in shown],
            self._collected.wholes(shown, shown.values()),
            [shown[index] for index in watched],
        )

    def _check_left(self, *, written_by_scaler: bool = False) -> None:
        """Drop what was collected where ``zero_grad`` dropped what was left of it.

        Raises RuntimeError where what was left was changed.
        """
        if self._left.check(written_by_scaler=written_by_scaler) is Fate.DROPPED:
            self._reset()
            self._passes.dropped = True

    def _check_collected(self, grad_scale: Tensor | None) -> None:
        """Raise RuntimeError where what was collected cannot be aligned."""
        self._passes.check_outside("align" if self._optimizer() is None else "step")
        # A GradScaler writes to what was left when it looks for values that are not finite.
        self._check_left(written_by_scaler=grad_scale is not None)
        self._passes.check_complete()
        if self._optimizer() is not None:
            self._left.check_alone(
                "that the aligner did not leave there, and which the optimizer would ignore: "
                f"collect it in a block, or add its loss to one of {', '.join(self.names)}",
            )
        if self.module is not None:
            check_no_stranger(self.module, self._known)

    def _average(self, max_norm: float | None, grad_scale: Tensor | None) -> None:
        """Put what all processes collected in the place of what this one did."""
        try:
            self._check_collected(grad_scale)
        except RuntimeError:
            self._parallel.fail()
            raise
        facts = self._facts("the step", max_norm, grad_scale)
        self._parallel.agree(self._collected, facts)
        if self._parallel.averages:
            self._left.take_back()
            self._passes.averaged = True
            self._parallel.average(self._collected, self._coefficients.tensor_grams)

    def _facts(
        self, call: str, max_norm: float | None = None, grad_scale: Tensor | None = None
    ) -> tuple[object, ...]:
        """What all processes must have alike, as `data_parallel.agreement.FACTS` names it."""
        return call, (self.names, self._settings), self._weights, max_norm, grad_scale

    def _current_layout(self) -> Layout:
        key = LayoutKey(self._collected.present(), self._groups.number)
        if self._layout is None or self._layout.key != key:
            self._layout = Layout.of(key, self._groups.of, self.parameters)
        return self._layout

    def _reset(self) -> None:
        self._collected.clear()
        self._passes.clear()
        self._coefficients.clear()
        self._parallel.forget()
        self._marker_checked = False
        self._left.take_back()
