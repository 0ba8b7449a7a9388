"""Stable Diffusion 1 and 2, and XL: UNets with cross-attention."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter import Tokens, token_ids
from .clip import SkipsLayersOfClip


class StableDiffusion(SkipsLayersOfClip):
    """StableDiffusionPipeline: the tokens of one CLIP."""

    network_name = "unet"

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if self.config.time_cond_proj_dim is not None:
            raise ValueError(
                "pipe.unet takes a guidance scale, as consistency models do, whose error bounds no "
                "likelihood: use the model that was distilled"
            )

    def tokens(self, pipe: Any, prompts: list[Any]) -> list[Tokens]:
        name, limit = "tokenizer", pipe.tokenizer.model_max_length
        return [Tokens(name, token_ids(pipe, name, prompts), limit)]

    def _encode(
        self, pipe: Any, prompts: list[Any], device: torch.device, clip_skip: int | None
    ) -> dict[str, Tensor]:
        embeddings, _ = pipe.encode_prompt(prompts, device, 1, False, clip_skip=clip_skip)
        return {"encoder_hidden_states": embeddings}

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Any:
        return self.network(x_t, timesteps, **conditioning, return_dict=False)


class StableDiffusionXL(StableDiffusion):
    """StableDiffusionXLPipeline: the tokens of two CLIPs, the second's pooled, and sizes."""

    text_encoders = ("text_encoder", "text_encoder_2")

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        # Sizes are six numbers, and a refiner's five.
        pooled = pipe.text_encoder_2.config.projection_dim
        width = (self.config.addition_time_embed_dim or 0) * 6 + pooled
        if self.config.projection_class_embeddings_input_dim != width:
            raise ValueError(
                "pipe.unet does not take the image's sizes and the pooled prompt that "
                "StableDiffusionXLPipeline sends; a refiner is no classifier"
            )

    def tokens(self, pipe: Any, prompts: list[Any]) -> list[Tokens]:
        return [
            Tokens(name, token_ids(pipe, name, prompts), getattr(pipe, name).model_max_length)
            for name in ("tokenizer", "tokenizer_2")
        ]

    def encode_null(self, pipe: Any, prompt: str, device: torch.device) -> dict[str, Tensor]:
        encoded = super().encode_null(pipe, prompt, device)
        if prompt or not pipe.config.force_zeros_for_empty_prompt:
            return encoded
        return {name: torch.zeros_like(value) for name, value in encoded.items()}

    def _encode(
        self, pipe: Any, prompts: list[Any], device: torch.device, clip_skip: int | None
    ) -> dict[str, Tensor]:
        embeddings, _, pooled, _ = pipe.encode_prompt(
            prompts, device=device, do_classifier_free_guidance=False, clip_skip=clip_skip
        )
        return {"encoder_hidden_states": embeddings, "text_embeds": pooled}

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Any:
        # Original size, corner of the crop, and target size, as of images that were not cut.
        size = [side * self.pixels for side in x_t.shape[2:]]
        time_ids = torch.tensor([*size, 0, 0, *size], dtype=x_t.dtype, device=x_t.device)
        added = {
            "text_embeds": conditioning["text_embeds"],
            "time_ids": time_ids.expand(len(x_t), -1),
        }
        return self.network(
            x_t,
            timesteps,
            encoder_hidden_states=conditioning["encoder_hidden_states"],
            added_cond_kwargs=added,
            return_dict=False,
        )
