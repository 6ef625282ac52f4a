"""What can be given as images, and what is answered where it cannot."""

from __future__ import annotations

import hashlib
import logging
import multiprocessing
import os
import pickle
import tarfile
import urllib.error
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets
from PIL import Image

from sacl_fast.config import DataConfig
from sacl_fast.data.images.archives import unpack
from sacl_fast.data.images.open import ArraySource, Source, Splits, open_sources
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


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "sacl-fast"


def opened(root: Path | str, **options) -> Splits:
    return open_sources(DataConfig(root=str(root), **options), seed=0)


def shades(source: Source) -> list[int]:
    """Which of the painted images the source holds."""
    return [source.load(i).getpixel((0, 0))[0] for i in range(len(source))]  # type: ignore[index]


# --- folders -------------------------------------------------------------------------------------


def test_class_folders(tmp_path: Path) -> None:
    train, val = opened(paint(tmp_path / "x", "b/1.png", "a/deep/2.png", "a/3.png"))
    assert val is None
    assert train.classes == ("a", "b")
    assert train.labels.dtype == np.int64 and train.labels.tolist() == [0, 0, 1]
    assert [train.label(i) for i in range(3)] == [0, 0, 1]
    assert shades(train) == [2, 1, 0]
    assert train.name(1) == str(tmp_path / "x/a/deep/2.png")


def test_classes_are_those_of_torchvision(tmp_path: Path) -> None:
    root = paint(tmp_path / "x", "b/1.png", "a/4.png", "a/3.png", "A b/1.jpg", "c/d/e.jpg")
    theirs = torchvision.datasets.ImageFolder(str(root))
    ours = opened(root).train
    assert list(ours.classes) == theirs.classes
    found = [(ours.name(i), ours.label(i)) for i in range(len(ours))]
    assert found == theirs.samples


@pytest.mark.parametrize(
    ("names", "labels"),
    [
        (("1.png", "2.png"), "auto"),  # flat
        (("a/1.png", "b/1.png", "2.png"), "auto"),  # some in no folder
        (("a/1.png", "a/b/2.png"), "auto"),  # one folder
        (("a/1.png", "b/2.png"), "none"),
    ],
)
def test_without_labels(tmp_path: Path, names: tuple[str, ...], labels: str) -> None:
    paint(tmp_path / "x/train", *names)
    paint(tmp_path / "x/val", *names)
    train, val = opened(tmp_path / "x", labels=labels)
    assert train.classes == () and val is None
    assert train.labels.tolist() == [-1] * len(names)


@pytest.mark.parametrize("train_name", ["train", "training"])
@pytest.mark.parametrize("val_name", ["val", "test", "valid", "validation"])
def test_splits(tmp_path: Path, train_name: str, val_name: str) -> None:
    paint(tmp_path / train_name, "a/1.png", "b/2.png", "c/3.png")
    paint(tmp_path / val_name, "c/1.png", "a/2.png")
    train, val = opened(tmp_path)
    assert train.labels.tolist() == [0, 1, 2]
    assert val is not None
    assert val.classes == train.classes and val.labels.tolist() == [0, 2]  # b has no image


def test_train_alone_and_empty_class_folders(tmp_path: Path) -> None:
    paint(tmp_path / "train", "a/1.png", "c/2.png")
    (tmp_path / "train/b").mkdir()
    train, val = opened(tmp_path)
    assert train.classes == ("a", "c") and val is None


def test_val_comes_before_test(tmp_path: Path) -> None:
    paint(tmp_path / "train", "a/1.png", "b/2.png")
    paint(tmp_path / "val", "a/1.png")
    paint(tmp_path / "test", "1.png")
    assert len(opened(tmp_path).val or ()) == 1


