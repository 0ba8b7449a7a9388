"""Which of the collected gradients belong together, worked out once for as long as it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from torch import Tensor

LayoutKey = tuple[list[list[bool]], int]


class Layout(NamedTuple):
    """Which gradients belong where.

    It holds as long as `key` does: for each loss, which parameters have a gradient, and the number
    of groups.
    """

    key: LayoutKey
    # Parameters that some loss reaches.
    indices: list[int]
    # Of each, -1 where it is not aligned.
    groups: list[int]
    # Which loss is the first to reach it.
    first: list[int]
    # 0, 1, 2, ...
    places: list[int]
    # Of the coefficients of `aligned`, behind which one row is that of the others.
    rows: list[int]
    # Parameters that all losses reach and that have a group.
    aligned: list[int]
    aligned_groups: list[int]
    # Parameters of which gradients' values are compared, the smallest first.
    watched: list[int]

    @classmethod
    def of(
        cls, key: LayoutKey, groups: Sequence[int | None], parameters: Sequence[Tensor]
    ) -> Layout:
        """The layout of `key`; ``groups[index]`` is -1 for a parameter that is in none."""
        layout = cls(key, [], [], [], [], [], [], [], [])
        for index, reached in enumerate(zip(*key[0], strict=True)):
            if not any(reached):
                continue
            group = groups[index] if all(reached) else -1
            layout.places.append(len(layout.indices))
            layout.indices.append(index)
            layout.groups.append(group)
            layout.first.append(reached.index(True))
            # What is not aligned has the row behind those of what is: -1 until their number is
            # known.
            layout.rows.append(len(layout.aligned) if group >= 0 else -1)
            if group >= 0:
                layout.aligned.append(index)
                layout.aligned_groups.append(group)
        rows = [row if row >= 0 else len(layout.aligned) for row in layout.rows]
        return layout._replace(rows=rows, watched=_watched(layout.indices, parameters))


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
