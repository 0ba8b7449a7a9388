"""Which images are for training, which for calibration, which for the test.

Images of a folder are split by their content: a number in [0, 1) that follows from the file's
SHA-256 hash is below 0.2 for a test image, below 0.3 for a calibration image. No other image has a
say, and no name or order.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import torch
from torch import Tensor

CALIBRATION_FRACTION = 0.1
TEST_FRACTION = 0.2

PARTS = ("train", "calibration", "test")
# Half-open intervals of the number that follows from an image's content.
_INTERVALS = {
    "test": (0.0, TEST_FRACTION),
    "calibration": (TEST_FRACTION, TEST_FRACTION + CALIBRATION_FRACTION),
    "train": (TEST_FRACTION + CALIBRATION_FRACTION, 1.0),
}


class EmptyPart(Exception):
    """A class has no image for a part.

    Attributes:
        label: of the class.
        part: one of `PARTS`.
    """

    def __init__(self, label: int, part: str) -> None:
        super().__init__(label, part)
        self.label = label
        self.part = part


def split_by_content(
    digests: Sequence[bytes], labels: Sequence[int], parts: Sequence[str]
) -> tuple[dict[bytes, str], dict[bytes, str]]:
    """The part of every content, and those contents that are borrowed.

    Where a class has no image in a part, the part borrows the image of another part, with two or
    more different ones, whose number is nearest to its interval. Equal files are in one part, in
    whatever class.

    Args:
        digests: SHA-256 of each image's file.
        labels: one an image.
        parts: those of `PARTS` that the images are for, "train" among them where there are two or
            more; images of another part's interval are for training.

    Raises:
        EmptyPart: where a class has too few different images.
    """
    part_of = {digest: rule(digest, parts) for digest in digests}
    borrowed: dict[bytes, str] = {}
    before = -1
    # What a class borrows may be missing in a class before, which has an equal file.
    while before < len(borrowed):
        before = len(borrowed)
        for label, members in _contents(digests, labels).items():
            for part in parts:
                if all(part_of[digest] != part for digest in members):
                    lent = _nearest(members, part, part_of, borrowed)
                    if lent is None:
                        raise EmptyPart(label, part)
                    part_of[lent] = borrowed[lent] = part
    return part_of, borrowed


def split_as_recorded(
    digests: Sequence[bytes],
    labels: Sequence[int],
    parts: Sequence[str],
    borrowed: Mapping[bytes, str],
) -> dict[bytes, str]:
    """The part of every content, where `borrowed` tells which ones are exceptions.

    Raises:
        EmptyPart: where a class has no image in a part. Nothing is borrowed anew: the image may
            have been trained on.
    """
    part_of = {digest: rule(digest, parts) for digest in digests}
    for digest, part in borrowed.items():
        if digest in part_of and part in parts:
            part_of[digest] = part
    for label, members in _contents(digests, labels).items():
        for part in parts:
            if all(part_of[digest] != part for digest in members):
                raise EmptyPart(label, part)
    return part_of


def rule(digest: bytes, parts: Sequence[str]) -> str:
    """The part of `parts` to which the content with this SHA-256 hash belongs."""
    if len(parts) == 1:
        return parts[0]
    number = _number(digest)
    for part, (start, end) in _INTERVALS.items():
        if part in parts and start <= number < end:
            return part
    return "train"


def split_by_class(labels: Tensor, fractions: Sequence[float], seed: int) -> list[Tensor]:
    """Indices of the rest, then of one part for each fraction, at random.

    A part takes at least one image of every class.
    """
    parts: list[list[Tensor]] = [[] for _ in range(len(fractions) + 1)]
    for members in _members_of_classes(labels, torch.Generator().manual_seed(seed)):
        sizes = [max(1, round(fraction * len(members))) for fraction in fractions]
        pieces = members.split([len(members) - sum(sizes), *sizes])
        for part, indices in zip(parts, pieces, strict=True):
            part.append(indices)
    return [torch.cat(part).sort().values for part in parts]


def few_labels(labels: Tensor, per_class: int, seed: int) -> Tensor:
    """Choose `per_class` images of every class at random: a bool mask shaped as `labels`, [N].

    It chooses all of a class that has no more.
    """
    if per_class < 1:
        raise ValueError(f"per_class must be positive, got {per_class}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.zeros(len(labels), dtype=torch.bool)
    for members in _members_of_classes(labels, generator):
        chosen[members[:per_class]] = True
    return chosen


def _number(digest: bytes) -> float:
    """A number in [0, 1) that follows from a hash."""
    return int.from_bytes(digest[:6], "big") / 2**48


def _contents(digests: Sequence[bytes], labels: Sequence[int]) -> dict[int, set[bytes]]:
    """The different contents of each class."""
    contents: dict[int, set[bytes]] = {}
    for digest, label in zip(digests, labels, strict=True):
        contents.setdefault(label, set()).add(digest)
    return contents


def _nearest(
    members: set[bytes], part: str, part_of: Mapping[bytes, str], borrowed: Mapping[bytes, str]
) -> bytes | None:
    """The content of a class that `part` can borrow, nearest to its interval; None for none."""
    start, end = _INTERVALS[part]

    def distance(digest: bytes) -> tuple[float, bytes]:
        number = _number(digest)
        return max(start - number, number - end, 0.0), digest

    sizes: dict[str, int] = {}
    for digest in members:
        sizes[part_of[digest]] = sizes.get(part_of[digest], 0) + 1
    lenders = [d for d in members if sizes[part_of[d]] > 1 and d not in borrowed]
    return min(lenders, key=distance, default=None)


def _members_of_classes(labels: Tensor, generator: torch.Generator) -> Iterable[Tensor]:
    """The indices of every class that occurs, each in random order."""
    for label in labels.unique():
        members = (labels == label).nonzero().squeeze(1)
        yield members[torch.randperm(len(members), generator=generator)]
