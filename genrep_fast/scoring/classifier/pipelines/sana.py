"""Sana: a flow over latents of a deep autoencoder, with Gemma."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .adapter import Adapter, Tokens, default_of_call, token_ids


class Sana(Adapter):
    """SanaPipeline: the tokens of Gemma, which reads the pipeline's instruction before a prompt.

    The null prompt has no instruction, as the pipeline's negative prompt.
    """

    def __init__(self, pipe: Any) -> None:
        super().__init__(pipe)
        if self.config.guidance_embeds:
            raise ValueError(
                "pipe.transformer takes a guidance scale, as Sana-Sprint does, a consistency model "
                "whose error bounds no likelihood: use the model that was distilled"
            )

    def tokens(self, pipe: Any, prompts: list[Any]) -> list[Tokens]:
        instruction = "\n".join(default_of_call(pipe, "complex_human_instruction") or [])
        cleaned = pipe._text_preprocessing(
            prompts, clean_caption=default_of_call(pipe, "clean_caption")
        )
        ids = token_ids(pipe, "tokenizer", [instruction + prompt for prompt in cleaned])
        limit = default_of_call(pipe, "max_sequence_length")
        if instruction:
            limit += len(pipe.tokenizer.encode(instruction)) - 2
        return [Tokens("tokenizer", ids, limit)]

    def encode(self, pipe: Any, prompts: list[Any], device: torch.device) -> dict[str, Tensor]:
        instruction = default_of_call(pipe, "complex_human_instruction")
        return self._encode(pipe, prompts, device, instruction)

    def encode_null(self, pipe: Any, prompt: str, device: torch.device) -> dict[str, Tensor]:
        return self._encode(pipe, [prompt], device, None)

    def _encode(
        self, pipe: Any, prompts: list[Any], device: torch.device, instruction: list[str] | None
    ) -> dict[str, Tensor]:
        embeddings, mask, _, _ = pipe.encode_prompt(
            prompts,
            do_classifier_free_guidance=False,
            device=device,
            clean_caption=default_of_call(pipe, "clean_caption"),
            max_sequence_length=default_of_call(pipe, "max_sequence_length"),
            complex_human_instruction=instruction,
        )
        return {"encoder_hidden_states": embeddings, "encoder_attention_mask": mask}

    def predict(self, x_t: Tensor, timesteps: Tensor, conditioning: dict[str, Tensor]) -> Any:
        return self.network(
            x_t,
            timestep=timesteps * self.config.timestep_scale,
            **conditioning,
            return_dict=False,
        )
