"""Flux.1: a flow over packed latents, with CLIP and T5."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, Tokens, default_of_call, token_ids
from .flow_shift import with_static_shift


class Flux(Adapter):
    """FluxPipeline: the tokens of T5, and CLIP pooled.

    Models with an embedded guidance scale (dev) get 1, which is none.
    """

    text_encoders = ("text_encoder", "text_encoder_2")
    packing = 4

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        # The pipeline packs 2 × 2 latents, whatever the transformer's configuration says.
        self.patch = 2

    def tokens(self, pipe: Any, prompts: list[Any]) -> list[Tokens]:
        clip, t5 = pipe.tokenizer.model_max_length, default_of_call(pipe, "max_sequence_length")
        return [
            Tokens("tokenizer", token_ids(pipe, "tokenizer", prompts), clip, False),
            Tokens("tokenizer_2", token_ids(pipe, "tokenizer_2", prompts), t5),
        ]

    def encode(self, pipe: Any, prompts: list[Any], device: torch.device) -> dict[str, Tensor]:
        embeddings, pooled, _ = pipe.encode_prompt(
            prompts,
            device=device,
            max_sequence_length=default_of_call(pipe, "max_sequence_length"),
        )
        return {"encoder_hidden_states": embeddings, "pooled_projections": pooled}

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Any:
        height, width = x_t.shape[2:]
        guidance = None
        if self.config.guidance_embeds:
            guidance = torch.ones(len(x_t), device=x_t.device)
        tokens = conditioning["encoder_hidden_states"].shape[1]
        output = self.network(
            hidden_states=packed(x_t),
            # The network multiplies by 1000 again.
            timestep=timesteps.to(x_t.dtype) / 1000,
            guidance=guidance,
            txt_ids=torch.zeros(tokens, 3, device=x_t.device, dtype=x_t.dtype),
            img_ids=image_ids(height // 2, width // 2).to(x_t),
            **conditioning,
            return_dict=False,
        )[0]
        return unpacked(output, height, width)

    def scheduler(self, scheduler: Any) -> Any:
        return with_static_shift(scheduler, (self._sample_size() // 2) ** 2, 1.15)

    def _sample_size(self) -> Any:
        # The pipeline's, as the transformer's configuration has none.
        return 128


def packed(latents: Tensor) -> Tensor:
    """Squares of 2 × 2 latents as tokens, [N, C, h, w] -> [N, h/2 · w/2, 4·C]."""
    count, channels, height, width = latents.shape
    squares = latents.view(count, channels, height // 2, 2, width // 2, 2)
    return squares.permute(0, 2, 4, 1, 3, 5).reshape(count, -1, 4 * channels)


def unpacked(tokens: Tensor, height: int, width: int) -> Tensor:
    """The inverse of `packed`, [N, C, height, width]."""
    squares = tokens.view(len(tokens), height // 2, width // 2, -1, 2, 2)
    return squares.permute(0, 3, 1, 4, 2, 5).reshape(len(tokens), -1, height, width)


def image_ids(rows: int, columns: int) -> Tensor:
    """0, row and column of each token, float32 [rows·columns, 3]."""
    ids = torch.zeros(rows, columns, 3)
    ids[..., 1] = torch.arange(rows)[:, None]
    ids[..., 2] = torch.arange(columns)
    return ids.view(-1, 3)
