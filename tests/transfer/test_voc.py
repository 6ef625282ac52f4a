"""VOC 2007 in its official layout: the source, average precision, fine-tuning."""

from __future__ import annotations

import json
import math
import shutil
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import sacl_fast
from sacl_fast.cli import main
from sacl_fast.config import DataConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.recognise import source_of
from sacl_fast.data.images.voc import VOC_CLASSES, targets_of
from sacl_fast.engine.metrics import read_metrics
from sacl_fast.errors import UserError
from sacl_fast.transfer.task import PresentClasses, average_precisions
from tests.transfer.conftest import annotation

FEW: dict[str, Any] = dict(
    steps=4, batch_size=8, size=16, eval_every=2, checkpoint_every=2, log_every=1
)
CAT, CAR, DOG, PERSON = (VOC_CLASSES.index(name) for name in ("cat", "car", "dog", "person"))


def opened(root: Path, **more):
    config = DataConfig(source="voc2007", root=str(root), **more)
    return open_sources(config, 0, download=False)


def test_the_official_splits_and_what_is_in_each_image(voc):
    for root in (voc, voc / "VOCdevkit", voc / "VOCdevkit/VOC2007"):
        train, val = opened(root)
        assert val is not None
        assert (len(train), len(val)) == (20, 10) and train.classes == ()
        assert source_of(root) == "voc2007"
    targets = targets_of(train)
    assert targets is not None and targets.shape == (20, 20)
    assert targets[:, CAT].tolist() == [i % 2 for i in range(20)]  # a difficult one beside counts
    assert targets[:, PERSON].tolist() == [int(i % 3 == 0) for i in range(20)]
    assert targets[:, DOG].tolist() == [0] * 19 + [-1]
    assert train.name(3).endswith("VOC2007/JPEGImages/000004.jpg")
    assert train.load(0).size == (30, 24)
    some = opened(voc, limit=5).train
    chosen = [int(Path(some.name(i)).stem) - 1 for i in range(5)]
    of_some = targets_of(some)
    assert of_some is not None and np.array_equal(of_some, targets[chosen])


def devkit(scores: np.ndarray, targets: np.ndarray) -> float:
    """The 11-point AP of VOC's own VOCevalcls.m, line by line."""
    order = np.argsort(-scores, kind="stable")
    hit, miss = targets[order] > 0, targets[order] == 0
    found, false = np.cumsum(hit), np.cumsum(miss)
    recall, precision = found / (targets > 0).sum(), found / np.maximum(found + false, 1)
    ap = 0.0
    for t in np.arange(11) / 10:
        there = precision[recall >= t - 1e-9]
        ap += (there.max() if len(there) else 0.0) / 11
    return 100 * ap


def test_average_precision_is_that_of_the_devkit():
    pytest.importorskip("torchmetrics")
    rng = np.random.default_rng(0)
    scores = rng.normal(size=(200, 5))
    scores[:, 1] *= 300  # far from 0: sigmoids of them are equal
    targets = rng.choice([1, 0, -1], p=[0.2, 0.7, 0.1], size=(200, 5))
    targets[:, 3] = 0
    targets[:, 4] = np.where(scores[:, 4] > 0.5, 1, 0)
    whole, points = average_precisions(torch.from_numpy(scores), torch.from_numpy(targets))
    for c in (0, 1, 2, 4):
        assert points[c] == pytest.approx(devkit(scores[:, c], targets[:, c]), abs=1e-3)
        order = np.argsort(-scores[:, c])
        truth = targets[order, c][targets[order, c] >= 0]
        precision = np.cumsum(truth) / np.arange(1, len(truth) + 1)
        assert whole[c] == pytest.approx(100 * precision[truth == 1].mean(), abs=1e-3)
    assert points[4] == pytest.approx(100) and math.isnan(points[3]) and math.isnan(whole[3])


def test_the_loss_passes_over_what_is_difficult():
    task = PresentClasses(torch.zeros(1, 20), torch.zeros(1, 20))
    logits = torch.randn(4, 20, requires_grad=True)
    targets = torch.randint(0, 2, (4, 20), dtype=torch.int8)
    plain = torch.nn.functional.binary_cross_entropy_with_logits(logits, targets.float())
    torch.testing.assert_close(task.loss(logits, targets), plain)
    targets[1, 2] = -1
    task.loss(logits, targets).backward()
    assert logits.grad[1, 2] == 0 and (logits.grad != 0).sum() == 79


