"""Numbers of the updates of a group's parameters, which one addition counts on."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor


class StepCounters:
    """The ``step`` of parameters' states, as elements of one tensor.

    `torch.optim.AdamW` keeps a tensor of one element a parameter, and so do state dicts. Here each
    of them is a view of its own element: whoever reads or writes one finds what it found before,
    and all are counted on by one operation. Steps that somebody has replaced, as
    ``load_state_dict`` does, are moved into a new tensor.
    """

    def __init__(self) -> None:
        self._views: list[Tensor] = []
        self._numbers = torch.empty(0)

    def count(self, states: list[dict[str, Any]], found_inf: Tensor | None) -> list[Tensor]:
        """Add 1 to the step of each of `states`, but nothing where `found_inf` is not 0.

        Returns the steps, float32 tensors without axes.
        """
        steps = [state["step"] for state in states]
        if len(steps) != len(self._views) or not all(map(operator.is_, steps, self._views)):
            self._join(states, steps)
        if found_inf is None:
            self._numbers.add_(1.0)
        else:
            self._numbers.add_((found_inf.reshape(()) == 0).to(self._numbers))
        return self._views

    def _join(self, states: list[dict[str, Any]], steps: list[Tensor]) -> None:
        # Tensors of inference mode could not be written to outside of it.
        with torch.inference_mode(False), torch.no_grad():
            self._numbers = torch.stack(steps).float()
            self._views = list(self._numbers.unbind())
        for state, view in zip(states, self._views, strict=True):
            state["step"] = view
