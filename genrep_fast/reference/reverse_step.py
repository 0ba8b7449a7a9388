"""Definition of the reverse step: one step of a chain, and the score of the same step.

Its noise is counter-based.

Shapes: B chains, C channels, *spatial; D = C·H·W elements a chain. Words are 32-bit values held in
int64. The step is computed in float32, or in float64 where `x_t` is float64; its noise is drawn in
float64 and rounded.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .scoring import accumulation_dtype

# The row of the counter that holds a chain's initial noise instead of a step's.
INITIAL_ROW = 2**32 - 1

_WORD = 2**32 - 1
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_KEY_INCREMENTS = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def philox_4x32_10(counter: Sequence[Tensor], key: Sequence[int]) -> list[Tensor]:
    """The four output words of Philox 4×32-10 (Salmon et al., SC 2011).

    `counter` is four int64 tensors that broadcast, `key` two words.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(_ROUNDS):
        # The 64-bit product wraps into the sign, but all its bits are there: the mask removes what
        # >> extends.
        product0, product1 = c0 * _MULTIPLIERS[0], c2 * _MULTIPLIERS[1]
        c0, c1, c2, c3 = (
            (product1 >> 32 & _WORD) ^ c1 ^ k0,
            product1 & _WORD,
            (product0 >> 32 & _WORD) ^ c3 ^ k1,
            product0 & _WORD,
        )
        k0, k1 = (k0 + _KEY_INCREMENTS[0]) & _WORD, (k1 + _KEY_INCREMENTS[1]) & _WORD
    return [c0, c1, c2, c3]


def chain_noise(seed: int, chain_ids: Tensor, row: int | Tensor, shape: Sequence[int]) -> Tensor:
    """Standard normal noise of chains at one row, the same on every backend and in every batch.

    Key: the seed's low and high word. Counter: element index ÷ 4 (low, high), chain id, row.
    Box–Muller on its words gives four elements.

    Args:
        seed: 64-bit integer.
        chain_ids: int64 [B] in [0, 2³²).
        row: of the coefficient table, or `INITIAL_ROW`; one for all chains, or int64 [B].
        shape: of one chain's sample.

    Returns:
        float64 [B, *shape].
    """
    elements = math.prod(shape)
    index = torch.arange((elements + 3) // 4, device=chain_ids.device)  # [ceil(D / 4)]
    rows = torch.zeros_like(chain_ids) + row
    counter = (index & _WORD, index >> 32, chain_ids[:, None], rows[:, None])
    key = (seed & _WORD, seed >> 32 & _WORD)
    words = torch.stack(philox_4x32_10(counter, key), -1)  # [B, ceil(D / 4), 4]
    uniform = (words.double() + 0.5) * 2.0**-32
    radius, angle = (-2 * uniform[..., 0::2].log()).sqrt(), 2 * math.pi * uniform[..., 1::2]
    noise = torch.stack([radius * angle.cos(), radius * angle.sin()], -1)  # [B, ceil(D / 4), 2, 2]
    return noise.flatten(1)[:, :elements].reshape(len(chain_ids), *shape)


def reverse_step(
    x_t: Tensor,
    model_output: Tensor,
    tables: Tensor,
    step: int,
    seed: int,
    chain_ids: Tensor,
    x: Tensor | None,
    std_scale: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """x′ = mean + std·z [B, C, *spatial] in x_t's dtype, and the score [B], or [0] without x.

    The score is Σ(−½·inv_var·r² + log_norm).

    r = data·x + noisy·x_t + output·o. std_scale multiplies both standard deviations: inv_var ÷
    scale², log_norm − log scale.
    """
    dtype = accumulation_dtype(x_t)
    # The rows of `StepCoefficients.tables`, [8, S].
    of_step = tables[:, step].to(dtype)
    data, noisy, output, inv_var, log_norm, mean_noisy, mean_output, std = of_step
    state, prediction = x_t.to(dtype), model_output[:, : x_t.shape[1]].to(dtype)
    if std_scale is None:
        scale = torch.ones((), dtype=dtype, device=x_t.device)
    else:
        scale = std_scale.to(dtype)
    z = chain_noise(seed, chain_ids, step, x_t.shape[1:]).to(dtype)
    x_prev = mean_noisy * state + mean_output * prediction + std * scale * z
    x_prev = x_prev.to(x_t.dtype).contiguous()
    if x is None:
        return x_prev, x_t.new_empty(0, dtype=dtype)
    r = data * x.to(dtype) + noisy * state + output * prediction
    score = -0.5 * inv_var / scale**2 * r**2 + log_norm - scale.log()
    return x_prev, score.flatten(1).sum(1)
