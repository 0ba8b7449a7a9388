"""What `genrep classify`, `genrep calibrate` and `genrep generate` read and leave.

Pipelines and images; classes by number or name, files, a grid.
"""

from __future__ import annotations

import glob
import io
import math
import os
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from .data import Skipped, image_files, image_to_tensor, open_image, upright_size
from .files import loading, write_atomically
from .memory import require_memory
from .names import shortened, slug

if TYPE_CHECKING:
    from PIL.Image import Image
    from torch import Tensor

    from .models import GenRep, GenRepPipeline

GRID = "grid.png"

# Characters of a class's name in a message, and names in it.
_NAME_LENGTH = 60
_NAMES = 20
# The share of an image below which its cropping is told.
_LITTLE = 1 / 2
# Rows of a grid that stand in one block.
_ROWS = 20


def load_pipeline(checkpoint: str) -> GenRepPipeline:
    """The pipeline in a folder, or in the output folder of a run.

    Raises:
        FileNotFoundError: where there is none.
        ValueError, OSError: with the file or the folder in it, for everything that is damaged.
    """
    from diffusers.utils.logging import disable_progress_bar

    from .models import GenRepPipeline
    from .models.footprint import footprint

    # Loading takes no time.
    disable_progress_bar()
    folder = Path(checkpoint)
    # The output folder of a run holds it.
    if (folder / "model" / "model_index.json").is_file():
        folder = folder / "model"
    if not (folder / "model_index.json").is_file():
        raise FileNotFoundError(
            f"checkpoint: {checkpoint} holds no trained pipeline (no model_index.json)"
        )
    with loading(f"checkpoint: {folder}"):
        pipeline = GenRepPipeline.from_pretrained(folder)
        # On a terminal alone.
        pipeline.set_progress_bar_config(disable=None)
        # What does not fit together shows where it is used.
        _ = pipeline.model.class_names, pipeline.model.image_shape, footprint(pipeline.model)
    return pipeline


def check_network_fits(model: GenRep, argument: str, batch_size: int) -> None:
    """Refuse more images at once than memory holds one layer's output of.

    Raises:
        MemoryError: with what that would take, and what there is.
    """
    from .models.footprint import footprint

    needed = batch_size * footprint(model).inference
    require_memory(argument, needed, f"the network, of {batch_size} images at once,")


def check_steps(pipeline: GenRepPipeline, **steps: int) -> None:
    """Check that `steps` are no more than those that the scheduler was trained with."""
    most = pipeline.scheduler.config.num_train_timesteps
    for name, value in steps.items():
        if value > most:
            raise ValueError(f"{name} must be at most {most}, as the scheduler has, got {value}")


class PreparedImage(NamedTuple):
    """An image as a model takes it.

    Attributes:
        pixels: [C, H, W] in [-1, 1].
        seen: the share of the image's area that is not cropped, in [0, 1].
    """

    pixels: Tensor
    seen: float


def image_paths(images: Sequence[str]) -> list[str]:
    """The image files that `images` name: files, all files below folders by name, patterns.

    Raises:
        ValueError: for a folder without images, and a pattern that no file matches.
    """
    paths: list[str] = []
    for name in images:
        if os.path.isdir(name):
            # Hidden files and folders are left out.
            found = sorted(
                image_files(name, os.path.dirname(os.path.realpath(name)), Skipped(name))
            )
            if not found:
                raise ValueError(f"images: folder {name} holds no image")
            paths += found
        elif glob.has_magic(name) and not os.path.lexists(name):
            found = sorted(filter(os.path.isfile, glob.iglob(name, recursive=True)))
            if not found:
                raise ValueError(f"images: no file matches {name}")
            paths += found
        else:
            paths.append(name)
    return paths


def folder_labels(paths: Sequence[str], names: Sequence[str]) -> list[int]:
    """The class of each image: the one that the folder of its file is named after.

    Raises:
        ValueError: for a folder that is named after no class, or after several.
    """
    indices: dict[str, int] = {}
    labels = []
    for path in paths:
        folder = os.path.basename(os.path.dirname(os.path.abspath(path)))
        if folder not in indices:
            of_name = [
                index for index, name in enumerate(names) if _normal(name) == _normal(folder)
            ]
            if len(of_name) != 1:
                raise ValueError(f"{_unknown(folder, of_name, names)} (the folder of {path})")
            indices[folder] = of_name[0]
        labels.append(indices[folder])
    return labels