def test_fine_tuning_on_voc(run_folder, voc, capsys):
    pytest.importorskip("torchmetrics")
    args = ["--data.root", str(voc), "--data.workers", "0", "--from-scratch", "--steps", "4"]
    args += ["--batch-size", "8", "--size", "16", "--lr", "0.01", "--eval-every", "2"]
    assert main(["finetune", str(run_folder), *args]) == 0, capsys.readouterr().err
    told = capsys.readouterr().out
    folder = run_folder / "finetune/voc2007"
    written = json.loads((folder / "finetune.json").read_text())
    assert "mAP 11-point" in told and written["verdict"] in told
    assert written["classes"] == list(VOC_CLASSES) and "confusion" not in written["encoders"][0]
    of = written["encoders"][0]
    there = [value for value in of["per_class"] if value is not None]
    assert len(there) == 3  # the dog of the validation images is difficult
    assert of["figures"]["mAP 11-point"]["mean"] == pytest.approx(np.mean(there))
    assert "| cat | 5 |" in (folder / "finetune.md").read_text()
    assert not (folder / "finetune_confusion.png").exists()
    rows = [r for r in read_metrics(folder / "metrics.jsonl") if r["kind"] == "accuracy"]
    assert [row["step"] for row in rows] == [2, 4] and "mAP" in rows[0]
    assert rows[1]["precision"] == of["figures"]["mAP 11-point"]["mean"]
    assert "accuracy" not in rows[0] and "accuracy" not in told and "  mAP %" in told


def test_what_is_not_whole_is_one_sentence(run_folder, voc, tmp_path, monkeypatch):
    root = voc / "VOCdevkit/VOC2007"

    def said(**more: Any) -> str:
        data = DataConfig(source="voc2007", root=str(more.pop("root", voc)), workers=0)
        with pytest.raises(UserError) as told:
            sacl_fast.evaluate.finetune(run_folder, data=data, **FEW, **more, out=tmp_path / "out")
        assert not (tmp_path / "out").exists()
        return str(told.value)

    note = root / "Annotations/000003.xml"
    before = note.read_text()
    for text, hint in {
        "<annotation><object>": "annotation .*000003.xml cannot be read",
        "": "cannot be read",
        annotation(("unicorn", False)): "none of VOC's 20 classes",
    }.items():
        note.write_text(text)
        with pytest.raises(UserError, match=hint):
            opened(voc)
    assert "the object 'unicorn', which is none of VOC's 20 classes" in said()
    note.unlink()
    assert "000003.xml cannot be read: No such file" in said()
    note.write_text(before)
    (root / "JPEGImages/000004.jpg").rename(tmp_path / "kept.jpg")
    assert "1 of the 20 images" in (told := said()) and "000004.jpg" in told
    (tmp_path / "kept.jpg").rename(root / "JPEGImages/000004.jpg")
    names = root / "ImageSets/Main/test.txt"
    names.rename(tmp_path / "test.txt")
    assert "test.txt, which names the images of test, is missing" in said()
    shutil.copy(tmp_path / "test.txt", names)
    names.write_text("../../x\n")
    assert "names ../../x" in said()
    shutil.copy(tmp_path / "test.txt", names)
    assert "show one class each, and these show several; percent works" in said(per_class=2)
    names.parent.rename(tmp_path / "Main")
    assert source_of(voc) == "voc2007"
    (tmp_path / "Main").rename(names.parent)
    monkeypatch.setitem(sys.modules, "torchmetrics", None)
    assert "pip install 'sacl-fast[eval]'" in said()


def test_what_is_missing_is_downloaded_or_said(tmp_path, monkeypatch):
    def no_network(*_: object, **__: object) -> None:
        raise OSError(101, "Network is unreachable")

    monkeypatch.setattr("torchvision.datasets.VOCDetection", no_network)
    config = DataConfig(source="voc2007", root=str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"cannot be downloaded to it .Network is unreachable"):
        open_sources(config, 0)
    with pytest.raises(UserError, match=r"is not in .* yet; training downloads it"):
        open_sources(config, 0, download=False)


@pytest.mark.parametrize(
    ("names", "kind"),
    [
        (("cifar-10-batches-py/data_batch_1",), "cifar10"),
        (("cifar-100-python/train",), "cifar100"),
        (("a.tar", "b.tar"), "webdataset"),
        (("a.tar", "train/x.png"), "folder"),
        (("cat/x.png", "dog/y.png"), "folder"),
        ((), "folder"),
    ],
)
def test_a_folder_is_opened_as_what_it_is(tmp_path, names, kind):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("")
    assert source_of(tmp_path) == kind
    assert source_of(tmp_path / "nothing") == "folder"


def test_voc_images_can_be_pre_trained_on(voc):
    train = opened(voc).train
    assert train.labels.tolist() == [-1] * 20
    assert np.asarray(Image.open(train.name(1))).shape == (24, 30, 3)
    assert len({train.identity(i) for i in range(20)}) == 20
