"""Linear evaluation by SGD on augmented images, against the same by hand."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import sacl_fast
from sacl_fast.cli import main
from sacl_fast.config import EvalConfig
from sacl_fast.config.evaluation import LinearEvaluation
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.loading.crops import CropLoader
from sacl_fast.engine.checkpoint import list_checkpoints
from sacl_fast.engine.trainer import train
from sacl_fast.errors import UserError
from sacl_fast.evaluation.images import choose_images
from sacl_fast.evaluation.protocol import Layer, Rates, rates_of, train_layers
from tests.tiny import tiny_run

CPU = torch.device("cpu")
FEW: dict[str, Any] = {"epochs": 3, "batch_size": 16}


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept")


@pytest.fixture
def folder(tiny, kept):
    """Of a run of an epoch on a copy of ``image_folder``, trained once."""
    if not (kept / "run").exists():
        shutil.copytree(tiny.data.root, kept / "images")
        config = replace(tiny_run(kept / "images", kept / "run"), epochs=1)
        train(replace(config, eval=replace(config.eval, encoders="dense")))
    return Path(shutil.copytree(kept / "run", tiny.out))


def test_the_rates_are_those_of_the_protocol():
    few, many = (rates_of(LinearEvaluation(), classes) for classes in (100, 1000))
    assert few == Rates(0.1, False, 0.0) and many == Rates(0.3, True, 1e-5)
    assert [round(few.at(step, 10), 6) for step in range(10)] == [0.1] * 6 + [0.01] * 2 + [1e-3] * 2
    assert many.at(0, 10) == 0.3 and many.at(5, 10) == pytest.approx(0.15)
    named = LinearEvaluation(lr=0.5, schedule="cosine", weight_decay=1e-3)
    assert rates_of(named, 10) == Rates(0.5, True, 1e-3)


def test_it_is_sgd_on_crops_of_a_frozen_encoder(folder, tiny, monkeypatch):
    """By hand: the same crops, features in eval mode, torch's own SGD."""
    trained: list[Layer] = []

    def noted(*args: Any) -> list[Layer]:
        trained.extend(train_layers(*args))
        return trained

    monkeypatch.setattr("sacl_fast.evaluation.run.train_layers", noted)
    result = sacl_fast.evaluate.linear(folder, control=False, **FEW)
    splits = open_sources(tiny.data, 0)
    images = choose_images(splits, 0)
    encoder = sacl_fast.load_encoder(folder)
    linear = nn.Linear(16, 2)
    with torch.no_grad():
        linear.weight.normal_(0, 0.01, generator=torch.Generator().manual_seed(0))
        linear.bias.zero_()
    optimizer = torch.optim.SGD(linear.parameters(), lr=0.1, momentum=0.9)
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (tiny.views.mean, tiny.views.std))
    loader = CropLoader(images.train, images.train_index, tiny, CPU)
    batches = loader.batches()
    labels = torch.from_numpy(splits.train.labels)
    for step in range(3 * loader.steps_per_epoch):
        pixels, index = next(batches)
        with torch.no_grad():
            features = encoder((pixels.permute(0, 3, 1, 2) / 255 - mean) / std)
        rate = 0.1 * (1 if step < 0.6 * 6 else 0.1 if step < 0.8 * 6 else 0.01)
        optimizer.param_groups[0]["lr"] = rate
        optimizer.zero_grad()
        nn.functional.cross_entropy(linear(features), labels[index]).backward()
        optimizer.step()
    batches.close()
    assert linear.weight.abs().max() > 0.1
    torch.testing.assert_close(trained[0].linear.weight, linear.weight, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(trained[0].linear.bias, linear.bias, rtol=1e-4, atol=1e-5)
    pictures = [splits.train.load(int(i)).resize((16, 16), 3) for i in images.test_index]
    pixels = torch.from_numpy(np.stack([np.asarray(p) for p in pictures]))
    with torch.no_grad():
        logits = linear(encoder((pixels.permute(0, 3, 1, 2) / 255 - mean) / std))
    right = 100.0 * (logits.argmax(1) == labels[images.test_index]).numpy()
    assert np.array_equal(result.scores[0].samples, right)
    assert (result.train_images, result.test_images, result.held_out) == (44, 4, True)


def killed(folder, step: int) -> None:
    code = f"""
import os
from sacl_fast.evaluation import protocol
learn, seen = protocol._learn, []
def learning(layer, *args):
    seen.append(layer.network.name)
    if seen.count("dense") > {step}:
        os.kill(os.getpid(), 9)
    learn(layer, *args)
protocol._learn = learning
from sacl_fast.cli import main
main(["eval", "linear", {str(folder)!r}, "--epochs", "3", "--batch-size", "16"])
"""
    assert subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == -9


def test_a_killed_evaluation_loses_an_epoch_at_most(folder, capsys, caplog):
    assert main(["eval", "linear", str(folder), "--epochs", "3", "--batch-size", "16",
                 "--out", str(folder / "whole")]) == 0  # fmt: skip
    killed(folder, step=3)
    state = folder / "eval/linear_state"
    assert [path.stem for path in list_checkpoints(state)] == ["step_00000002"]
    assert main(["eval", "linear", str(folder), "--fast"]) == 0  # which leaves it alone
    capsys.readouterr()
    with caplog.at_level(logging.INFO, "sacl_fast"):
        assert main(["eval", "linear", str(folder), "--epochs", "3", "--batch-size", "16"]) == 0
    assert "going on after step 2" in caplog.text
    assert not state.exists()
    whole, resumed = (
        json.loads((folder / part / "linear.json").read_text())["encoders"]
        for part in ("whole", "eval")
    )
    assert whole == resumed and [row["name"] for row in whole] == ["dense", "dense, untrained"]
    assert "linear layer trained on 44 training images" in (folder / "eval/linear.md").read_text()
    # Of other settings, it begins anew.
    killed(folder, step=3)
    with caplog.at_level(logging.INFO, "sacl_fast"):
        args = ["eval", "linear", str(folder), "--epochs", "4", "--batch-size", "16"]
        assert main(args) == 0
    assert "is of another evaluation; beginning anew" in caplog.text
    assert "4 epochs will take about" in caplog.text


def test_several_encoders_share_the_crops(tiny):
    folder = train(replace(tiny, epochs=1)).folder
    together = sacl_fast.evaluate.linear(folder, **FEW)
    names = ["dense", "slim", "dense, untrained", "slim, untrained"]
    assert [scores.name for scores in together.scores] == names
    for width in ("dense", "slim"):
        alone = sacl_fast.evaluate.linear(
            folder, control=False, eval=EvalConfig(encoders=width, recalibrate_batches=2), **FEW
        )
        assert np.array_equal(alone.scores[0].samples, together.of(width).samples)


def test_mistakes_are_said(folder, tmp_path):
    with pytest.raises(UserError, match="batch_size is 256, but there are only 44"):
        sacl_fast.evaluate.linear(folder, out=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    with pytest.raises(UserError, match=r"dense.* diverged; a lower --lr works"):
        sacl_fast.evaluate.linear(folder, control=False, lr=1e38, **FEW, out=tmp_path / "none")
