"""What the standard error of a difference of two classes needs: moments of every pair of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from ..reference.scoring import (
    add_to_pairs,
    empty_pairs,
    recentre_pairs,
    state_paired_standard_error,
)


class ClassPairs:
    """Moments of every pair of classes, of steps that an update held for both.

    Args:
        shape: [B, K, *loc] of the scorer's images.
        reduction: the scorer's.
        device: of the moments.

    Attributes:
        moments: [B, *loc, K, K] float64.
        joint: [K, K] int64, the steps that both classes of a pair saw in the same updates.
    """

    def __init__(self, shape: Sequence[int], reduction: str, device: torch.device) -> None:
        self._reduction = reduction
        self.moments = empty_pairs(tuple(shape), device)
        self.joint = torch.zeros(shape[1], shape[1], dtype=torch.int64, device=device)

    def reset(self) -> None:
        """Forget all steps, in place."""
        self.moments.zero_()
        self.joint.zero_()

    def update(
        self,
        steps: Tensor,
        index: Tensor | None,
        count: Tensor,
        center: Tensor,
        new_center: Tensor,
    ) -> None:
        """Add steps [B, K of the chunk, S, *loc] of the classes `index` (None: all).

        `count` and `center` are what the state held of these classes before, `new_center` what it
        holds now.
        """
        added = (steps, count, center, new_center, self._reduction)
        if index is None:
            self.moments.copy_(add_to_pairs(self.moments, *added))
            self.joint += steps.shape[2]
            return
        rows, columns = index[:, None], index
        moments = self.moments[..., rows, columns]
        self.moments[..., rows, columns] = add_to_pairs(moments, *added)
        self.joint[rows, columns] = self.joint[rows, columns] + steps.shape[2]

    def merge(
        self, other: ClassPairs, states: Sequence[tuple[Tensor, Tensor]], new: Tensor
    ) -> None:
        """Add the moments of `other`.

        `states` are count and center of both scorers before, `new` the merged centers.
        """
        (count, center), (other_count, other_center) = states
        own = self._recentred(self.moments, count, center, new)
        self.moments.copy_(own + self._recentred(other.moments, other_count, other_center, new))
        self.joint += other.joint

    def all_reduce(
        self, count: Tensor, center: Tensor, new: Tensor, group: dist.ProcessGroup | None
    ) -> None:
        """Add the moments of all processes; `count` and `center` are this one's, `new` common."""
        self.moments.copy_(self._recentred(self.moments, count, center, new))
        dist.all_reduce(self.moments, group=group)
        dist.all_reduce(self.joint, group=group)

    def standard_error(self, count: Tensor, state: Tensor, leader: Tensor) -> Tensor:
        """Of the difference of every class's likelihood to that of `leader` [B, *loc].

        NaN where the two have not seen all their steps together. -> [B, K, *loc] float64
        """
        return state_paired_standard_error(
            count, state, self.moments, self.joint, leader, self._reduction
        )

    def _recentred(self, moments: Tensor, count: Tensor, center: Tensor, new: Tensor) -> Tensor:
        return recentre_pairs(moments, count, center, new, self._reduction)
