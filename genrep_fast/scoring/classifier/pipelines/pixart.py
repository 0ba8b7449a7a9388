"""PixArt-α and PixArt-Σ: transformers with cross-attention to T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, Tokens, default_of_call, token_ids


class PixArtSigma(Adapter):
    """PixArtSigmaPipeline: the tokens of T5 and their mask."""

    def tokens(self, pipe: Any, prompts: list[Any]) -> list[Tokens]:
        cleaned = pipe._text_preprocessing(prompts, clean_caption=_cleans(pipe))
        limit = default_of_call(pipe, "max_sequence_length")
        return [Tokens("tokenizer", token_ids(pipe, "tokenizer", cleaned), limit)]

    def encode(self, pipe: Any, prompts: list[Any], device: torch.device) -> dict[str, Tensor]:
        embeddings, mask, _, _ = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=device,
            clean_caption=_cleans(pipe),
            max_sequence_length=default_of_call(pipe, "max_sequence_length"),
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Any:
        return self.network(
            x_t,
            timestep=timesteps,
            **conditioning,
            added_cond_kwargs=self._size_conditions(x_t),
            return_dict=False,
        )

    def _size_conditions(self, x_t: Tensor) -> dict[str, Tensor | None]:
        """What the network gets of the size of the image."""
        return {"resolution": None, "aspect_ratio": None}


class PixArtAlpha(PixArtSigma):
    """PixArtAlphaPipeline: also the image's size, for the model of 1024 pixels."""

    def _size_conditions(self, x_t: Tensor) -> dict[str, Tensor | None]:
        if self.config.sample_size != 128:
            return super()._size_conditions(x_t)
        height, width = (side * self.pixels for side in x_t.shape[2:])
        return {
            "resolution": x_t.new_tensor([height, width]).expand(len(x_t), -1),
            "aspect_ratio": x_t.new_tensor([height / width]).expand(len(x_t), -1),
        }


def _cleans(pipe: Any) -> bool:
    """Whether the pipeline cleans prompts, which it does where two packages are there."""
    from diffusers.utils import is_bs4_available, is_ftfy_available

    wanted = default_of_call(pipe, "clean_caption")
    return wanted and is_bs4_available() and is_ftfy_available()
