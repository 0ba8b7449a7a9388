"""DiT: a transformer over class labels."""

from __future__ import annotations

import numbers
from typing import Any

import torch
from torch import Tensor

from ....checks import check_in_range
from .adapter import Adapter, Tokens


class DiT(Adapter):
    """DiTPipeline: prompts are names among `pipe.labels`, or the numbers of classes.

    The null prompt, which can only be "", is the label beyond the classes: 1000 of ImageNet.
    """

    text_encoders = ()

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        self._labels: dict[str, int] = dict(pipe.labels)

    def check_prompt(self, prompt: Any, where: str) -> Any:
        if isinstance(prompt, numbers.Integral) and not isinstance(prompt, bool):
            check_in_range(prompt, where, self._classes)
            return int(prompt)
        name = super().check_prompt(prompt, where)
        if name not in self._labels:
            raise ValueError(
                f"{where} must be among pipe.labels or the number of a class, got {name!r}"
            )
        return name

    def check_null_prompt(self, prompt: Any) -> None:
        super().check_null_prompt(prompt)
        if prompt:
            raise ValueError(
                f'null_prompt must be "" or None for DiTPipeline, which has labels, got {prompt!r}'
            )

    def tokens(self, pipe: Any, prompts: list[Any]) -> list[Tokens]:
        return [Tokens("labels", [[self._label(prompt)] for prompt in prompts], 1)]

    def encode(self, pipe: Any, prompts: list[Any], device: torch.device) -> dict[str, Tensor]:
        labels = [self._label(prompt) for prompt in prompts]
        return {"class_labels": torch.tensor(labels, device=device)}

    def encode_null(self, pipe: Any, prompt: str, device: torch.device) -> dict[str, Tensor]:
        return {"class_labels": torch.tensor([self._classes], device=device)}

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Any:
        return self.network(x_t, timestep=timesteps, **conditioning, return_dict=False)

    def sample_shape(self) -> tuple[int, int, int] | None:
        size = self.config.sample_size
        return self.config.in_channels, size, size

    def _label(self, prompt: Any) -> int:
        return prompt if isinstance(prompt, int) else self._labels[prompt]

    @property
    def _classes(self) -> int:
        return self.config.num_embeds_ada_norm