def test_limit_is_a_seeded_subset_in_order(tmp_path: Path) -> None:
    paint(tmp_path / "x", *(f"{c}/{i:02}.png" for c in "ab" for i in range(20)))
    config = DataConfig(root=str(tmp_path / "x"), limit=10)
    first, again, other = (open_sources(config, seed).train for seed in (1, 1, 2))
    assert len(first) == 10 == len(first.labels)
    assert shades(first) == shades(again) == sorted(shades(first)) != shades(other)
    assert [first.name(i) for i in range(10)] == sorted(first.name(i) for i in range(10))
    assert first.classes == ("a", "b")
    assert len(opened(tmp_path / "x", limit=99).train) == 40


def test_sources_are_pickled_small(tmp_path: Path) -> None:
    source = opened(paint(tmp_path / "x", *(f"a/{i:05}.png" for i in range(250)), "b/1.png")).train
    content = pickle.dumps(source)
    assert len(content) < 250 * 40 + 2000
    copy = pickle.loads(content)
    assert copy.name(249) == source.name(249)


# --- archives ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.tgz", "x.zip"])
@pytest.mark.parametrize("wrap", ["", "wrapped"])
def test_archives_are_unpacked_once(tmp_path: Path, cache: Path, name: str, wrap: str) -> None:
    folder = paint(tmp_path / "x", "train/a/1.png", "train/b/2.png", "val/a/3.png")
    archive = pack(folder, tmp_path / name, wrap)
    first = opened(archive)
    assert shades(first.train) == [0, 1]
    assert first.val is not None and shades(first.val) == [2]
    (unpacked,) = (p for p in (cache / "unpacked").iterdir() if p.is_dir())
    before = unpacked.stat().st_mtime_ns
    assert shades(opened(archive).train) == [0, 1]
    assert unpacked.stat().st_mtime_ns == before


def test_a_changed_archive_is_unpacked_again(tmp_path: Path) -> None:
    pack(paint(tmp_path / "x", "1.png"), tmp_path / "x.zip")
    assert len(opened(tmp_path / "x.zip").train) == 1
    pack(paint(tmp_path / "x", "1.png", "2.png"), tmp_path / "x.zip")
    assert len(opened(tmp_path / "x.zip").train) == 2


def test_processes_do_not_clash(tmp_path: Path, cache: Path) -> None:
    archive = pack(paint(tmp_path / "x", *(f"{i}.png" for i in range(200))), tmp_path / "x.tar.gz")
    partial = cache / "unpacked"
    partial.mkdir(parents=True)
    with multiprocessing.get_context("fork").Pool(4) as pool:
        folders = pool.starmap(unpack, [(archive, cache)] * 4)
    assert len(set(folders)) == 1
    assert len(list(folders[0].glob("*.png"))) == 200
    assert not list(partial.glob(".*partial*"))


def test_archives_stay_inside(tmp_path: Path, cache: Path) -> None:
    picture = paint(tmp_path / "x", "1.png") / "1.png"
    with tarfile.open(tmp_path / "x.tar", "w") as file:
        file.add(picture, "../../escaped.png")
    with pytest.raises(UserError, match="not safe to unpack"):
        opened(tmp_path / "x.tar")
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as file:
        file.write(picture, "../../escaped.png")
    with pytest.raises(UserError, match="not safe to unpack"):
        opened(tmp_path / "x.zip")
    assert not list(tmp_path.glob("**/escaped.png"))


# --- errors --------------------------------------------------------------------------------------


def _error(root: Path | str | None, **options) -> str:
    with pytest.raises(UserError) as caught:
        open_sources(DataConfig(root=None if root is None else str(root), **options), seed=0)
    return str(caught.value)


def test_no_root() -> None:
    message = _error(None)
    assert "no images given" in message and "data.root" in message and "demo" in message


def test_missing_root(tmp_path: Path) -> None:
    assert "does not exist" in _error(tmp_path / "nowhere")


def test_root_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "notes.md").touch()
    message = _error(tmp_path / "notes.md")
    assert "a file" in message and ".tar.gz" in message


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/1.txt").touch()
    message = _error(tmp_path)
    assert f"no images in {tmp_path / 'train'}" in message and "jpg, jpeg, png" in message


