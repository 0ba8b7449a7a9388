"""The network of a pipeline with its encoded prompts, as the denoiser of a classifier."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..members import Members
from ..modules import eval_mode, execution_device
from .adapter import Adapter, text_device
from .distilled import refuse_distilled
from .prompts import Prompts, check_prompts, check_tokens
from .registry import adapter_of, family_of

# Prompts that go through the text encoders together.
_ENCODED = 16


class PipelineDenoiser:
    """``denoiser(x_t, t, rows)``, whose rows are the prompts, class by class, then the null prompt.

    Args:
        adapter: of the pipeline's family.
        family: the name of its class.
        prompts: checked.
        conditioning: what the network gets of them, tensors of one row a prompt.

    Attributes:
        members: the rows of each class.
        adapter, family, prompts, conditioning: as given.
    """

    def __init__(
        self, adapter: Adapter, family: str, prompts: Prompts, conditioning: dict[str, Tensor]
    ) -> None:
        self.adapter = adapter
        self.family = family
        self.prompts = prompts
        null_label = None if prompts.null is None else len(prompts.flat)
        self.members = Members(tuple(map(len, prompts.classes)), null_label)
        self.conditioning = conditioning

    @property
    def module(self) -> nn.Module:
        """The network."""
        return self.adapter.network

    def __call__(self, x_t: Tensor, timesteps: Tensor, rows: Tensor) -> Any:
        selected = {}
        for name, value in self.conditioning.items():
            if value.device != x_t.device:
                # Moved once, where the pipeline was moved.
                value = self.conditioning[name] = value.to(x_t.device)
            chosen = value[rows]
            selected[name] = chosen.to(x_t.dtype) if chosen.is_floating_point() else chosen
        return self.adapter.predict(x_t, timesteps, selected)


def denoiser_of_pipeline(pipe: Any, prompts: Any, null_prompt: Any) -> PipelineDenoiser:
    """Check a pipeline and prompts, and encode them.

    Raises:
        TypeError, ValueError: for a pipeline of another family or a distilled one, and for prompts
            that it cannot read.
    """
    family = family_of(pipe)
    adapter = adapter_of(pipe)
    refuse_distilled(pipe, adapter)
    checked = check_prompts(prompts, null_prompt, adapter)
    check_tokens(pipe, adapter, checked)
    return PipelineDenoiser(adapter, family, checked, _encoded(pipe, adapter, checked))


def _encoded(pipe: Any, adapter: Adapter, prompts: Prompts) -> dict[str, Tensor]:
    """What the network gets of each prompt, on its device."""
    names = [name for name in pipe.components if name.startswith("text_encoder")]
    encoders = [pipe.components[name] for name in names]
    device = text_device(pipe, tuple(names))
    target = execution_device(adapter.network)
    flat = prompts.flat
    parts = []
    with eval_mode(encoder for encoder in encoders if encoder is not None):
        for start in range(0, len(flat), _ENCODED):
            parts.append(adapter.encode(pipe, flat[start : start + _ENCODED], device))
        if prompts.null is not None:
            parts.append(adapter.encode_null(pipe, prompts.null, device))
    found = {name: torch.cat([part[name].to(target) for part in parts]) for name in parts[0]}
    for value in found.values():
        finite = value.flatten(1).isfinite().all(1) if value.ndim > 1 else value.isfinite()
        if not finite.all():
            bad = int((~finite).nonzero()[0])
            raise ValueError(
                "pipe must encode prompts to finite numbers, got NaN or infinity for "
                f"{prompts.where(bad)}: keep its text encoders in bfloat16 or float32"
            )
    return found
