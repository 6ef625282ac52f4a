"""Lists of files: paths, labels, what does not count, and what is wrong with them."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest

from sacl_fast.config import DataConfig
from sacl_fast.data.images.decode import BadImage
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import Source
from sacl_fast.errors import UserError


def opened(path: Path, **options) -> Source:
    return open_sources(DataConfig(root=str(path), **options), 0).train


def test_paths_relative_and_absolute(image_folder: Path) -> None:
    files = sorted(image_folder.rglob("*.png"))
    lines = [str(files[0]), "", "# a comment", "dark/03.png", f"{image_folder}/bright/07.png "]
    listed = image_folder / "images.txt"
    listed.write_text("\r\n".join(lines))
    source = opened(listed)
    assert len(source) == 3
    assert source.classes == ()
    assert source.label(1) == -1
    assert source.name(1) == str(image_folder / "dark" / "03.png")
    for i, file in enumerate(
        [files[0], image_folder / "dark/03.png", image_folder / "bright/07.png"]
    ):
        assert source.read(i) == file.read_bytes()
        assert np.asarray(source.load(i)).shape == (20, 20, 3)


def test_labels(image_folder: Path) -> None:
    listed = image_folder / "images.TXT"
    listed.write_text("dark/03.png\tnight sky\nbright/07.png\tnoon\ndark/00.png\tnight sky\n")
    source = opened(listed)
    assert source.classes == ("night sky", "noon")
    assert source.labels.tolist() == [0, 1, 0]
    assert opened(listed, labels="none").classes == ()
    with listed.open("a") as file:
        file.write("dark/01.png\n")
    assert opened(listed).classes == ()  # one is missing


def test_a_header_is_no_image(image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    listed = image_folder / "with_header.txt"
    lines = ["path\tlabel", "dark/03.png\tnight", "bright/07.png\tnoon"]
    listed.write_text("\n".join(lines))
    with caplog.at_level("WARNING"):
        source = opened(listed)
    assert len(source) == 2 and source.classes == ("night", "noon")
    assert "left out the first line" in caplog.text and r"'path\tlabel'" in caplog.text
    (image_folder / "path").write_bytes((image_folder / "dark/03.png").read_bytes())
    assert opened(listed).classes == ("label", "night", "noon")  # a file of that name
    listed.write_text("\n".join([lines[1], lines[0], lines[2]]))
    (image_folder / "path").unlink()
    with pytest.raises(UserError, match="1 of 3 files of the list"):
        opened(listed)


def test_what_is_wrong_with_a_list(tmp_path: Path) -> None:
    listed = tmp_path / "images.txt"
    listed.write_text("\n# nothing\n")
    with pytest.raises(UserError, match="names no images"):
        opened(listed)
    listed.write_text("missing.jpg\n")
    with pytest.raises(UserError, match=r"1 of 1 files of the list .* such as .*/missing.jpg"):
        opened(listed)
    with pytest.raises(BadImage, match="No such file"):
        opened(listed, max_bad_share=1.0).load(0)
    other = tmp_path / "images.csv"
    other.write_text("missing.jpg\n")
    with pytest.raises(UserError, match="list of paths"):
        opened(other)


LINES = "dark/03.png\tnight\nbright/07.png\tnoon\ndark/ü ö.png\tnight\n"


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
@pytest.mark.parametrize(
    ("encoding", "mark"),
    [
        *[("utf-8", ""), ("utf-8", "\ufeff"), ("utf-16-le", "\ufeff"), ("utf-16-be", "\ufeff")],
        *[("utf-16-le", ""), ("utf-16-be", ""), ("utf-32-le", "\ufeff"), ("utf-32-be", "\ufeff")],
    ],
)
def test_lists_from_elsewhere(image_folder: Path, encoding: str, mark: str, ends: str) -> None:
    (image_folder / "dark/ü ö.png").write_bytes((image_folder / "dark/00.png").read_bytes())
    listed = image_folder / "images.txt"
    listed.write_bytes((mark + LINES.replace("\n", ends)).encode(encoding))
    source = opened(listed)
    assert source.classes == ("night", "noon")
    assert source.labels.tolist() == [0, 1, 0]
    names = [source.name(i) for i in range(3)]
    assert names[0] == str(image_folder / "dark/03.png")
    assert names[2] == str(image_folder / "dark/ü ö.png")


@pytest.mark.parametrize(
    "name",
    [
        *["\x85", "\u2028", "\u2029", "\x0b", "\x0c", "\x1c", "\x1e", "a\rb", "\xa0", "\u3000"],
        *["'", '"', "$(x)", "*", "-rf", "a b", "\\", "a\\b", "😀", "a#b", "%s", "{}", "\udcff"],
    ],
)
def test_any_name(image_folder: Path, name: str) -> None:
    content = (image_folder / "dark/00.png").read_bytes()
    path = f"{name}.png"
    with open(image_folder / path, "wb") as file:
        file.write(content)
    (image_folder / "l.txt").write_bytes(os.fsencode(f"{path}\tone\n{path}\ttwo\n"))
    source = opened(image_folder / "l.txt")
    assert len(source) == 2 and source.classes == ("one", "two")
    assert source.read(1) == content


def test_paths_of_windows(image_folder: Path) -> None:
    (image_folder / "l.txt").write_text("dark\\03.png\nbright\\07.png\n")
    assert opened(image_folder / "l.txt").name(1) == str(image_folder / "bright/07.png")


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"dark/03.png\ta\tb\n", "line 1 of .* a path, a tab"),
        (b"\tnight\n", "line 1 of"),
        (b"dark/03.png\n" + b"x" * 5000 + b"\0\n", "bytes of zero"),
        (b"\xff\xfed\0a\0r", "no text in utf-16-le"),
        (b"\x89PNG\r\n\x1a\n\0\0\0\rIHDR", "no text"),
        (b"\n\r\n \t\n", "names no images"),
    ],
)
def test_what_is_no_list(image_folder: Path, content: bytes, reason: str) -> None:
    (image_folder / "l.txt").write_bytes(content)
    with pytest.raises(UserError, match=reason):
        opened(image_folder / "l.txt")


def test_what_is_missing_is_summed_up(image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    lines = [f"dark/{i:02}.png" for i in range(24)] + ["nothing.png", "dark"]
    (image_folder / "l.txt").write_text("\n".join(lines))
    assert len(opened(image_folder / "l.txt")) == 26
    assert caplog.text.count("\n") == 1 and "2 of 26 files of the list" in caplog.text
    with pytest.raises(UserError, match=r"2 of 26 files .* data\.max_bad_share is 0\.01"):
        opened(image_folder / "l.txt", max_bad_share=0.01)


def test_what_does_not_count_is_said(image_folder: Path, caplog: pytest.LogCaptureFixture) -> None:
    (image_folder / "#1.png").write_bytes(b"")
    (image_folder / "l.txt").write_text("#1.png\n# a word\ndark/03.png\ta\ndark/04.png\n")
    assert len(opened(image_folder / "l.txt")) == 1 + 1
    assert "left out 1 line of" in caplog.text and "./#1.png would" in caplog.text
    assert "no labels: 1 of 2 lines" in caplog.text
