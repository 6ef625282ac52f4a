"""Every kind of image that can be read, and every kind that cannot."""

from __future__ import annotations

import errno
import io
import os
import socket
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from sacl_fast.data.images.decode import BadImage, decode_rgb, read_bytes

GRAY = np.linspace(0, 255, 12 * 9).astype(np.uint8).reshape(9, 12)
COLOUR = np.stack([GRAY, GRAY[::-1], GRAY[:, ::-1]], 2)


def read_rgb(path: str) -> Image.Image:
    return decode_rgb(read_bytes(path))


def saved(folder: Path, image: Image.Image, name: str, **options) -> np.ndarray:
    """What is read of the image once it is saved, warnings being errors."""
    image.save(folder / name, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = read_rgb(str(folder / name))
    assert result.mode == "RGB"
    return np.asarray(result)


def test_rgb_grayscale_and_one_bit(tmp_path: Path) -> None:
    np.testing.assert_array_equal(saved(tmp_path, Image.fromarray(COLOUR), "rgb.png"), COLOUR)
    gray = np.repeat(GRAY[..., None], 3, 2)
    np.testing.assert_array_equal(saved(tmp_path, Image.fromarray(GRAY), "l.png"), gray)
    bits = Image.fromarray(GRAY > 100)
    np.testing.assert_array_equal(saved(tmp_path, bits, "1.png"), 255 * (gray > 100))


@pytest.mark.parametrize("mode", ["LA", "RGBA"])
def test_alpha_is_dropped(tmp_path: Path, mode: str) -> None:
    image = Image.fromarray(COLOUR).convert(mode)
    image.putalpha(Image.fromarray(GRAY))
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(saved(tmp_path, image, "alpha.png"), expected)


def test_palette_with_and_without_transparency(tmp_path: Path) -> None:
    image = Image.fromarray(COLOUR).quantize(16)
    expected = np.asarray(image.convert("RGB"))
    np.testing.assert_array_equal(saved(tmp_path, image, "p.png"), expected)
    transparent = saved(tmp_path, image, "t.png", transparency=bytes(range(16)))
    np.testing.assert_array_equal(transparent, expected)


@pytest.mark.parametrize("name", ["deep.png", "deep.tif", "deep.pgm"])
def test_16_bits_are_scaled(tmp_path: Path, name: str) -> None:
    deep = np.linspace(0, 65535, GRAY.size).round().astype(np.uint16).reshape(GRAY.shape)
    image = Image.fromarray(deep)
    if name.endswith("pgm"):
        (tmp_path / name).write_bytes(b"P5 12 9 65535\n" + deep.astype(">u2").tobytes())
        found = np.asarray(read_rgb(str(tmp_path / name)))
    else:
        found = saved(tmp_path, image, name)
    np.testing.assert_array_equal(found[..., 0], np.round(deep / 257).astype(np.uint8))


@pytest.mark.parametrize("most", [1, 255])
def test_floats_are_scaled(tmp_path: Path, most: int) -> None:
    floats = np.linspace(0, most, GRAY.size, dtype=np.float32).reshape(GRAY.shape)
    found = saved(tmp_path, Image.fromarray(floats), "float.tif")
    np.testing.assert_array_equal(found[..., 0], np.round(floats * (255 / most)).astype(np.uint8))


@pytest.mark.parametrize("value", [-0.5, 300.0, np.nan])
def test_floats_of_no_known_scale_are_refused(tmp_path: Path, value: float) -> None:
    floats = np.ones((9, 12), np.float32)
    floats[0, 0] = value
    with pytest.raises(BadImage, match="0 to 1 and 0 to 255 work"):
        saved(tmp_path, Image.fromarray(floats), "float.tif")


def test_cmyk_and_one_pixel_wide(tmp_path: Path) -> None:
    image = Image.fromarray(COLOUR).convert("CMYK")
    found = saved(tmp_path, image, "cmyk.tif")
    np.testing.assert_array_equal(found, np.asarray(image.convert("RGB")))
    assert saved(tmp_path, Image.new("RGB", (1, 300)), "thin.jpg").shape == (300, 1, 3)


def test_a_large_jpeg_is_decoded_in_full(tmp_path: Path) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (512, 512, 3), np.uint8)
    Image.fromarray(noise).save(tmp_path / "x.jpg")
    assert read_rgb(str(tmp_path / "x.jpg")).size == (512, 512)


def _jpeg() -> bytes:
    file = io.BytesIO()
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    Image.fromarray(noise).save(file, "jpeg")
    return file.getvalue()


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "the file is empty"),
        (b"this is no picture", "no known image format"),
        (_jpeg()[:1500], "truncated"),
        (_jpeg()[:20], "."),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 40, "."),
        (None, "No such file"),
    ],
    ids=["empty", "text", "truncated", "header only", "broken png", "missing"],
)
def test_bad_files_say_why(tmp_path: Path, content: bytes | None, reason: str) -> None:
    path = tmp_path / "bad.jpg"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(BadImage, match=reason):
        read_rgb(str(path))


def test_a_decompression_bomb_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("L", (100, 100)).save(tmp_path / "bomb.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    with pytest.raises(BadImage, match="decompression bomb"):
        read_rgb(str(tmp_path / "bomb.png"))


# --- what is opened ------------------------------------------------------------------------------


def _fifo(path: Path) -> None:
    os.mkfifo(path)


def _socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(os.path.relpath(path))  # absolute ones may be too long


def _to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (_fifo, "a pipe, a socket or a device"),
        (_socket, "a pipe, a socket or a device"),
        (_to("/dev/zero"), "a pipe, a socket or a device"),
        (_to("/dev/null"), "a pipe, a socket or a device"),
        (_to("."), "a folder"),
        (_to("x.jpg"), "symbolic links"),
        (_to("nothing"), "No such file"),
        (_to("x" * 300), "(?i)too long"),
    ],
)
def test_only_regular_files_are_opened(
    tmp_path: Path, make: Callable[[Path], None], reason: str
) -> None:
    path = tmp_path / "x.jpg"
    try:
        make(path)
    except OSError as error:
        if error.errno != errno.ENAMETOOLONG:
            raise
        path = tmp_path / ("x" * 300)
    for read in (read_bytes, read_rgb):
        with pytest.raises(BadImage, match=reason):
            read(str(path))


def test_a_file_of_more_bytes_than_may_be(tmp_path: Path) -> None:
    with (tmp_path / "x.jpg").open("wb") as file:
        file.truncate(20 * 2**30)
    with pytest.raises(BadImage, match=r"21474836480 bytes, and data\.max_file_bytes is 268435456"):
        read_rgb(str(tmp_path / "x.jpg"))
    os.truncate(tmp_path / "x.jpg", 11)
    assert read_bytes(str(tmp_path / "x.jpg"), most=11) == bytes(11)
    with pytest.raises(BadImage, match=r"max_file_bytes is 10"):
        read_bytes(str(tmp_path / "x.jpg"), most=10)


def test_a_zero_byte_in_a_path() -> None:
    with pytest.raises(BadImage, match="null"):
        read_rgb("a\0b.jpg")
