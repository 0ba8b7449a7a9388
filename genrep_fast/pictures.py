"""What `genrep classify` and `genrep generate` read and leave.

Pipelines and images; classes by number or name, files, a grid.
"""

from __future__ import annotations

import io
import re
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .data import image_to_tensor, open_image
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


def prepared(path: str, model: GenRep) -> Tensor:
    """An image file as the model takes it, [C, H, W]; of a large one no more is kept.

    Raises:
        ValueError: with its path, where it cannot be read.
    """
    channels, height, width = model.image_shape
    image = open_image(path)
    try:
        return image_to_tensor(image, (height, width), "L" if channels == 1 else "RGB")
    except MemoryError:
        raise
    # Whatever Pillow stumbles over is in the file.
    except Exception as error:
        raise ValueError(f"images: {path} cannot be read as an image ({error})") from error


def class_indices(labels: Sequence[str], names: Sequence[str]) -> tuple[list[int], list[str]]:
    """The classes that `labels` ask for: an index where it is one, any other text a name.

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
        if is_number and (not named or 0 <= int(label) < len(names)):
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


def check_sizes(size: int | None, labels: Sequence[int], grid: bool, channels: int) -> None:
    """Refuse pictures of `size` pixels a side that cannot be held in memory.

    Raises:
        ValueError: for a side of less than one pixel.
        MemoryError: with what they would take, and what there is.
    """
    if size is None:
        return
    if size < 1:
        raise ValueError(f"size must be at least 1, got {size}")
    # The pixels, and the file as it is encoded.
    picture = 2 * size**2 * channels
    require_memory("size", picture, f"a picture of {size} × {size} pixels")
    if grid:
        rows, columns = _grid_shape(labels)
        sides = f"{rows} × {columns} pictures of {size} × {size} pixels"
        require_memory("grid", picture * (rows * columns + len(labels)) // 2, sides)


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
    """One picture of all `pictures`, which are of one size: a class a row, in the labels' order."""
    from PIL import Image

    width, height = pictures[0].size
    rows, columns = _grid_shape(labels)
    grid = Image.new(pictures[0].mode, (columns * width, rows * height))
    row_of = {label: row for row, label in enumerate(dict.fromkeys(labels))}
    filled = dict.fromkeys(labels, 0)
    for label, picture in zip(labels, pictures, strict=True):
        grid.paste(picture, (filled[label] * width, row_of[label] * height))
        filled[label] += 1
    return grid


def _grid_shape(labels: Sequence[int]) -> tuple[int, int]:
    """Rows and columns."""
    counts = dict.fromkeys(labels, 0)
    for label in labels:
        counts[label] += 1
    return len(counts), max(counts.values())