@pytest.mark.parametrize("name", ["x.tar", "x.tar.gz", "x.zip"])
@pytest.mark.parametrize("keep", [0, 0.6])
def test_corrupt_archive(tmp_path: Path, cache: Path, name: str, keep: float) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    (tmp_path / "x").mkdir()
    Image.fromarray(noise).save(tmp_path / "x/1.png")
    archive = pack(tmp_path / "x", tmp_path / name)
    content = archive.read_bytes()
    archive.write_bytes(content[: int(keep * len(content))] if keep else b"no archive at all")
    assert "no readable archive" in _error(archive)
    assert not [p for p in (cache / "unpacked").iterdir() if p.is_dir()]


def test_nowhere_to_unpack(tmp_path: Path) -> None:
    archive = pack(paint(tmp_path / "x", "1.png"), tmp_path / "x.zip")
    (tmp_path / "file").touch()
    assert "data.cache_dir" in _error(archive, cache_dir=str(tmp_path / "file"))


def test_folder_labels_that_are_none(tmp_path: Path) -> None:
    paint(tmp_path / "x", "a/1.png", "b/1.png", "2.png")
    message = _error(tmp_path / "x", labels="folder")
    assert "1 images lie directly" in message and "2.png" in message
    paint(tmp_path / "y", "only/1.png", "only/2.png")
    assert "one class folder only, only" in _error(tmp_path / "y", labels="folder")


@pytest.mark.parametrize(
    ("names", "found"),
    [(("a/1.png", "dog/2.png"), "folder dog"), (("1.png",), "without a class folder")],
)
def test_val_with_other_classes(tmp_path: Path, names: tuple[str, ...], found: str) -> None:
    paint(tmp_path / "train", "a/1.png", "b/2.png")
    paint(tmp_path / "val", *names)
    message = _error(tmp_path)
    assert found in message and "a, b" in message and "data.labels none" in message


# --- CIFAR and the demo --------------------------------------------------------------------------


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
        message = _error(given, source="cifar100")
        assert str(tmp_path / looked) in message and "no route to host" in message
        assert "train/ and test/" in message and ".tar.gz" in message


def test_demo() -> None:
    train, val = open_sources(DataConfig(source="demo"), seed=0)
    assert isinstance(train, ArraySource) and val is not None
    assert (len(train), len(val), len(train.classes)) == (4000, 1000, 10)
    assert train.name(3) == "demo[3]"


def test_real_cifar(data_folder: Path) -> None:
    path = next((p for p in (data_folder / "cifar10.tar.gz",) if p.exists()), data_folder)
    train, val = opened(path, source="cifar10", limit=100)
    assert len(train) == 100 and val is not None and len(val) == 10_000
    assert "airplane" in train.classes and train.load(7).size == (32, 32)


# --- what is said before training ----------------------------------------------------------------


def said(caplog: pytest.LogCaptureFixture) -> str:
    return "\n".join(record.getMessage() for record in caplog.records)


@pytest.fixture
def info(caplog: pytest.LogCaptureFixture) -> pytest.LogCaptureFixture:
    caplog.set_level(logging.INFO, "sacl_fast.data")
    return caplog


def test_labels_are_said(tmp_path: Path, info: pytest.LogCaptureFixture) -> None:
    root = paint(tmp_path / "x", *(f"{year}/1.png" for year in range(2019, 2026)))
    opened(root)
    assert "labels for kNN evaluation: 7 classes (2019, 2020, 2021, 2022, 2023 and 2 more)" in (
        said(info)
    )
    assert "names of folders" in said(info) and "data.labels none does without" in said(info)
    info.clear()
    opened(root, labels="none")
    assert "no labels, so no kNN evaluation" in said(info)


