"""Files that are opened as images: what is refused, by name and by one error."""

import logging
import os
import pickle
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from genrep_fast.data import FORMATS, image_to_tensor, open_image
from genrep_fast.data.images import file_to_tensor, image_extensions, scan_image

EXTENSIONS = ("avif", "bmp", "gif", "jp2", "jpg", "pgm", "png", "ppm", "tiff", "webp")


def noise(mode="RGB", size=(40, 30)):
    shape = (size[1], size[0], 3)
    pixels = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    return Image.fromarray(pixels).convert(mode)


def saved(folder, extension):
    path = folder / f"image.{extension}"
    try:
        noise("L" if extension == "pgm" else "RGB").save(path)
    except (KeyError, OSError):
        pytest.skip(f"this Pillow does not write {extension}")
    return path


def chunk(kind, content):
    checksum = struct.pack(">I", zlib.crc32(kind + content))
    return struct.pack(">I", len(content)) + kind + content + checksum


def png(width, height, *chunks):
    """A PNG of one bit a pixel, of which nobody looks at the pixels."""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    pixels = chunk(b"IDAT", zlib.compress(bytes(height * (width // 8 + 1))))
    return b"\x89PNG\r\n\x1a\n" + header + b"".join(chunks) + pixels + chunk(b"IEND", b"")


def refusal(path):
    """The message with which a file is refused, when it is scanned and when it is opened."""
    with pytest.raises(ValueError) as scanned:
        scan_image(path)
    with pytest.raises(ValueError) as opened:
        open_image(path)
    for error in (scanned, opened):
        assert str(error.value).startswith(f"{path} cannot be read as an image (")
        assert "\n" not in str(error.value)
    return str(opened.value)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_an_opened_image_is_decoded_and_its_file_closed(tmp_path, extension):
    path = saved(tmp_path, extension)
    image = open_image(path)
    path.unlink()
    assert image.size == (40, 30) and image.convert("RGB").getpixel((0, 0))
    assert image_to_tensor(image, (8, 8), "RGB").shape == (3, 8, 8)
    assert pickle.loads(pickle.dumps(image)).size == (40, 30)


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_no_file_stays_open(tmp_path):
    paths = [saved(tmp_path, extension) for extension in ("gif", "tiff", "png")]
    before = len(os.listdir("/proc/self/fd"))
    kept = [open_image(path) for path in paths]
    assert len(os.listdir("/proc/self/fd")) == before and len(kept) == 3


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_a_file_that_was_cut_off_is_named_when_it_is_scanned(tmp_path, extension):
    path = saved(tmp_path, extension)
    content = path.read_bytes()
    for kept in (0, 10, len(content) // 2, len(content) * 9 // 10):
        path.write_bytes(content[:kept])
        refusal(path)


@pytest.mark.parametrize("extension", EXTENSIONS)
def test_damage_of_any_kind_is_a_value_error_with_the_name(tmp_path, extension):
    path = saved(tmp_path, extension)
    content = path.read_bytes()
    generator = np.random.default_rng(0)
    refused = 0
    for _ in range(60):
        damaged = np.frombuffer(content, dtype=np.uint8).copy()
        places = generator.integers(0, min(len(damaged), 300), 8)
        damaged[places] = generator.integers(0, 256, 8)
        path.write_bytes(damaged.tobytes())
        for read in (scan_image, lambda path: file_to_tensor(path, (8, 8), "RGB")):
            try:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    read(path)
            except ValueError as error:
                assert str(path) in str(error)
                refused += 1
    assert refused > 0 or extension in ("bmp", "ppm", "pgm", "gif")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "none of AVIF, BMP"),
        (b"no image", "none of"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n", "none of"),
        (png(8, 8)[:30], ""),
        (png(8, 8, chunk(b"zTXt", b"k\0\0" + zlib.compress(bytes(2**23)))), "MAX_TEXT_CHUNK"),
        (png(8, 8, chunk(b"iCCP", b"k\0\0" + zlib.compress(bytes(2**23)))), "MAX_TEXT_CHUNK"),
        (png(2**15, 2**14), "decompression bomb"),
    ],
    ids=["empty", "text", "postscript", "half", "text chunk", "colour profile", "bomb"],
)
def test_what_is_no_image_or_too_large_is_refused(tmp_path, content, reason):
    path = tmp_path / "image.png"
    path.write_bytes(content)
    assert reason in refusal(path)


def test_an_image_of_half_the_size_of_a_bomb_is_read_without_a_warning(tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    path = saved(tmp_path, "png")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert open_image(path).size == (40, 30)
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 599)
    assert "exceeds limit" in refusal(path)


@pytest.mark.parametrize("mode", ["I", "F"])
def test_images_without_a_range_are_named(tmp_path, mode):
    path = tmp_path / "image.tiff"
    Image.new(mode, (4, 4)).save(path)
    assert f"mode '{mode}' has no fixed range" in refusal(path)


def test_what_is_no_regular_file_is_not_opened(tmp_path):
    paths = [tmp_path, tmp_path / "none.png", Path("/dev/zero")]
    if hasattr(os, "mkfifo"):
        os.mkfifo(tmp_path / "pipe.png")
        paths.append(tmp_path / "pipe.png")
    program = "import sys; from genrep_fast.data import open_image\n"
    program += "for path in sys.argv[1:]:\n"
    program += "    try: open_image(path)\n    except ValueError as error: print(error)"
    # In a process that ends: where the pipe is opened, it waits for a writer.
    command = [sys.executable, "-c", program, *map(str, paths)]
    lines = subprocess.run(command, capture_output=True, text=True, timeout=300).stdout.splitlines()
    assert [line.split(" cannot be read")[0] for line in lines] == list(map(str, paths))


def test_memory_that_runs_out_is_told_of_the_file(tmp_path, monkeypatch):
    path = saved(tmp_path, "png")

    def fail(self):
        raise MemoryError

    monkeypatch.setattr("PIL.ImageFile.ImageFile.load", fail)
    with pytest.raises(ValueError, match=r"image.png cannot be read as an image \(MemoryError\)"):
        open_image(path)


def test_only_errors_are_told_of_what_cannot_be_read(tmp_path, capfd):
    path = saved(tmp_path, "tiff")
    content = path.read_bytes()
    assert not logging.getLogger("PIL").level
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for kept in range(8, len(content), 37):
            path.write_bytes(content[:kept])
            refusal(path)
    assert capfd.readouterr().err == ""


def test_warnings_of_what_can_be_read_are_passed_on(tmp_path, monkeypatch):
    path = saved(tmp_path, "png")
    original = Image.Image.getexif

    def warn(self):
        warnings.warn("Corrupt EXIF data", stacklevel=1)
        return original(self)

    monkeypatch.setattr(Image.Image, "getexif", warn)
    with pytest.warns(UserWarning, match="Corrupt EXIF data"):
        open_image(path)


def test_formats_are_those_without_another_program():
    assert "EPS" not in FORMATS and ".eps" not in image_extensions()
    assert {".png", ".jpg", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".ppm"} <= image_extensions()


def test_a_scan_tells_what_the_file_says(tmp_path):
    import hashlib

    for mode, is_grey in {"1": True, "L": True, "LA": True, "I;16": True, "P": False}.items():
        path = tmp_path / "image.png"
        Image.new(mode, (5, 5)).save(path)
        scanned = scan_image(path)
        assert scanned.is_grey == is_grey
        assert scanned.digest == hashlib.sha256(path.read_bytes()).digest()


@pytest.mark.parametrize("size", [(1, 3000), (3000, 1), (1, 1)])
def test_thin_images_have_a_centre_too(tmp_path, size):
    Image.new("L", size, 255).save(tmp_path / "thin.png")
    assert (file_to_tensor(tmp_path / "thin.png", (6, 8), "L") == 1).all()