def prepared(path: str, image_shape: tuple[int, int, int]) -> PreparedImage:
    """An image file as a model takes it; of a large one no more is kept.

    Args:
        path: of the file.
        image_shape: the model's, (C, H, W).

    Raises:
        ValueError: with its path, where it cannot be read.
    """
    channels, height, width = image_shape
    image = open_image(path)
    try:
        pixels = image_to_tensor(image, (height, width), "L" if channels == 1 else "RGB")
        across, down = upright_size(image)
    except MemoryError:
        raise
    # Whatever Pillow stumbles over is in the file.
    except Exception as error:
        raise ValueError(f"images: {path} cannot be read as an image ({error})") from error
    # The largest part of it that has the model's shape.
    scale = min(across / width, down / height)
    return PreparedImage(pixels, scale**2 * width * height / (across * down))


def cropping(
    seen: Sequence[float], paths: Sequence[str], image_shape: tuple[int, int, int]
) -> str | None:
    """A sentence on images of which a model sees less than half; None where there are none.

    Args:
        seen: the share of each.
        paths: of their files.
        image_shape: the model's, (C, H, W), to which they are cropped.
    """
    lost = [(share, path) for share, path in zip(seen, paths, strict=True) if share < _LITTLE]
    if not lost:
        return None
    share, path = lost[0]
    more = f", and little of {len(lost) - 1} more" if len(lost) > 1 else ""
    _, height, width = image_shape
    shape = f"{width} pixels across and {height} down"
    return f"images are cropped to the model's shape, {shape}: {share:.0%} of {path} is seen{more}"


def class_indices(labels: Sequence[str], names: Sequence[str]) -> tuple[list[int], list[str]]:
    """The classes that `labels` ask for: an index where it is one, any other text a name.

    A number with a leading zero or a sign, "07" for example, is a name first, where a class has it.

    Args:
        labels: as a user wrote them.
        names: of all classes, in the order of their indices.

    Returns:
        An index for each label, and a sentence for each integer that is the name of another class.

    Raises:
        ValueError: for an index out of range, a name that no class has, and one that several have.
    """
    indices_of: dict[str, list[int]] = {}
    for index, name in enumerate(names):
        indices_of.setdefault(_normal(name), []).append(index)
    indices: list[int] = []
    remarks: dict[str, str] = {}
    for label in labels:
        named = indices_of.get(_normal(label), [])
        # Not int's own notion, which takes "1_0" and other alphabets' digits.
        is_number = re.fullmatch(r"[+-]?[0-9]{1,18}", label) is not None
        is_index = is_number and label == str(int(label)) and 0 <= int(label) < len(names)
        if is_number and (not named or is_index):
            indices.append(int(label))
            if named and indices[-1] not in named:
                drawn = shortened(names[indices[-1]], _NAME_LENGTH)
                remarks[label] = (
                    f'label {label} is the index of the class "{drawn}", which is drawn; '
                    f'the class named "{label}" has the index {named[0]}'
                )
        elif len(named) == 1:
            indices.append(named[0])
        else:
            raise ValueError(_unknown(label, named, names))
    if not all(0 <= index < len(names) for index in indices):
        raise ValueError(f"labels must be in [0, {len(names)}), got {indices}")
    return indices, list(remarks.values())


def _normal(name: str) -> str:
    """File systems differ in how they compose accents."""
    return unicodedata.normalize("NFC", name)


def _unknown(label: str, named: list[int], names: Sequence[str]) -> str:
    shown = shortened(label, _NAME_LENGTH)
    if named:
        return f'labels: {len(named)} classes are named "{shown}", tell which by an index: {named}'
    known = ", ".join(shortened(name, _NAME_LENGTH) for name in names[:_NAMES])
    more = f" and {len(names) - _NAMES} more" if len(names) > _NAMES else ""
    wrong = f'labels: "{shown}" is no class index and no name of a class'
    return f"{wrong}; the classes are {known}{more}"


