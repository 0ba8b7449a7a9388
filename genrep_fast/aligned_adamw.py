"""AdamW that takes the gradients of several losses from a `GradientAligner` instead of ``.grad``."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple, NoReturn

import torch
from torch import Tensor

from .gradient_aligner import Combination, GradientAligner, check_max_norm
from .ops.alignment import check_length, check_tensor, check_writable
from .ops.optimizer import adamw_step_operator, check_ema_decay, check_hyperparameters, check_learning_rate

# What torch.optim.AdamW keeps in a parameter group besides its hyperparameters. None of it changes anything here.
_ADAMW_FLAGS = {
    "amsgrad": False,
    "maximize": False,
    "foreach": None,
    "capturable": False,
    "differentiable": False,
    "fused": None,
    "decoupled_weight_decay": True,
}


class AlignedAdamW(torch.optim.Optimizer):
    """AdamW (Loshchilov and Hutter, ICLR 2019) on the aligned gradient, and a moving average of the parameters, in one pass over memory.

    ``step()`` combines the gradients that the aligner collected and applies them: what ``aligner.align(max_norm)``, `torch.optim.AdamW`
    and ``ema.lerp_(param, 1 - ema_decay)`` do one after the other, without writing the combined gradient. Statistics are in
    ``aligner.stats``. A parameter that no loss reached is left alone, with its state and its average.

    State dicts are those of `torch.optim.AdamW` and load both ways; the averages are not in them. With a GradScaler, ``scaler.step``
    works and ``scaler.unscale_`` does not: `max_norm` clips, in unscaled units. Between the collection and the step one parameter's
    ``.grad`` holds a copy of a gradient, for a GradScaler to look at and for nothing else.

    Args:
        params: parameters, named parameters or groups of them, as `torch.optim.AdamW` takes them; all of the aligner's.
        lr: learning rate, a number or a tensor without axes. A CUDA graph keeps the number of its capture: to change the rate between
            replays, give a tensor on the parameters' device.
        betas, eps, weight_decay: as in `torch.optim.AdamW`.
        aligner: GradientAligner, which from now on keeps gradients for this optimizer.
        ema: tensors to follow the parameters, in the order of `params`; or a module with the same parameter names; None for none.
        ema_decay: share of the old average that is kept, 0 to 1; the attribute ``ema_decay`` may be set between steps, but not through the
            wrappers of Accelerate and Lightning: ``optimizer.optimizer.ema_decay`` there.
        max_norm: shorten the gradient to this norm where it is longer (see `GradientAligner.align`); also an attribute.

    Raises:
        TypeError, ValueError: for hyperparameters out of range, ``amsgrad`` or ``maximize`` in a group, a parameter that the aligner does
            not have, and averages that do not fit their parameters.
    """

    _step_supports_amp_scaling = True  # GradScaler: step() takes grad_scale and found_inf

    def __init__(
        self,
        params: Iterable,
        lr: float | Tensor = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        *,
        aligner: GradientAligner,
        ema: Sequence[Tensor] | torch.nn.Module | None = None,
        ema_decay: float = 0.999,
        max_norm: float | None = None,
    ):
        if not isinstance(aligner, GradientAligner):
            raise TypeError(f"aligner must be a GradientAligner, got {type(aligner).__name__}")
        self.aligner, self.ema_decay, self.max_norm = aligner, check_ema_decay(ema_decay), check_max_norm(max_norm)
        self._index = {id(parameter): index for index, parameter in enumerate(aligner.parameters)}
        self._emas: dict[int, Tensor] | None = None
        self._members: tuple[list[int], list[_Members]] | None = None
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, **_ADAMW_FLAGS})
        if ema is not None:
            self._emas = self._averages(ema)
        aligner.attach(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group as `torch.optim.Optimizer.add_param_group` does; its parameters must be the aligner's."""
        super().add_param_group(param_group)
        try:
            self._check_group(self.param_groups[-1])
        except BaseException:
            self.param_groups.pop()
            raise
        self._members = None

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load the state of an `AlignedAdamW` or a `torch.optim.AdamW`.

        Raises:
            ValueError: for ``amsgrad`` or ``maximize``, and for a state of another shape than its parameter; nothing is changed then.
        """
        for group in state_dict["param_groups"]:
            _check_flags(group)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=False):  # of different lengths: torch's own message
            for name in ("exp_avg", "exp_avg_sq"):
                tensor = state_dict["state"].get(number, {}).get(name, parameter)
                check_tensor(tensor, f"{name} of {self.aligner.describe(self._index[id(parameter)])}", parameter.shape, None)
        super().load_state_dict(state_dict)

    def state_dict(self) -> dict[str, Any]:
        """The state as `torch.optim.AdamW` keeps it: step counters are on the CPU unless a group is ``fused`` or ``capturable``."""
        state_dict = super().state_dict()
        for group in state_dict["param_groups"]:
            for number in group["params"]:
                values = state_dict["state"].get(number)
                if values and not (group["fused"] or group["capturable"]):
                    state_dict["state"][number] = {**values, "step": values["step"].cpu()}
        return state_dict

    def __reduce_ex__(self, protocol: int) -> NoReturn:
        raise TypeError("an AlignedAdamW, which belongs to its aligner, cannot be copied or pickled: load its state_dict() into a new one")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:
            for flag, value in _ADAMW_FLAGS.items():
                group.setdefault(flag, value)
            for parameter in group["params"]:
                values = self.state.get(parameter)
                if values:
                    values["step"] = torch.as_tensor(values["step"], dtype=torch.float32, device=parameter.device)

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
            RuntimeError: where a loss has not been collected, a parameter that a loss reached is not of this optimizer, another optimizer
                has been attached to the aligner, or ``.grad`` was unscaled or clipped.
        """
        result = None
        if closure is not None:
            with torch.enable_grad():
                result = closure()
        found_inf = getattr(self, "found_inf", None)  # set by GradScaler
        grad_scale = getattr(self, "grad_scale", None)
        self._check_step(grad_scale, found_inf)
        combination = self.aligner.combination(self.max_norm, grad_scale)
        members_of_groups = self._members_of_groups(combination)
        if found_inf is not None:
            found_inf = found_inf.to(combination.coefficients.device)
            if not self.aligner.marker_checked:
                found_inf = found_inf + self.aligner.overflow().isnan()
        for group, members in zip(self.param_groups, members_of_groups, strict=True):
            if members.indices:
                self._update(group, members, combination.coefficients, found_inf)
        self.aligner.finish(scaler_used=found_inf is not None)
        return result

    def _update(self, group: dict[str, Any], members: _Members, coefficients: Tensor, found_inf: Tensor | None) -> None:
        states = [self._state(parameter) for parameter in members.params]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, 1.0 if found_inf is None else [(found_inf == 0).to(steps[0])] * len(steps))
        lr = group["lr"]
        adamw_step_operator(
            members.params,
            [state["exp_avg"] for state in states],
            [state["exp_avg_sq"] for state in states],
            members.emas,
            [gradients[index] for gradients in self.aligner.gradients for index in members.indices],
            coefficients,
            members.rows,
            [],
            steps,
            lr if isinstance(lr, Tensor) else torch.tensor(lr, dtype=torch.float64),
            *group["betas"],
            group["eps"],
            group["weight_decay"],
            self.ema_decay,
            found_inf,
        )

    def _state(self, parameter: Tensor) -> dict[str, Tensor]:
        state = self.state[parameter]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32, device=parameter.device)
            state["exp_avg"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            state["exp_avg_sq"] = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        return state

    def _check_step(self, grad_scale: Tensor | None, found_inf: Tensor | None) -> None:
        if not self.aligner.attached(self):
            raise RuntimeError("another AlignedAdamW has been attached to the aligner since, which keeps gradients for that one")
        if found_inf is not None and grad_scale is None:
            raise RuntimeError("scaler.unscale_ does not reach the gradients that the aligner holds: leave it out, and clip with max_norm")
        if found_inf is None and self.aligner.marker_changed:
            raise RuntimeError("a .grad was written to, which does not change the gradients that the aligner holds: clip with max_norm")
        check_ema_decay(self.ema_decay)
        for group in self.param_groups:
            self._check_hyperparameters(group)

    def _check_hyperparameters(self, group: dict[str, Any]) -> None:
        _check_flags(group)
        check_learning_rate(group["lr"], self.aligner.parameters[0].device)
        check_hyperparameters(group["betas"], group["eps"], group["weight_decay"])

    def _members_of_groups(self, combination: Combination) -> list[_Members]:
        """For each parameter group what `combination` says of it; as long as the same parameters are reached, the same list."""
        if self._members is None or self._members[0] is not combination.rows:
            places = {index: place for place, index in enumerate(combination.indices)}
            members = []
            for group in self.param_groups:
                indices = [self._index[id(parameter)] for parameter in group["params"]]
                indices = [index for index in indices if index in places]
                params = [self.aligner.parameters[index] for index in indices]
                emas = [] if self._emas is None else [self._emas[index] for index in indices]
                members.append(_Members(indices, params, emas, [combination.rows[places.pop(index)] for index in indices]))
            if places:
                name = self.aligner.describe(min(places))
                raise RuntimeError(f"{name} was reached by a loss, but is in no parameter group of this optimizer")
            self._members = (combination.rows, members)
        return self._members[1]

    def _check_group(self, group: dict[str, Any]) -> None:
        self._check_hyperparameters(group)
        for position, parameter in enumerate(group["params"]):
            if id(parameter) not in self._index:
                name = group.get("param_names", {position: f"params[{position}]"})[position]
                raise ValueError(f"{name} must be one of the aligner's parameters, got another tensor of shape {tuple(parameter.shape)}")
        if self._emas is not None:
            raise ValueError("parameter groups cannot be added to an AlignedAdamW with averages")

    def _averages(self, ema: Sequence[Tensor] | torch.nn.Module) -> dict[int, Tensor]:
        """The average of each of the optimizer's parameters, by the aligner's index."""
        params = [parameter for group in self.param_groups for parameter in group["params"]]
        indices = [self._index[id(parameter)] for parameter in params]
        if isinstance(ema, torch.nn.Module):
            named = dict(ema.named_parameters())
            names = [self.aligner.parameter_names[index] for index in indices]
            missing = [self.aligner.describe(index) for index, name in zip(indices, names, strict=True) if name not in named]
            if missing:
                raise ValueError(f"ema must be a module with the parameter names of the aligner, got none called {missing[0]}")
            tensors = [named[name].detach() for name in names]
        else:
            check_length(ema, "ema", len(params))
            names, tensors = range(len(params)), ema
        for name, tensor, parameter in zip(names, tensors, params, strict=True):
            check_writable(tensor, f"ema[{name}]", parameter.shape, parameter.device)
            if tensor.is_set_to(parameter):
                raise ValueError(f"ema[{name}] must be a copy of its parameter, got the parameter")
        return dict(zip(indices, tensors, strict=True))


class _Members(NamedTuple):
    """The parameters of a group that some loss reached."""

    indices: list[int]  # in the aligner's parameters
    params: list[Tensor]
    emas: list[Tensor]  # or none
    rows: list[int]  # of the coefficients


def _check_flags(group: dict[str, Any]) -> None:
    for flag in ("amsgrad", "maximize"):
        if group.get(flag):
            raise ValueError(f"AlignedAdamW does not implement {flag}, got {flag}={group[flag]}")
