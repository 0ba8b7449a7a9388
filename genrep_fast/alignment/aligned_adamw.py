"""AdamW that takes the gradients of several losses from a `GradientAligner`, not ``.grad``."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn, SupportsIndex

import torch
from torch import Tensor

from ..checks import check_ema_decay, check_max_norm
from ..ops.optimizer import adamw_step_operator
from .adamw_state import check_group_options, checked_copy, counters_of_adamw
from .aligner import GradientAligner
from .averages import Averages
from .collected import Collected
from .sharded_tensors import local_part, local_parts
from .step_counters import StepCounters


class AlignedAdamW(torch.optim.Optimizer):
    """AdamW on the aligned gradient and an average of the parameters, in one pass over memory.

    AdamW is that of Loshchilov and Hutter, ICLR 2019. ``step()`` combines the gradients that the
    aligner collected and applies them: what ``aligner.align(max_norm)``, `torch.optim.AdamW` and
    ``ema.lerp_(param, 1 - ema_decay)`` do one after the other, without writing the combined
    gradient. Statistics are in ``aligner.stats``. A parameter that no loss reached is left alone,
    with its state; its average goes on following it.

    State dicts are those of `torch.optim.AdamW` and load both ways; the averages are not in them.
    Of parameters that are DTensors, ``exp_avg`` and ``exp_avg_sq`` are such DTensors, which
    `torch.distributed.checkpoint` saves and shards anew.
    With a GradScaler, ``scaler.step`` works and ``scaler.unscale_`` does not: `max_norm` clips, in
    unscaled units. Between the collection and the step ``.grad``
    shows the gradients of the loss that was collected last, for a GradScaler and whoever else looks
    at them: to write to one, replace it or set it to None is an error that ``step()`` raises.

    Args:
        params: parameters, named parameters or groups of them, as `torch.optim.AdamW` takes them;
            all of the aligner's.
        lr: learning rate, a number or a tensor of one element on the parameters' device or the CPU.
            A CUDA graph keeps the number of its capture: to change the rate between replays, give a
            tensor on the parameters' device.
        betas, eps, weight_decay: as in `torch.optim.AdamW`; betas may be tensors of one element on
            the CPU.
        aligner: GradientAligner, which from now on keeps gradients for this optimizer.
        ema: what follows the parameters, in float32 or float64, shapes as theirs, in memory of its
            own, sharded as they are. Tensors in the order of `params`; a module with the aligner's
            parameter names, inside of wrappers or not, whose buffers are copied from the module of
            which the aligner was made; an AveragedModel of `torch.optim.swa_utils`, which is
            updated as its ``update_parameters`` does it, the first time by copying; or diffusers'
            EMAModel, as its ``step`` does it. None for none. It is read at every step, and the
            attribute ``ema`` may be set between steps. With a GradScaler the counters of the last
            two make a step wait for the device.
        ema_decay: share of the old average that is kept, 0 to 1; None for what an AveragedModel or
            EMAModel has itself, else 0.999. The attribute ``ema_decay`` may be set between steps,
            but not through the wrappers of Accelerate and Lightning:
            ``optimizer.optimizer.ema_decay`` there.
        max_norm: shorten the gradient to this norm where it is longer (see
            `GradientAligner.align`); also an attribute.
        foreach, fused, capturable: accepted, as they ask for what this step is; they only decide
            where `torch.optim.AdamW`, which loads a state dict of this optimizer, keeps its
            counters.
        amsgrad, maximize, differentiable: False; nothing else is implemented.

    Raises:
        TypeError, ValueError: for hyperparameters out of range, ``amsgrad``, ``maximize`` or
            ``differentiable``, a parameter that the aligner does not have or that is given twice,
            and averages that do not fit their parameters, are missing, or share memory.
    """

    # GradScaler: step() takes grad_scale and found_inf.
    _step_supports_amp_scaling = True

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        *,
        aligner: GradientAligner,
        ema: Sequence[Tensor] | torch.nn.Module | Any | None = None,
        ema_decay: float | None = None,
        max_norm: float | None = None,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ):
        if not isinstance(aligner, GradientAligner):
            raise TypeError(f"aligner must be a GradientAligner, got {type(aligner).__name__}")
        if not isinstance(params, Iterable):
            raise TypeError(
                "params must be parameters, named parameters or groups of them, "
                f"got {type(params).__name__}"
            )
        self.aligner, self.max_norm = aligner, check_max_norm(max_norm)
        self.ema_decay = _check_decay(ema_decay)
        self._index = {id(parameter): index for index, parameter in enumerate(aligner.parameters)}
        self._averages: Averages | None = None
        self._ema: Any = None
        self._partition: _Partition | None = None
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            "amsgrad": amsgrad,
            "maximize": maximize,
            "foreach": foreach,
            "capturable": capturable,
            "differentiable": differentiable,
            "fused": fused,
            "decoupled_weight_decay": True,
        }
        super().__init__(params, defaults)
        self.ema = ema
        aligner.attach(self)

    @property
    def ema(self) -> Any:
        """What follows the parameters, as it was given; None for nothing."""
        return self._ema

    @ema.setter
    def ema(self, ema: Any) -> None:
        self._averages = None if ema is None else Averages(ema, self._all_params(), self.aligner)
        self._ema = ema

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """As `torch.optim.Optimizer.add_param_group`; the parameters must be the aligner's."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
            if self._averages is not None:
                self._averages.require(self.param_groups[-1]["params"])
        except BaseException:
            self.param_groups.pop()
            raise
        self._partition = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a copy of a state of an `AlignedAdamW` or `torch.optim.AdamW`, after the pre-hooks.

        Raises:
            ValueError: for groups of other sizes, hyperparameters that are missing or out of range,
                flags that are not implemented, and a state that lacks something, has impossible
                values or does not fit its parameter; nothing is changed then.
        """

        def check(optimizer: torch.optim.Optimizer, loaded: dict[str, Any]) -> dict[str, Any]:
            names = [self.aligner.describe(self._index[id(each)]) for each in self._all_params()]
            return checked_copy(optimizer, loaded, names, self.aligner.parameters[0].device)

        # The last of the hooks: what it checks is what is loaded.
        handle = self.register_load_state_dict_pre_hook(check)
        try:
            # Tensors of inference mode could not be written to outside of it.
            with torch.inference_mode(False):
                super().load_state_dict(state_dict)
        finally:
            handle.remove()

    def state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.AdamW` keeps it.

        Step counters are on the CPU unless a group is ``fused`` or ``capturable``.
        """
        # The first of the hooks: others get what torch.optim.AdamW would give them.
        handle = self.register_state_dict_post_hook(counters_of_adamw, prepend=True)
        try:
            return super().state_dict()
        finally:
            handle.remove()

    def __reduce_ex__(self, protocol: SupportsIndex) -> NoReturn:
        raise TypeError(
            "an AlignedAdamW, which belongs to its aligner, cannot be copied or pickled: "
            "load its state_dict() into a new one"
        )

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            # Old state dicts lack the newer ones.
            for flag, value in self.defaults.items():
                group.setdefault(flag, value)
            for parameter in group["params"]:
                values = self.state.get(parameter)
                if not values:
                    continue
                step, device = values["step"], parameter.device
                step = torch.as_tensor(step, dtype=torch.float32, device=device)
                values["step"] = step.reshape(())

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Drop everything that the aligner collected, and every ``.grad``."""
        super().zero_grad(set_to_none)
        self.aligner.zero_grad()

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Update the parameters, and their averages, with the gradients that the aligner collected.

        Args:
            closure: runs the losses' backward passes (``aligner.backward`` or ``aligner.collect``).

        Returns:
            What the closure returns; None without one.

        Raises:
            RuntimeError: where a loss has not been collected, no loss reached a parameter or one
                reached a parameter that is not of this optimizer, another optimizer has been
                attached to the aligner, or ``.grad`` was touched since the collection. Where
                nothing was collected, every learning rate is 0 and every ``.grad`` is zero, as
                `torch.distributed.checkpoint` has it to make an optimizer allocate its state, that
                is done and nothing else.
            TypeError, ValueError: for hyperparameters and averages that were changed to what the
                constructor refuses, and for an AveragedModel whose function is no weighted mean;
                nothing is changed then.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        # Both set by GradScaler.
        found_inf = getattr(self, "found_inf", None)
        grad_scale = getattr(self, "grad_scale", None)
        self._check_step(grad_scale, found_inf)
        if self.aligner.empty and self._only_allocates():
            return result
        collected = self.aligner.hand_over(self.max_norm, grad_scale)
        members_of_groups = self._members_of_groups(collected)
        reached = {index for members in members_of_groups for index in members.indices}
        averages, decay = {}, 0.0
        if self._averages is not None:
            averages, decay = self._averages.tensors(), self._averages.decay(self.ema_decay)
            if not reached <= averages.keys():
                self._averages.require([self.aligner.parameters[index] for index in reached])
        # Where nothing is kept of the old averages, copying is exact.
        moved = averages if decay > 0 else {}
        if found_inf is not None:
            found_inf = found_inf.to(collected.coefficients.device)
            if not self.aligner.marker_checked:
                found_inf = found_inf + self.aligner.overflow().isnan()
        for group, members in zip(self.param_groups, members_of_groups, strict=True):
            if members.indices:
                self._update(group, members, collected, moved, decay, found_inf)
        if self._averages is not None:
            done = reached if moved else set()
            self._averages.follow(averages, done, self._trained, decay, found_inf)
            self._averages.advance(decay, found_inf)
        self.aligner.finish(scaler_used=found_inf is not None)
        return result

    def _update(
        self,
        group: dict[str, Any],
        members: _Members,
        collected: Collected,
        averages: dict[int, Tensor],
        ema_decay: float,
        found_inf: Tensor | None,
    ) -> None:
        states = [self._state(parameter) for parameter in members.params]
        steps = members.counters.count(states, found_inf)
        lr = group["lr"]
        lr = lr.reshape(()) if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64)
        params = members.params
        exp_avgs = [state["exp_avg"] for state in states]
        exp_avg_sqs = [state["exp_avg_sq"] for state in states]
        if self.aligner.sharded:
            params, exp_avgs, exp_avg_sqs = map(local_parts, (params, exp_avgs, exp_avg_sqs))
        adamw_step_operator(
            params,
            exp_avgs,
            exp_avg_sqs,
            [averages[index] for index in members.indices] if averages else [],
            [gradients[index] for gradients in collected.gradients for index in members.indices],
            collected.coefficients,
            members.rows,
            [],
            steps,
            lr,
            *map(float, group["betas"]),
            group["eps"],
            group["weight_decay"],
            ema_decay,
            found_inf,
        )

    def _trained(self) -> set[int]:
        """Indices of the parameters with a state; hooks may keep others' state there."""
        with_state = [parameter for parameter, state in self.state.items() if state]
        indices = (self._index.get(id(parameter)) for parameter in with_state)
        return {index for index in indices if index is not None}

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if state:
            return state
        # Tensors of inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _only_allocates(self) -> bool:
        """Whether the step is for allocating state alone, which is done then."""
        params = [parameter for parameter in self._all_params() if parameter.grad is not None]
        if not params or any(float(group["lr"]) != 0 for group in self.param_groups):
            return False
        gradients = (parameter.grad for parameter in params)
        if any(grad is not None and local_part(grad).any() for grad in gradients):
            return False
        for parameter in params:
            self._state(parameter)
        return True

    def _check_step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if not self.aligner.attached(self):
            raise RuntimeError(
                "another AlignedAdamW has been attached to the aligner since, "
                "which keeps gradients for that one"
            )
        if found_inf is not None and grad_scale is None:
            raise RuntimeError(
                "scaler.unscale_ does not reach the gradients that the aligner holds: "
                "leave it out, and clip with max_norm"
            )
        _check_decay(self.ema_decay)
        for group in self.param_groups:
            check_group_options(group, self.aligner.parameters[0].device)

    def _all_params(self) -> list[Tensor]:
        return [parameter for group in self.param_groups for parameter in group["params"]]

    def _members_of_groups(self, collected: Collected) -> list[_Members]:
        """For each parameter group what was collected for it; kept as long as it is the same."""
        groups = [list(group["params"]) for group in self.param_groups]
        if self._partition is None or not self._partition.is_of(collected.rows, groups):
            members = self._new_members(collected, groups)
            self._partition = _Partition(collected.rows, groups, members)
        return self._partition.members

    def _new_members(self, collected: Collected, groups: list[list[Tensor]]) -> list[_Members]:
        rows = dict(zip(collected.indices, collected.rows, strict=True))
        partition = []
        for group in groups:
            members = _Members([], [], [], StepCounters())
            for parameter in group:
                index = self._index[id(parameter)]
                if index in rows:
                    members.indices.append(index)
                    members.params.append(parameter)
                    members.rows.append(rows.pop(index))
            partition.append(members)
        if rows:
            name = self.aligner.describe(min(rows))
            raise RuntimeError(
                f"{name} was reached by a loss, but is in no parameter group of this optimizer"
            )
        return partition

    def _check_group(self, group: dict[str, Any]) -> None:
        check_group_options(group, self.aligner.parameters[0].device)
        seen: set[int] = set()
        for position, parameter in enumerate(group["params"]):
            name = group.get("param_names", {position: f"params[{position}]"})[position]
            if id(parameter) not in self._index:
                raise ValueError(
                    f"{name} must be one of the aligner's parameters, "
                    f"got another tensor of shape {tuple(parameter.shape)}"
                )
            if id(parameter) in seen:
                raise ValueError(
                    f"{name} must be another parameter than those before it, got one of them twice"
                )
            seen.add(id(parameter))
        if self._averages is not None and self._averages.fixed:
            raise ValueError(
                "parameter groups cannot be added to an AlignedAdamW whose averages are tensors: "
                "set its ema to None first"
            )


class _Members(NamedTuple):
    """The parameters of a group that some loss reached."""

    # In the aligner's parameters.
    indices: list[int]
    params: list[Tensor]
    # Of the coefficients.
    rows: list[int]
    counters: StepCounters


class _Partition(NamedTuple):
    """What was collected, group by group, and the rows and parameter groups that it was made of."""

    rows: list[int]
    groups: list[list[Tensor]]
    members: list[_Members]

    def is_of(self, rows: list[int], groups: list[list[Tensor]]) -> bool:
        """Whether it was made of the same rows and groups."""
        return self.rows is rows and _are_same(self.groups, groups)


def _are_same(one: list[list[Tensor]], other: list[list[Tensor]]) -> bool:
    """Whether both hold the same tensors."""
    if [len(group) for group in one] != [len(group) for group in other]:
        return False
    return all(map(operator.is_, itertools.chain(*one), itertools.chain(*other)))


def _check_decay(ema_decay: float | None) -> float | None:
    return None if ema_decay is None else check_ema_decay(ema_decay)