def test_skipped_kinds_are_said(tmp_path: Path, info: pytest.LogCaptureFixture) -> None:
    root = paint(tmp_path / "x", "a/1.png", "b/1.png")
    (root / "a/2.HEIC").touch()
    opened(root)
    assert "skipped 1 files" in said(info) and "1 .heic" in said(info)
    for picture in root.rglob("*.png"):
        picture.unlink()
    assert "no images in" in (message := _error(root)) and "there are 1 .heic" in message


@pytest.mark.parametrize("splits", [("Training", "Testing"), ("TRAIN", "TEST"), ("Train", "Val")])
def test_test_images_are_not_trained_on(tmp_path: Path, splits: tuple[str, str]) -> None:
    names = [f"{split}/{name}/1.png" for split in splits for name in "ab"]
    train, val = opened(paint(tmp_path / "x", *names))
    assert shades(train) == [0, 1] and val is not None and shades(val) == [2, 3]
    train, val = opened(pack(paint(tmp_path / "y/z", *names), tmp_path / "y.zip", "z"))
    assert shades(train) == [0, 1] and val is not None and shades(val) == [2, 3]


def test_splits_within_classes_are_said(tmp_path: Path, info: pytest.LogCaptureFixture) -> None:
    names = [f"{name}/{split}/1.png" for name in "ab" for split in ("train", "Test")]
    assert len(opened(paint(tmp_path / "x", *names)).train) == 4
    assert "the images in a/Test, b/Test are trained on as well" in said(info)


# --- Tiny-ImageNet -------------------------------------------------------------------------------


@pytest.fixture
def tiny_imagenet(tmp_path: Path) -> Path:
    root = paint(
        tmp_path / "tiny",
        *("train/n01/images/n01_0.png", "train/n02/images/n02_0.png"),
        *("val/images/val_0.png", "val/images/val_1.png", "val/images/val_2.png"),
    )
    lines = [
        "val_0.png\tn02\t0\t0\t9\t9",
        "val_2.png\tn02\t0\t0\t9\t9",
        "val_1.png\tn01\t0\t0\t9\t9",
    ]
    (root / "val/val_annotations.txt").write_bytes("\r\n".join(lines).encode())
    return root


def test_val_images_with_annotations(tiny_imagenet: Path) -> None:
    train, val = opened(tiny_imagenet)
    assert train.classes == ("n01", "n02") and val is not None
    assert val.labels.tolist() == [1, 0, 1]


def test_val_images_without_annotations(tiny_imagenet: Path) -> None:
    annotations = tiny_imagenet / "val/val_annotations.txt"
    annotations.write_text("val_0.png\tn02\nval_1.png\tn99\n")
    message = _error(tiny_imagenet)
    assert "for 2 of 3 images (val_1.png, val_2.png)" in message
    annotations.unlink()
    message = _error(tiny_imagenet)
    assert f"{tiny_imagenet / 'val'} holds the folder images, which is none of the class" in message
    assert "val_annotations.txt" in message and "data.labels none" in message
    assert opened(tiny_imagenet, labels="none").val is None


# --- roots that cannot be had --------------------------------------------------------------------


@pytest.mark.parametrize("source", ["folder", "webdataset", "cifar10"])
@pytest.mark.parametrize("suffix", ["", ".tar", ".zip", ".txt"])
@pytest.mark.parametrize("kind", ["long", "circle", "dangling", "pipe", "home"])
def test_roots_that_cannot_be_had(tmp_path: Path, kind: str, suffix: str, source: str) -> None:
    root = tmp_path / f"x{suffix}"
    if kind == "long":
        root = tmp_path / ("x" * 300 + suffix)
    elif kind == "pipe":
        os.mkfifo(root)
    elif kind == "home":
        root = Path(f"~no-such-user-here/x{suffix}")
    else:
        root.symlink_to(root if kind == "circle" else "nowhere")
    with pytest.raises(UserError) as caught:
        open_sources(DataConfig(source=source, root=str(root)), seed=0, download=False)  # type: ignore[arg-type]
    assert "\n" not in str(caught.value)
