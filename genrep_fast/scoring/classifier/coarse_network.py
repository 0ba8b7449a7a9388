"""A denoiser at lower resolution.

Networks that take other sizes, those of pipelines too, get images averaged over squares, with noise
of their own. Of other transformers with patch tokens (DiT) neighbouring tokens are averaged before
the blocks and repeated after them, as in token merging (ToMe, Bolya et al., ICLR 2023).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .network import Network, module_of
from .pipelines.denoiser import PipelineDenoiser


class CoarseNetwork(Network):
    """A network at lower resolution. The denoiser itself is as it was between two evaluations."""

    def __init__(self, network: Network, factor: int) -> None:
        vars(self).update(vars(network))
        self.factor = factor
        self._transformer = _transformer_of(network.denoiser)

    def image(self, image: Tensor) -> Tensor:
        """What takes the place of an image [C, H, W]: itself where tokens are merged.

        Raises:
            ValueError: for sides that are no multiples of the factor.
        """
        if self._transformer is not None:
            return image
        height, width = image.shape[-2:]
        if height % self.factor or width % self.factor:
            raise ValueError(
                f"coarse: height and width must be multiples of the factor {self.factor}, "
                f"got {height} × {width}"
            )
        return F.avg_pool2d(image[None], self.factor)[0]

    def __call__(self, x_t: Tensor, timesteps: Tensor, labels: Tensor) -> Tensor:
        if self._transformer is not None:
            with _merged_tokens(self._transformer, self.factor):
                return super().__call__(x_t, timesteps, labels)
        try:
            return super().__call__(x_t, timesteps, labels)
        # What a network raises for a size that it does not take is its own affair.
        except (RuntimeError, ValueError, TypeError) as error:
            size = " × ".join(map(str, x_t.shape[-2:]))
            raise ValueError(
                f"coarse: the denoiser does not take inputs of {size}: {error}"
            ) from error

    def share(self, full: Network, image: Tensor, timestep: Tensor) -> float:
        """FLOPs of an evaluation relative to those of `full`, for an image [C, H, W].

        By the area where PyTorch counts none.
        """
        # It imports Triton, where that is installed.
        from torch.utils.flop_counter import FlopCounterMode

        label = torch.zeros(1, dtype=torch.int64, device=image.device)
        counts = []
        for network, seen in ((full, image), (self, self.image(image))):
            x_t = seen[None].to(network.dtype(seen))
            with FlopCounterMode(display=False) as counter:
                network(x_t, timestep[None].to(image.device), label)
            counts.append(counter.get_total_flops())
        if min(counts) == 0:
            return 1 / self.factor**2
        return counts[1] / counts[0]


def _transformer_of(denoiser: Any) -> Any:
    """The part of a denoiser that turns patches into tokens and runs blocks over them, or None."""
    module = module_of(denoiser)
    if module is None:
        return None
    if isinstance(denoiser, PipelineDenoiser) and denoiser.adapter.sample_shape() is None:
        return None
    for part in module.modules():
        blocks = getattr(part, "transformer_blocks", None)
        if isinstance(blocks, nn.ModuleList) and hasattr(part, "pos_embed"):
            return part
    return None


@contextlib.contextmanager
def _merged_tokens(transformer: Any, factor: int) -> Iterator[None]:
    """Squares of tokens go through the blocks as one, by hooks that are gone afterwards."""
    merged = []

    def merge(_: nn.Module, __: Any, tokens: Tensor) -> Tensor:
        merged.append(True)
        side = _side(tokens)
        if side % factor:
            raise ValueError(
                f"coarse: the {side} × {side} tokens of the denoiser must be multiples of the "
                f"factor {factor}"
            )
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))
        return F.avg_pool2d(grid, factor).flatten(2).transpose(1, 2)

    def unmerge(_: nn.Module, __: Any, tokens: Any) -> Tensor:
        if not isinstance(tokens, Tensor):
            found = type(transformer).__name__
            raise TypeError(f"coarse: tokens of a {found} cannot be merged")
        side = _side(tokens)
        grid = tokens.transpose(1, 2).unflatten(2, (side, side))
        repeated = grid.repeat_interleave(factor, 2).repeat_interleave(factor, 3)
        return repeated.flatten(2).transpose(1, 2)

    handles = [
        transformer.pos_embed.register_forward_hook(merge),
        transformer.transformer_blocks[-1].register_forward_hook(unmerge),
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
    if not merged:
        # A compiled network does not see hooks that came later.
        raise ValueError("coarse: tokens were not merged, pass the denoiser as it was not compiled")


def _side(tokens: Tensor) -> int:
    side = round(tokens.shape[1] ** 0.5)
    if side**2 != tokens.shape[1]:
        raise ValueError(f"coarse: tokens must form a square, got {tokens.shape[1]}")
    return side
