"""Fine-tuning on few labels, and on images from Python."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import sacl_fast
from sacl_fast.config import DataConfig
from sacl_fast.config.finetune import FinetuneConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.loading.evaluation import ReadableImages
from sacl_fast.engine.checkpoint import list_checkpoints
from sacl_fast.errors import UserError
from sacl_fast.evaluation.few_shot import draw_per_class, draw_percent
from sacl_fast.evaluation.images import choose_images
from sacl_fast.transfer.finetune import _steps, default_folder
from sacl_fast.transfer.task import with_few_labels
from tests.commands import said
from tests.operators import Convolutions
from tests.transfer.conftest import FEW, FEW_ARGS, network


def test_few_labels(run_folder, labelled, tiny, capsys):
    """Fewer than a batch; and from scratch, where all weights have one rate, on the same ones."""
    args = ("finetune", run_folder, *FEW_ARGS, "--per-class", "2", "--seed", "3", "--from-scratch")
    told = said(capsys, *args, "--backbone-lr", "0.01")
    assert "over training from scratch (fine-tuning, 2 per class, 30 images; 95 % in" in told or (
        "chance: " in told and "(fine-tuning, 2 per class, 30 images; 95 % interval" in told
    )
    folder = run_folder / "finetune" / f"{labelled.name}-2perclass-seed3"
    written = json.loads((folder / "finetune.json").read_text())
    assert written["train_images"] == 6
    assert [written["settings"][name] for name in ("per_class", "seed", "steps")] == [2, 3, 6]
    assert "6 training images (2 per class, seed 3)" in (folder / "finetune.md").read_text()
    of = [
        torch.load(list_checkpoints(folder / part)[-1])["optimizer"]["param_groups"]
        for part in ("checkpoints", "from_scratch/checkpoints")
    ]
    assert [[group["base"] for group in groups] for groups in of] == [[0.01, 0.1], [0.1]]


def test_no_convolution_overwrites_memory(run_folder, capsys):
    with Convolutions() as convolutions:
        said(capsys, "finetune", run_folder, *FEW_ARGS, "--per-class", "1", "--seed", "4")
    assert not any(convolutions.narrow())
    assert any(last for *_, last in convolutions.seen)


def test_few_labels_are_those_of_few_shot_evaluation(labelled, tiny, tmp_path):
    """Of files that cannot be read, only those drawn are looked at."""
    root = Path(shutil.copytree(labelled, tmp_path / "some"))
    broken = sorted((root / "train/one").iterdir())[::2]
    for path in broken:
        path.write_text("none")
    config = replace(tiny, data=replace(tiny.data, root=str(root), max_bad_share=0.5))
    images = choose_images(open_sources(config.data, 0), 3)
    index = images.train_index
    labels = images.train.labels[index]
    readable = np.array([Path(images.train.name(i)) not in broken for i in index])
    looked: list[int] = []

    def unreadable(some: np.ndarray) -> set[int]:
        looked.extend(some.tolist())
        of = ReadableImages(images.train, len(index), config, torch.device("cpu"))
        return of.unreadable(some)

    def per_class(count: int) -> tuple[FinetuneConfig, np.ndarray]:
        drawn = draw_per_class(labels, count, seed=3, readable=readable)
        return FinetuneConfig(seed=3, per_class=count), drawn

    percent = draw_percent(labels, 10.0, seed=3, readable=readable)
    short = "fewer than 12 images can be read of 1 class (one 10); all are taken"
    for (settings, drawn), counts, note in (
        ((FinetuneConfig(seed=3, percent=10.0), percent), [2, 2, 2], ""),
        (per_class(3), [3, 3, 3], ""),
        (per_class(12), [10, 12, 12], short),
    ):
        looked.clear()
        some = with_few_labels(images, settings, unreadable)
        assert np.bincount(images.train.labels[some.images.train_index]).tolist() == counts
        assert np.array_equal(some.images.train_index, index[drawn]) and some.note == note
        assert len(looked) == len({*looked}) < len(index)
    assert with_few_labels(images, FinetuneConfig(), unreadable) == (images, "")
    note = with_few_labels(images, FinetuneConfig(percent=4.0), unreadable).note
    assert note == (
        "4 % is less than one image of 3 classes (one, three, two); one of each is taken, which "
        "makes 5 % of all"
    )


def test_steps_and_folders_of_few_labels(run_folder):
    few_of = FinetuneConfig(percent=10.0)
    found = [_steps(few_of, images) for images in (2, 1067, 5000, 128_000)]
    assert found == [1000, 1001, 4688, 10_000]
    assert _steps(FinetuneConfig(), 2) == 10_000 and _steps(replace(few_of, steps=7), 2) == 7
    trained = sacl_fast.evaluate.open_trained(run_folder)
    settings = FinetuneConfig(percent=0.5, width="slim", data=DataConfig(source="cifar10"))
    assert default_folder(trained, settings) == run_folder / "finetune/cifar10-slim-0.5percent"


def test_images_from_python_are_those_of_a_folder(run_folder, labelled, tiny, tmp_path):
    splits = open_sources(replace(tiny.data, root=str(labelled)), 0)
    assert splits.val is not None
    given = [
        [(source.load(i), source.classes[source.labels[i]]) for i in range(len(source))]
        for source in splits
        if source is not None
    ]
    data = DataConfig(workers=0)
    done = sacl_fast.evaluate.finetune(
        run_folder, data=data, source=given[0], val=given[1], **FEW, out=tmp_path / "given"
    )
    folder = sacl_fast.evaluate.finetune(run_folder, **FEW, out=tmp_path / "folder")
    a, b = (network(d.folder / "last.safetensors") for d in (done, folder))
    assert all(torch.equal(value, b[name]) for name, value in a.items())
    assert done.result is not None and done.result.classes == ("one", "three", "two")
    assert done.result.settings["data"]["source"] == "python"
    with pytest.raises(UserError, match="val= was given without source="):
        sacl_fast.evaluate.finetune(run_folder, val=given[1], **FEW)

    own = sacl_fast.evaluate.features(run_folder)
    found = sacl_fast.evaluate.features(run_folder, source=given[0], val=given[1])
    assert np.array_equal(found.features, own.features)
    assert np.array_equal(found.labels, own.labels) and found.classes == own.classes
    assert (found.name(0), found.name(60)) == ("source[0]", "val[0]")
    assert found.settings["data"]["source"] == "python"
    other = DataConfig(root=str(labelled)), DataConfig(source="cifar10")
    of = sacl_fast.evaluate
    for call in (of.knn, of.linear, of.few_shot, of.finetune, of.features,
                 partial(sacl_fast.export, out=tmp_path / "exported")):  # fmt: skip
        for data in other:
            with pytest.raises(UserError, match=r"and source= gives .*; one of the two works"):
                call(run_folder, data=data, source=given[0])
