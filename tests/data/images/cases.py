"""What the tests of sources share: painted images, archives of them, and what is answered."""

from __future__ import annotations

import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from sacl_fast.config import DataConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import Source, Splits
from sacl_fast.errors import UserError


def paint(root: Path, *names: str) -> Path:
    """A folder with an image of each of these names, all different."""
    for shade, name in enumerate(names):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4), (shade, 0, 0)).save(root / name)
    return root


def pack(folder: Path, archive: Path, wrap: str = "") -> Path:
    if archive.suffix == ".zip":
        with zipfile.ZipFile(archive, "w") as file:
            for path in sorted(folder.rglob("*")):
                file.write(path, Path(wrap) / path.relative_to(folder))
    else:
        with tarfile.open(archive, "w:gz" if archive.suffix != ".tar" else "w") as file:
            file.add(folder, wrap or ".")
    return archive


def opened(root: Path | str, **options) -> Splits:
    return open_sources(DataConfig(root=str(root), **options), seed=0)


def shades(source: Source) -> list[int]:
    """Which of the painted images the source holds."""
    return [source.load(i).getpixel((0, 0))[0] for i in range(len(source))]  # type: ignore[index]


def error(root: Path | str | None, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_sources(DataConfig(root=None if root is None else str(root), **options), seed=0)
    return str(caught.value)


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)
