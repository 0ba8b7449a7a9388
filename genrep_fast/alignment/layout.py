"""Which of the collected gradients belong together, worked out once for as long as it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

from .sharded_tensors import local_parts
from .wrappers import is_sharded


class LayoutKey(NamedTuple):
    """What a layout depends on."""

    # For each loss, which parameters have a gradient.
    present: list[list[bool]]
    num_groups: int


class GramTensors(NamedTuple):
    """Parameters whose Gram matrices a step takes, and where their coefficients go."""

    indices: list[int]
    # Of each, -1 where it is not aligned.
    groups: list[int]
    # For each parameter that some loss reaches, the row of its coefficients.
    rows: list[int]

    def aligned(self) -> GramTensors:
        """Those that are aligned; one row behind theirs is that of all others."""
        places = [place for place, group in enumerate(self.groups) if group >= 0]
        row_of = {place: row for row, place in enumerate(places)}
        return GramTensors(
            [self.indices[place] for place in places],
            [self.groups[place] for place in places],
            [row_of.get(place, len(places)) for place in range(len(self.indices))],
        )


class Layout(NamedTuple):
    """Which gradients belong where, as long as `key` is the same."""

    key: LayoutKey
    # Of the parameters that some loss reaches, which is the first to do so.
    first_losses: list[int]
    # The parameters that some loss reaches.
    reached: GramTensors
    # Those that all losses reach and that have a group; all, where plain tensors lie beside
    # DTensors, as processes compare what they have of plain ones by their Gram matrices.
    aligned: GramTensors
    # Parameters of which gradients' values are compared, the smallest first.
    watched: list[int]

    @classmethod
    def of(
        cls, key: LayoutKey, groups: Sequence[int | None], parameters: Sequence[Tensor]
    ) -> Layout:
        """The layout of `key`; ``groups[index]`` is -1 or None for a parameter that is in none.

        Which losses reach a DTensor is for its Gram matrix to say, as other processes may see
        others.
        """
        reached = GramTensors([], [], [])
        first_losses = []
        for index, losses in enumerate(zip(*key.present, strict=True)):
            if not any(losses):
                continue
            group = groups[index] if all(losses) or is_sharded(parameters[index]) else None
            reached.rows.append(len(reached.indices))
            reached.indices.append(index)
            reached.groups.append(-1 if group is None else group)
            first_losses.append(losses.index(True))
        watched = _watched(reached.indices, local_parts(parameters))
        plain = [index for index in reached.indices if not is_sharded(parameters[index])]
        compared = bool(plain) and any(map(is_sharded, parameters))
        aligned = reached if compared else reached.aligned()
        return cls(key, first_losses, reached, aligned, watched)


def _watched(indices: list[int], parameters: Sequence[Tensor]) -> list[int]:
    """The smallest parameter, the smallest matrix or tensor of more axes, and the largest."""

    def size(index: int) -> int:
        return parameters[index].numel()

    indices = [index for index in indices if size(index)]
    if not indices:
        return []
    matrices = [index for index in indices if parameters[index].ndim > 1]
    watched = [min(indices, key=size), min(matrices or indices, key=size), max(indices, key=size)]
    return list(dict.fromkeys(watched))
