"""Stable Diffusion 3 and 3.5: a flow, with two CLIPs and T5."""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor

from .adapter import Tokens, default_of_call, token_ids
from .clip import SkipsLayersOfClip
from .flow_shift import with_static_shift


class StableDiffusion3(SkipsLayersOfClip):
    """StableDiffusion3Pipeline: the tokens of all three, and both CLIPs pooled.

    T5 may be None, as for the pipeline, which sends zeros in its place.
    """

    text_encoders = ("text_encoder", "text_encoder_2")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if pipe.text_encoder_3 is None:
            warnings.warn(
                "pipe.text_encoder_3 is None, so that CLIP alone reads the prompts; where it was "
                "freed for its memory, make the classifier before",
                stacklevel=5,
            )

    def tokens(self, pipe: Any, prompts: list[Any]) -> list[Tokens]:
        # The pipeline cuts for both by the first one's length.
        limit = pipe.tokenizer.model_max_length
        has_t5 = pipe.text_encoder_3 is not None
        found = [
            Tokens(name, token_ids(pipe, name, prompts), limit, not has_t5)
            for name in ("tokenizer", "tokenizer_2")
        ]
        if has_t5:
            limit = default_of_call(pipe, "max_sequence_length")
            found.append(Tokens("tokenizer_3", token_ids(pipe, "tokenizer_3", prompts), limit))
        return found

    def _encode(
        self, pipe: Any, prompts: list[Any], device: torch.device, clip_skip: int | None
    ) -> dict[str, Tensor]:
        embeddings, _, pooled, _ = pipe.encode_prompt(
            prompts,
            None,
            None,
            device=device,
            do_classifier_free_guidance=False,
            clip_skip=clip_skip,
            max_sequence_length=default_of_call(pipe, "max_sequence_length"),
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Any:
        return self.network(
            hidden_states=x_t, timestep=timesteps, **conditioning, return_dict=False
        )

    def check_image_size(self, height: int, width: int) -> None:
        super().check_image_size(height, width)
        # The network has as many positions, of which it takes the middle ones.
        most = self.config.pos_embed_max_size * self.patch * self.pixels
        if max(height, width) > most:
            raise ValueError(
                f"images must have sides of at most {most} pixels, got {height} x {width}"
            )

    def scheduler(self, scheduler: Any) -> Any:
        side = self.config.sample_size // self.patch
        return with_static_shift(scheduler, side**2, 1.16)
