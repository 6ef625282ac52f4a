"""The examples run, on tiny sizes: they learn from what they are given, and leave what they say."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_model
from torch import nn

import sacl_fast
from examples import loss_in_plain_pytorch, own_source, slim_train_compact_export
from sacl_fast.config import Config


def test_the_loss_in_plain_pytorch(image_folder: Path):
    torch.manual_seed(0)
    encoder, losses = loss_in_plain_pytorch.train(
        *(str(image_folder), 2, 32, 16), model="mobilenetv3_small_050", workers=0
    )
    assert len(losses) == 6 and all(math.isfinite(loss) for loss in losses)
    assert losses[-1] < losses[0]
    assert encoder(torch.zeros(2, 3, 32, 32)).ndim == 2


@pytest.mark.parametrize(("loader", "workers"), [("torchvision", 2), ("auto", 0)])
def test_an_own_source(tmp_path: Path, tiny: Config, loader: str, workers: int):
    images = np.random.default_rng(0).integers(0, 256, (48, 20, 20, 3), np.uint8)
    np.save(tmp_path / "images.npy", images)
    source = own_source.NumpyImages(tmp_path / "images.npy")
    data = replace(tiny.data, root=None, loader=loader, workers=workers)
    result = sacl_fast.train(replace(tiny, data=data), source=source)
    assert result.finished and result.steps == 6
    assert sacl_fast.load_encoder(result.folder)(torch.zeros(2, 3, 16, 16)).shape == (2, 16)


def test_slim_train_compact_export(image_folder: Path, tmp_path: Path, monkeypatch):
    """The file gives what the slim classifier does, and needs no sacl_fast."""
    made: list[nn.Module] = []
    compact = slim_train_compact_export.compact

    def noted(*arguments):
        made.append(copy.deepcopy(compact(*arguments)))
        return made[-1]

    monkeypatch.setattr(slim_train_compact_export, "compact", noted)
    monkeypatch.setattr(slim_train_compact_export, "has_onnx", lambda: False)
    torch.manual_seed(0)
    encoder = timm.create_model("mobilenetv3_small_050", num_classes=0)
    save_model(encoder, str(tmp_path / "encoder.safetensors"))
    path = slim_train_compact_export.main(
        *(str(image_folder), tmp_path / "slim", "mobilenetv3_small_050"),
        *(str(tmp_path / "encoder.safetensors"), 2, 32, 16),
    )
    exported: nn.Module = torch.export.load(path).module()
    images = torch.rand(5, 3, 32, 32)
    torch.testing.assert_close(exported(images), made[0](images))
    assert exported(images).shape == (5, 2)