def file_name(position: int, label: int, name: str) -> str:
    """Of the picture at `position`: ``0000-class-2-cat.png``, without a name that is the number."""
    told = "" if name == str(label) else slug(name)
    return f"{position:04d}-class-{label}{told and '-'}{told}.png"


def picture_size(
    size: int | None, image_shape: tuple[int, int, int], labels: Sequence[int], grid: bool
) -> tuple[int, int]:
    """Width and height of pictures whose shorter side has `size` pixels; the model's for None.

    Args:
        size: in pixels.
        image_shape: the model's, (C, H, W).
        labels: of the pictures.
        grid: whether they are put together in one, too.

    Raises:
        ValueError: for a side of less than one pixel.
        MemoryError: with what they would take, and what there is.
    """
    channels, height, width = image_shape
    if size is None:
        return width, height
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    shorter = min(width, height)
    width, height = (max(1, round(side * size / shorter)) for side in (width, height))
    # The pixels, and the file as it is encoded.
    picture = 2 * width * height * channels
    require_memory("size", picture, f"a picture of {width} × {height} pixels")
    if grid:
        layout = _grid_layout(labels, (width, height))
        total = layout.size[0] * layout.size[1] * channels + len(labels) * picture // 2
        sides = f"{len(set(labels))} × {layout.columns} pictures of {width} × {height} pixels"
        require_memory("grid", total, sides)
    return width, height


def drawn(
    pipeline: GenRepPipeline, labels: Sequence[int], batch_size: int, **options: Any
) -> Iterator[Image]:
    """Pictures of `labels`, one after the other, `batch_size` of them drawn at once.

    Args:
        options: of `GenRepPipeline.generate`.
    """
    for start in range(0, len(labels), batch_size):
        chosen = labels[start : start + batch_size]
        ids = range(start, start + len(chosen))
        yield from pipeline.generate(chosen, chain_ids=list(ids), **options).images


def save(picture: Image, path: Path) -> None:
    """Write a PNG, whole or not at all."""
    with io.BytesIO() as content:
        picture.save(content, format="PNG")
        write_atomically(path, content.getvalue())


def grid_of(pictures: Sequence[Image], labels: Sequence[int]) -> Image:
    """One picture of all `pictures`, which are of one size: a class a row, in the labels' order.

    Many rows stand in blocks side by side.
    """
    from PIL import Image

    width, height = pictures[0].size
    layout = _grid_layout(labels, pictures[0].size)
    grid = Image.new(pictures[0].mode, layout.size)
    row_of = {label: row for row, label in enumerate(dict.fromkeys(labels))}
    filled = dict.fromkeys(labels, 0)
    for label, picture in zip(labels, pictures, strict=True):
        block, row = divmod(row_of[label], layout.rows)
        left = block * layout.block_width + filled[label] * width
        grid.paste(picture, (left, row * height))
        filled[label] += 1
    return grid


class _GridLayout(NamedTuple):
    """How pictures lie in a grid.

    Attributes:
        rows, columns: of pictures in a block; a row of it is a class.
        block_width: in pixels, with what parts it from the next.
        size: width and height of the grid in pixels.
    """

    rows: int
    columns: int
    block_width: int
    size: tuple[int, int]


def _grid_layout(labels: Sequence[int], picture_size: tuple[int, int]) -> _GridLayout:
    """That of pictures of these labels, of so many pixels across and down."""
    counts = dict.fromkeys(labels, 0)
    for label in labels:
        counts[label] += 1
    width, height = picture_size
    columns = max(counts.values())
    gap = max(1, width // 4)
    block_width = columns * width + gap
    blocks = 1
    if len(counts) > _ROWS:
        # About as wide as high.
        blocks = min(len(counts), round(math.sqrt(len(counts) * height / block_width)) or 1)
    rows = -(-len(counts) // blocks)
    # No block is left empty.
    blocks = -(-len(counts) // rows)
    size = (blocks * block_width - gap, rows * height)
    return _GridLayout(rows, columns, block_width, size)
