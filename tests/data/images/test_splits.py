"""Which folders and shards are trained on, by their names."""

from __future__ import annotations

from pathlib import Path

import pytest

from sacl_fast.data.images.splits import find_splits, split_by_name, words_of
from sacl_fast.errors import UserError


def folders(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).mkdir(parents=True)
    return root


@pytest.mark.parametrize(
    ("train", "val"),
    [
        *[("train", "val"), ("train", "test"), ("training", "validation"), ("train", "valid")],
        *[("Train", "Test"), ("TRAIN", "VAL"), ("Training", "Testing"), ("TRAINING", "TESTING")],
        *[("trainset", "testset"), ("seg_train", "seg_test"), ("train_images", "test_images")],
        *[("Train Data", "Validation Data"), ("TrainImages", "TestImages"), ("x-train-1", "x-val")],
        *[("ILSVRC2012_img_train", "ILSVRC2012_img_val"), ("Training_Set", "Test_Set")],
    ],
)
def test_spellings(tmp_path: Path, train: str, val: str) -> None:
    root = folders(tmp_path, f"{train}/a", f"{val}/a", f"{train}/b", ".hidden")
    assert find_splits(root) == (root / train, root / val)


@pytest.mark.parametrize(
    "names",
    [
        ("cat", "dog"),
        ("train_steam", "train_diesel", "bus"),
        ("restrained", "latest"),
        ("valid", "invalid"),
        ("Testing", "Other"),
        (),
    ],
)
def test_what_is_no_split(tmp_path: Path, names: tuple[str, ...]) -> None:
    assert find_splits(folders(tmp_path, *names)) == (tmp_path, None)


def test_which_of_several(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    root = folders(tmp_path, "train", "Test", "VAL", "seg_train", "annotations")
    assert find_splits(root) == (root / "train", root / "VAL")
    assert "are unused: Test, annotations, seg_train" in caplog.text
    folders(root, "Train")
    with pytest.raises(UserError, match="the folders Train, train, which go by one name"):
        find_splits(root)


def test_wrapped(tmp_path: Path) -> None:
    root = folders(tmp_path, "x/y/seg_train/seg_train/a", "x/y/seg_test/seg_test/a")
    folder = root / "x/y"
    assert find_splits(root) == (folder / "seg_train/seg_train", folder / "seg_test/seg_test")
    (root / "1.jpg").touch()
    assert find_splits(root) == (root, None)


def test_a_root_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"cannot read the folder .*nowhere: No such file"):
        find_splits(tmp_path / "nowhere")


def test_shards_by_name() -> None:
    names = ["in1k-train-00.tar", "in1k-val-00.tar", "in1k-train-01.tar"]
    shards = [Path(name) for name in names]
    assert split_by_name(shards) == ([shards[0], shards[2]], [shards[1]])
    for alike in (["00.tar", "01.tar"], ["train-0.tar", "x.tar"], ["test-0.tar", "test-1.tar"]):
        assert split_by_name([Path(name) for name in alike]) == ([Path(name) for name in alike], [])
    with pytest.raises(UserError, match=r"but extra\.tar for neither"):
        split_by_name([*shards, Path("extra.tar")])


def test_words() -> None:
    assert words_of("ILSVRC2012_img_train") == {"ilsvrc", "img", "train"}
    assert words_of("TrainImages-01") == {"train", "images"}
