"""CIFAR as torchvision keeps it, as an image folder, and where it is missing."""

from __future__ import annotations

import hashlib
import pickle
import urllib.error
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets

from sacl_fast.config import DataConfig
from sacl_fast.config.choices import SourceName
from sacl_fast.data.images.open import open_sources
from sacl_fast.errors import UserError
from tests.data.images.cases import error, opened, pack, paint

pytestmark = pytest.mark.usefixtures("cache")


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """CIFAR-10 as torchvision keeps it, of 5 x 2 + 1 random images."""
    data_set = torchvision.datasets.CIFAR10
    folder = tmp_path / "cifar" / data_set.base_folder
    folder.mkdir(parents=True)

    def keep(name: str, content: dict) -> tuple[str, str]:
        (folder / name).write_bytes(pickle.dumps(content))
        return name, hashlib.md5((folder / name).read_bytes()).hexdigest()

    rng = np.random.default_rng(0)
    parts = [
        keep(name, {"data": rng.integers(0, 256, (n, 3072), np.uint8), "labels": [1, 2][:n]})
        for name, n in (*((f"data_batch_{i}", 2) for i in range(1, 6)), ("test_batch", 1))
    ]
    classes = [f"class {i}" for i in range(10)]
    name, md5 = keep("batches.meta", {"label_names": classes})
    monkeypatch.setattr(data_set, "train_list", parts[:5])
    monkeypatch.setattr(data_set, "test_list", parts[5:])
    monkeypatch.setattr(data_set, "meta", {"filename": name, "key": "label_names", "md5": md5})
    return folder.parent


@pytest.mark.parametrize("given", ["folder", "inner folder", "archive"])
def test_torchvisions_cifar(cifar: Path, tmp_path: Path, given: str) -> None:
    inner = cifar / torchvision.datasets.CIFAR10.base_folder
    roots = {"folder": cifar, "inner folder": inner}
    root = roots.get(given) or pack(cifar, tmp_path / "cifar.tar.gz")
    train, val = opened(root, source="cifar10")
    assert len(train) == 10 and val is not None and len(val) == 1
    assert train.classes[2] == "class 2" and train.labels.tolist() == [1, 2] * 5
    assert train.load(3).size == (32, 32) and train.name(3) == "cifar10[3]"
    assert opened(root, source="cifar10", labels="none").train.label(0) == -1


@pytest.mark.parametrize("packed", [False, True])
def test_cifar_as_an_image_folder(tmp_path: Path, packed: bool) -> None:
    root = paint(tmp_path / "x", "train/a/1.png", "train/b/2.png", "test/a/3.png")
    root = pack(root, tmp_path / "x.zip", "cifar10") if packed else root
    train, val = opened(root, source="cifar10")
    assert train.classes == ("a", "b") and val is not None and len(val) == 1


def test_cifar_without_a_network(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self) -> None:
        raise urllib.error.URLError("no route to host")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fail)
    monkeypatch.chdir(tmp_path)
    for given, looked in ((None, "data/cifar100"), (str(tmp_path / "y"), "y")):
        message = error(given, source="cifar100")
        assert str(tmp_path / looked) in message and "no route to host" in message
        assert "train/ and test/" in message and ".tar.gz" in message


@pytest.mark.parametrize("source", ["cifar10", "voc2007"])
@pytest.mark.parametrize("download", [False, True])
def test_nothing_is_downloaded_into_images_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: SourceName, download: bool
) -> None:
    def fetch(*_: object, **__: object) -> None:
        raise urllib.error.URLError("it asked for it")

    monkeypatch.setattr(torchvision.datasets.CIFAR10, "download", fetch)
    monkeypatch.setattr("torchvision.datasets.voc.download_and_extract_archive", fetch)
    own = paint(tmp_path / "own", "cat/1.png", "dog/2.png")
    packed = pack(own, tmp_path / "own.zip")
    for root in (own, packed):
        with pytest.raises(UserError, match=f"{root} holds .*no copy of .*--data.source folder"):
            open_sources(DataConfig(source=source, root=str(root)), 0, download=download)
    assert sorted(path.name for path in own.iterdir()) == ["cat", "dog"]
    begun = {"cifar10": "cifar-10-python.tar.gz", "voc2007": "VOCtest_06-Nov-2007.tar"}[source]
    for name in (begun, ".a.lock", None):
        root = tmp_path / f"begun {name}"
        root.mkdir()
        if name:
            (root / name).write_bytes(b"1")
        said = "it asked for it" if download else "is not in .* yet; training downloads it"
        with pytest.raises(UserError, match=said):
            open_sources(DataConfig(source=source, root=str(root)), 0, download=download)


def test_real_cifar(data_folder: Path) -> None:
    path = next((p for p in (data_folder / "cifar10.tar.gz",) if p.exists()), data_folder)
    train, val = opened(path, source="cifar10", limit=100)
    assert len(train) == 100 and val is not None and len(val) == 10_000
    assert "airplane" in train.classes and train.load(7).size == (32, 32)
