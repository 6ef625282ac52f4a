"""Image folders: their classes, their splits, and what is said of them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torchvision.datasets

from tests.data.images.cases import error, opened, pack, paint, said, shades

pytestmark = pytest.mark.usefixtures("cache")


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


@pytest.mark.parametrize("splits", [("Training", "Testing"), ("TRAIN", "TEST"), ("Train", "Val")])
def test_test_images_are_not_trained_on(tmp_path: Path, splits: tuple[str, str]) -> None:
    names = [f"{split}/{name}/1.png" for split in splits for name in "ab"]
    train, val = opened(paint(tmp_path / "x", *names))
    assert shades(train) == [0, 1] and val is not None and shades(val) == [2, 3]
    train, val = opened(pack(paint(tmp_path / "y/z", *names), tmp_path / "y.zip", "z"))
    assert shades(train) == [0, 1] and val is not None and shades(val) == [2, 3]


# --- what is said ---------------------------------------------------------------------------------


def test_no_images(tmp_path: Path) -> None:
    (tmp_path / "train/a").mkdir(parents=True)
    (tmp_path / "train/a/1.txt").touch()
    message = error(tmp_path)
    assert f"no images in {tmp_path / 'train'}" in message and "jpg, jpeg, png" in message


def test_folder_labels_that_are_none(tmp_path: Path) -> None:
    paint(tmp_path / "x", "a/1.png", "b/1.png", "2.png")
    message = error(tmp_path / "x", labels="folder")
    assert "some images (1) lie directly" in message and "2.png" in message
    paint(tmp_path / "y", "only/1.png", "only/2.png")
    assert "one class folder only, only" in error(tmp_path / "y", labels="folder")


@pytest.mark.parametrize(
    ("names", "found"),
    [(("a/1.png", "dog/2.png"), "folder dog"), (("1.png",), "without a class folder")],
)
def test_val_with_other_classes(tmp_path: Path, names: tuple[str, ...], found: str) -> None:
    paint(tmp_path / "train", "a/1.png", "b/2.png")
    paint(tmp_path / "val", *names)
    message = error(tmp_path)
    assert found in message and "a, b" in message and "data.labels none" in message


def test_skipped_kinds_are_said(tmp_path: Path, info: pytest.LogCaptureFixture) -> None:
    root = paint(tmp_path / "x", "a/1.png", "b/1.png")
    (root / "a/2.HEIC").touch()
    opened(root)
    assert "skipped 1 file below" in said(info) and "1 .heic" in said(info)
    for picture in root.rglob("*.png"):
        picture.unlink()
    assert "no images in" in (message := error(root)) and "there are 1 .heic" in message


def test_splits_within_classes_are_said(tmp_path: Path, info: pytest.LogCaptureFixture) -> None:
    names = [f"{name}/{split}/1.png" for name in "ab" for split in ("train", "Test")]
    assert len(opened(paint(tmp_path / "x", *names)).train) == 4
    assert "the images in a/Test, b/Test are trained on as well" in said(info)


# --- Tiny-ImageNet --------------------------------------------------------------------------------


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
    message = error(tiny_imagenet)
    assert "for 2 of 3 images (val_1.png, val_2.png)" in message
    annotations.unlink()
    message = error(tiny_imagenet)
    assert f"{tiny_imagenet / 'val'} holds the folder images, which is none of the class" in message
    assert "val_annotations.txt" in message and "data.labels none" in message
    assert opened(tiny_imagenet, labels="none").val is None
