"""Image files: what may be opened, how it is read, and how its pixels become a tensor."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

import numpy as np
import torch
from torch import Tensor

if TYPE_CHECKING:
    from PIL.Image import Image as PILImage

# Pillow's names. No format that runs another program (EPS does), and none without a signature.
FORMATS = ("AVIF", "BMP", "GIF", "JPEG", "JPEG2000", "PNG", "PPM", "TIFF", "WEBP")

# Where nobody asked for Pillow's log, its errors would be printed beside ours.
logging.getLogger("PIL").addHandler(logging.NullHandler())

# Bytes that are hashed at once.
_BLOCK = 2**20
_END_OF_JPEG = b"\xff\xd9"
# The tag of Exif, and its values for images that are turned by a right angle.
_ORIENTATION = 0x0112
_ON_ITS_SIDE = (5, 6, 7, 8)


class ScannedImage(NamedTuple):
    """What is known of an image file that was read, but not decoded.

    Attributes:
        digest: SHA-256 of the file's content, 32 bytes.
        is_grey: whether it has one channel besides transparency.
    """

    digest: bytes
    is_grey: bool


def image_extensions() -> frozenset[str]:
    """The extensions of `FORMATS`, in lower case, with their dots."""
    from PIL import Image

    extensions = Image.registered_extensions().items()
    return frozenset(extension for extension, kind in extensions if kind in FORMATS)


def open_image(path: str | os.PathLike[str]) -> PILImage:
    """Read an image file: it is decoded and closed. Of an animation, the first frame.

    Only regular files of the `FORMATS` are opened, whatever their extension. The largest image has
    twice Pillow's ``Image.MAX_IMAGE_PIXELS`` pixels.

    Raises:
        ValueError: with `path` in it, for anything else: what is missing, no regular file, damaged,
            cut off or too large, and an image whose values have no fixed range (32 bits a
            channel).
    """
    with _reading(path) as file:
        image = _with_header(file)
        image.load()
        # The orientation, which some formats keep elsewhere in the file.
        image.getexif()
    return image


def scan_image(path: str | os.PathLike[str]) -> ScannedImage:
    """Hash an image file and read its header; notice where it was cut off.

    Pixels are decoded only where a format has no cheaper sign of its end.

    Raises:
        ValueError: as `open_image`.
    """
    with _reading(path) as file:
        digest = hashlib.sha256()
        while block := file.read(_BLOCK):
            digest.update(block)
        file.seek(0)
        image = _with_header(file)
        is_grey = has_one_channel(image.mode)
        _check_end(image, file)
    return ScannedImage(digest.digest(), is_grey)


def has_one_channel(mode: str) -> bool:
    """Whether images of this mode of Pillow have one channel besides transparency."""
    return mode in ("1", "L", "LA", "La") or mode.startswith("I;16")


def image_to_tensor(image: PILImage, size: tuple[int, int], mode: str) -> Tensor:
    """A PIL image, turned upright, resized and centre-cropped, as a tensor.

    The tensor is float32 [C, height, width] in [-1, 1].

    Args:
        image: PIL image of any mode with 8 or 16 bits a channel.
        size: (height, width).
        mode: "L" for C = 1, "RGB" for C = 3.

    Raises:
        ValueError: for an image whose values have no fixed range.
    """
    from PIL import Image, ImageOps

    _check_range(image)
    upright = ImageOps.exif_transpose(image)
    if upright.mode.startswith("I;16"):
        # convert("L") would clip at 255 instead of scaling.
        upright = Image.fromarray((np.asarray(upright) / 257).round().astype(np.uint8))
    height, width = size
    pixels = np.asarray(ImageOps.fit(upright.convert(mode), (width, height)), dtype=np.float32)
    channels_last = torch.from_numpy(pixels.reshape(height, width, -1))  # [height, width, C]
    return channels_last.permute(2, 0, 1).contiguous() / 127.5 - 1


def upright_size(image: PILImage) -> tuple[int, int]:
    """Width and height of an image once it is turned upright."""
    width, height = image.size
    turned = image.getexif().get(_ORIENTATION) in _ON_ITS_SIDE
    return (height, width) if turned else (width, height)


def file_to_tensor(path: str | os.PathLike[str], size: tuple[int, int], mode: str) -> Tensor:
    """`image_to_tensor` of a file.

    Raises:
        ValueError: as `open_image`.
    """
    image = open_image(path)
    with _naming(path):
        return image_to_tensor(image, size, mode)


@contextlib.contextmanager
def _reading(path: str | os.PathLike[str]) -> Iterator[BinaryIO]:
    """The regular file `path`, open to be read; what goes wrong in the block is told of `path`."""
    with _naming(path), _warned_of_what_was_read():
        # Before it is opened: a pipe would wait for a writer, a device may do anything.
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise ValueError("it is not a regular file")
        with open(path, "rb") as file:
            yield file


@contextlib.contextmanager
def _warned_of_what_was_read() -> Iterator[None]:
    """Drop Pillow's warnings of a file that the block cannot read: its error is enough."""
    from PIL import Image

    with warnings.catch_warnings(record=True) as caught:
        # Half of what is too large: no reason to say anything.
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        yield
    for warning in caught:
        warnings.warn_explicit(warning.message, warning.category, warning.filename, warning.lineno)


@contextlib.contextmanager
def _naming(path: str | os.PathLike[str]) -> Iterator[None]:
    try:
        yield
    # Pillow raises nearly anything for damaged files: SyntaxError, struct.error, EOFError,
    # OverflowError, zlib.error, KeyError, MemoryError.
    except Exception as error:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        raise ValueError(f"{Path(path)} cannot be read as an image ({reason})") from error


def _with_header(file: BinaryIO) -> PILImage:
    from PIL import Image, UnidentifiedImageError

    Image.init()
    formats = [kind for kind in FORMATS if kind in Image.OPEN]
    try:
        image = Image.open(file, formats=formats)
    except UnidentifiedImageError:
        raise ValueError(f"it is none of {', '.join(formats)}, or damaged") from None
    _check_range(image)
    return image


def _check_range(image: PILImage) -> None:
    if image.mode in ("I", "F"):
        raise ValueError(
            f"mode {image.mode!r} has no fixed range of values; save it with 8 or 16 bits a channel"
        )


def _check_end(image: PILImage, file: BinaryIO) -> None:
    """Raise whatever Pillow does where the file was cut off."""
    if image.format == "WEBP":
        # Was noticed when it was opened.
        return
    if image.format == "PNG":
        # Compares the checksums of all chunks to the last, without decoding them.
        image.verify()
        return
    if image.format in ("JPEG", "MPO"):
        position = file.tell()
        file.seek(-len(_END_OF_JPEG), os.SEEK_END)
        ends = file.read() == _END_OF_JPEG
        file.seek(position)
        if ends:
            return
    image.load()
