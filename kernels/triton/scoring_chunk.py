"""The arguments of the scoring operators as their kernels see them, and how programs share them.

A program has a tile of residuals [pairs, steps, block]: pairs of image and class ("rows"), images
of one class where the whole batch shares the centres ("shared_centers"), or locations of one pair
("locations"), by steps, by elements.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import triton
from torch import Tensor

RUN = 8  # elements that are added up in float32
ALIGNMENT = 16  # bytes of the widest load, and elements

_PROGRAMS = 2048  # enough to fill a GPU; steps are split into groups up to there
_GROUP_ELEMENTS = 32768  # the least that is worth a group
_SHARING_IMAGES = 4  # images from which on a tile of them pays

# Parameters of kernels that hold the arguments. Each integer is a parameter of its own, as Triton
# would compile a kernel again for every 1 and every multiple of 16 inside a tuple, whatever
# `do_not_specialize` says.
POINTERS = ["x_ptr", "model_output_ptr", "x_t_ptr", "tables_ptr"]
INTEGERS = [
    *("x_batch", "x_outer", "x_inner"),
    *("output_batch", "output_class", "output_step", "output_outer", "output_inner"),
    *("noisy_batch", "noisy_class", "noisy_step", "noisy_outer", "noisy_inner"),
    *("table_stride", "classes", "steps", "elements", "inner_size"),
]


class Strides(NamedTuple):
    """Of a tensor [B, K, S, outer, inner]; 0 along axes of size 1."""

    batch: int = 0
    class_: int = 0
    step: int = 0
    outer: int = 0
    inner: int = 0


class Tile(NamedTuple):
    """What a kernel is compiled for: shape of a tile, and how its rows lie in memory."""

    kind: str
    flat: bool
    aligned: bool
    # All images of a tile of "shared_centers" have the same x_t.
    shares_noisy: bool
    pairs: int
    steps: int
    block: int
    # Blocks whose squares are added up in float32.
    run: int
    num_warps: int = 4


class Split(NamedTuple):
    """Which programs there are."""

    programs: int  # of a group
    group_size: int  # steps
    groups: int


class Chunk(NamedTuple):
    """The first arguments of the operators as kernels see them."""

    x: Tensor  # [B, 1, 1, C, locations]
    model_output: Tensor  # [1|B, 1|K, S, C, locations]
    x_t: Tensor | None  # [1|B, 1|K, 1|S, C, locations]
    # [5, S]: data, noisy, output, inv_var and log_norm, each row in sequence.
    tables: Tensor
    strides: tuple[Strides, Strides, Strides]
    batch: int
    classes: int
    steps: int
    channels: int
    locations: int
    elements: int  # of a row
    # Elements are outer * inner: in the order of model_output's memory, or channels * locations.
    inner_size: int
    channels_inner: bool
    kind: str
    # Elements, or locations, lie one behind the other,
    flat: bool
    # and rows are as far apart as wide loads need it.
    aligned: bool

    def pairs(self) -> int:
        """Pairs along the first axis of tiles."""
        if self.kind == "rows":
            return self.batch * self.classes
        return self.batch if self.kind == "shared_centers" else self.locations

    def rows(self) -> int:
        """Likelihoods that are kept."""
        kept = self.locations if self.kind == "locations" else 1
        return self.batch * self.classes * kept

    def arguments(self) -> tuple:
        """The leading arguments of the kernels: `POINTERS` and `INTEGERS`."""
        x, output, noisy = self.strides
        return (
            self.x,
            *(x.batch, x.outer, x.inner),
            self.model_output,
            *output,
            self.x_t,
            *noisy,
            *(self.tables, self.tables.stride(0)),
            *(self.classes, self.steps, self.elements, self.inner_size),
        )

    def tile(self, backward: bool) -> Tile:
        if self.kind == "shared_centers":
            return self._tile(8, 8, 32, RUN, num_warps=8)
        if self.kind == "locations":
            return self._tile(128, 8, 1, RUN, num_warps=8)
        if self.elements <= 128:
            return self._tile(16, 4, 16, 1)
        # In backward a cache has to keep the rows of all programs.
        if backward or self.steps < 4:
            return self._tile(1, 1, 1024, 1)
        return self._tile(1, 8, 256, 1) if self.aligned else self._tile(1, 4, 128, 1)

    def _tile(self, pairs: int, steps: int, block: int, run: int, *, num_warps: int = 4) -> Tile:
        shares_noisy = self.kind == "shared_centers" and self.x_t is not None and len(self.x_t) == 1
        rows = (self.kind, self.flat, self.aligned, shares_noisy)
        return Tile(*rows, pairs, steps, block, run, num_warps)

    def split(self, tile: Tile) -> Split:
        """Programs and groups of steps; a function of the shapes alone."""
        tiles = triton.cdiv(self.pairs(), tile.pairs)
        if self.kind == "locations":
            return Split(tiles * self.batch * self.classes, self.steps, 1)
        programs = tiles * self.classes if self.kind == "shared_centers" else tiles
        if programs == 0:
            return Split(0, self.steps, 1)
        least = max(tile.steps, _GROUP_ELEMENTS // (tile.pairs * max(self.elements, 1)))
        most_groups = min(triton.cdiv(self.steps, least), triton.cdiv(_PROGRAMS, programs))
        steps = triton.cdiv(self.steps, max(1, most_groups))
        group_size = max(1, triton.cdiv(steps, tile.steps)) * tile.steps
        return Split(programs, group_size, max(1, triton.cdiv(self.steps, group_size)))

    def is_flat(self, strides: Strides) -> bool:
        """Whether the elements of a row, or the locations of a channel, lie one after another."""
        if strides.inner != 1 and self.inner_size != 1:
            return False
        if self.kind == "locations" or strides.outer == self.inner_size:
            return True
        return self.channels * self.locations // max(self.inner_size, 1) == 1

    def row_distances(self, strides: Strides) -> tuple[int, ...]:
        """The strides between rows; of locations, a row is a channel."""
        return strides[:4] if self.kind == "locations" else strides[:3]


def chunk_of(
    x: Tensor,
    model_output: Tensor,
    x_t: Tensor | None,
    tables: Tensor,
    per_location: bool,
) -> Chunk:
    """The chunk of an operator's first arguments."""
    batch, channels = x.shape[:2]
    locations = math.prod(x.shape[2:])
    x = five_axes(x[:, None, None], channels, locations)
    output = five_axes(model_output, channels, locations)
    noisy = None if x_t is None else five_axes(x_t, channels, locations)
    with_classes = [output] if noisy is None else [output, noisy]
    channels_inner = not per_location and _channels_lie_inside(output)
    chunk = Chunk(
        x=x,
        model_output=output,
        x_t=noisy,
        tables=tables.contiguous(),
        strides=tuple(strides_of(tensor, channels_inner) for tensor in (x, output, noisy)),
        batch=batch,
        classes=torch.broadcast_shapes(*(tensor.shape[1:2] for tensor in with_classes))[0],
        steps=output.shape[2],
        channels=channels,
        locations=locations,
        elements=channels if per_location else channels * locations,
        inner_size=channels if channels_inner else locations,
        channels_inner=channels_inner,
        kind=_kind(batch, len(output), per_location),
        flat=False,
        aligned=False,
    )
    if not all(chunk.is_flat(strides) for strides in chunk.strides[: 1 + len(with_classes)]):
        return chunk
    return chunk._replace(flat=True, aligned=_rows_are_aligned(chunk))


