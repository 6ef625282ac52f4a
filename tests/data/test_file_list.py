"""Lists of files: paths, labels, what does not count, and what is wrong with them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from sacl_fast.config import DataConfig
from sacl_fast.data.decode import BadImage
from sacl_fast.data.sources import Source, open_sources
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
