"""What the families whose pipelines may skip layers of CLIP have in common."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, default_of_call


class SkipsLayersOfClip(Adapter):
    """Prompts are encoded as far as the ``clip_skip`` of the pipeline's call says."""

    def encode(self, pipe: Any, prompts: list[Any], device: torch.device) -> dict[str, Tensor]:
        return self._encode(pipe, prompts, device, default_of_call(pipe, "clip_skip"))

    def encode_null(self, pipe: Any, prompt: str, device: torch.device) -> dict[str, Tensor]:
        # The pipeline skips no layers for its negative prompt.
        return self._encode(pipe, [prompt], device, None)

    def _encode(
        self, pipe: Any, prompts: list[Any], device: torch.device, clip_skip: int | None
    ) -> dict[str, Tensor]:
        raise NotImplementedError
