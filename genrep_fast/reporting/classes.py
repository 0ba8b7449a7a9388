"""Which classes pictures and tables show where there are many."""

from __future__ import annotations

MAX_CLASSES = 20


def shown_classes(num_classes: int) -> list[int]:
    """All classes, or `MAX_CLASSES` of them, spread evenly from the first to the last."""
    count = min(num_classes, MAX_CLASSES)
    if count == num_classes:
        return list(range(count))
    return [index * (num_classes - 1) // (count - 1) for index in range(count)]