def five_axes(tensor: Tensor, channels: int, locations: int) -> Tensor:
    """[..., C', *spatial] -> the first channels [..., C, locations].

    A copy where the locations have no common stride.
    """
    return tensor[:, :, :, :channels].reshape(*tensor.shape[:3], channels, locations)


def strides_of(tensor: Tensor | None, channels_inner: bool) -> Strides:
    """Strides of [B, K, S, C, locations]; its inner axis is that of the channels, or the other."""
    if tensor is None:
        return Strides()
    *leading, channel, location = (
        0 if size == 1 else stride
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )
    if channels_inner:
        return Strides(*leading, outer=location, inner=channel)
    return Strides(*leading, outer=channel, inner=location)


def _kind(batch: int, output_batch: int, per_location: bool) -> str:
    if per_location:
        return "locations"
    shared = output_batch == 1 and batch >= _SHARING_IMAGES
    return "shared_centers" if shared else "rows"


def _channels_lie_inside(output: Tensor) -> bool:
    """Whether the channels of [B, K, S, C, locations] are closer to each other than locations."""
    channels, locations = output.shape[3:]
    return channels > 1 and locations > 1 and output.stride(4) > output.stride(3)


def _rows_are_aligned(chunk: Chunk) -> bool:
    """Whether every row of a flat chunk begins where wide loads may, and ends there."""
    tensors = (chunk.x, chunk.model_output, chunk.x_t)
    addresses = [tensor.data_ptr() for tensor in tensors if tensor is not None]
    distances = [distance for own in chunk.strides for distance in chunk.row_distances(own)]
    length = chunk.locations if chunk.kind == "locations" else chunk.elements
    return all(number % ALIGNMENT == 0 for number in (*addresses, *distances, length))
