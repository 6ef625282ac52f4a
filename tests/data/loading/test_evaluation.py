"""Images as a network is evaluated on them: in order, resized, without bad ones."""

from __future__ import annotations

import multiprocessing
import os
import signal
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from PIL import Image

from sacl_fast.config import DataConfig, EvalConfig, ViewsConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import ArraySource
from sacl_fast.data.loading.batch import Normalise
from sacl_fast.data.loading.evaluation import EvalLoader
from sacl_fast.data.loading.waiting import NoBatch
from sacl_fast.errors import UserError
from tests.data.loading.cases import CPU, random_source, torchvision_config

source = pytest.fixture(random_source)


@pytest.mark.parametrize("workers", [0, 2])
def test_eval_loader_keeps_the_order(source: ArraySource, workers: int) -> None:
    given = torchvision_config(workers, eval=EvalConfig(batch_size=4))
    indices = np.array([30, 2, 17, 5, 9, 11])
    loader = EvalLoader(source, indices, given, CPU)
    found = []
    for _ in range(2):
        found = list(loader)
        assert [len(labels) for _, labels in found] == [4, 2] and len(loader) == 2
        assert torch.cat([labels for _, labels in found]).tolist() == (indices % 5).tolist()
    resized = source.load(30).resize((16, 16), Image.Resampling.BICUBIC)
    expected = Normalise(given.views, CPU, True)(torch.from_numpy(np.array(resized))[None])
    torch.testing.assert_close(found[0][0][:1], expected)


@pytest.mark.parametrize("size", [(300, 200), (200, 301), (128, 128), (90, 500), (1, 40)])
def test_large_images_are_resized_and_cropped_as_by_torchvision(size: tuple[int, int]) -> None:
    low = np.random.default_rng(0).integers(0, 256, (8, 8, 3), np.uint8)
    image: Any = Image.fromarray(low).resize(size, Image.Resampling.BICUBIC)
    one = ArraySource("one", np.asarray(image)[None], [0], ())
    given = torchvision_config(
        views=ViewsConfig(size=112, mean=(0.0, 0.0, 0.0), std=(1.0, 1.0, 1.0))
    )
    ((found, _),) = EvalLoader(one, np.array([0]), given, CPU)
    short = F.resize(image, [128], F.InterpolationMode.BICUBIC)
    expected = F.to_dtype(F.to_image(F.center_crop(short, [112, 112])), torch.float32, scale=True)
    off = 255 * (found[0] - expected).abs()
    assert off.max() < 2.01 and off.mean() < 0.1  # Pillow's coefficients have fixed point


def test_eval_loader_leaves_bad_images_out(folder: Path) -> None:
    data = DataConfig(root=str(folder), workers=0)
    given = torchvision_config(data=data, eval=EvalConfig(batch_size=2))
    loader = EvalLoader(open_sources(data, 0).train, np.arange(20), given, CPU)
    found = list(loader)
    assert [len(images) for images, _ in found] == [2] * 9
    assert sorted(loader.bad) == [4, 5]
    strict = replace(given, data=replace(data, max_bad_share=0.0))
    with pytest.raises(UserError, match="unreadable"):
        list(EvalLoader(open_sources(data, 0).train, np.arange(20), strict, CPU))


def test_a_worker_killed_in_evaluation_is_an_error(source: ArraySource) -> None:
    given = torchvision_config(2, eval=EvalConfig(batch_size=1))
    with pytest.raises(NoBatch, match="killed by SIGKILL"):
        for _ in EvalLoader(source, np.arange(37), given, CPU):
            for worker in multiprocessing.active_children()[:1]:
                os.kill(worker.pid, signal.SIGKILL)  # type: ignore
    assert not multiprocessing.active_children()
