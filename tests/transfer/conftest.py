"""A tiny run, labelled images, VOC 2007 in small, and how the command is called."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from sacl_fast.config import (
    Config,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    ProjectorConfig,
    ViewsConfig,
)
from sacl_fast.engine.trainer import train

NAMES = {"trainval": [f"{i:06}" for i in range(1, 21)], "test": [f"{i:06}" for i in range(21, 31)]}
FEW: dict[str, Any] = dict(
    steps=6, batch_size=16, size=16, eval_every=3, checkpoint_every=2, log_every=1
)
FEW_ARGS = (
    "--steps 6 --batch-size 16 --size 16 --eval-every 3 --checkpoint-every 2 --log-every 1".split()
)


def few(**other: Any) -> dict[str, Any]:
    return FEW | other


def network(path: Path) -> dict[str, torch.Tensor]:
    return load_file(path)


@pytest.fixture(scope="session")
def labelled(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 30 validation images of three classes that are hard to tell apart."""
    root = tmp_path_factory.mktemp("labelled")
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 10)):
        for i, name in enumerate(("one", "three", "two")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for nth in range(count):
                pixels = rng.normal(90 + 30 * i, 60, (20, 20, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{nth}.png")
    return root


@pytest.fixture(scope="session")
def run_once(labelled: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return train(
        Config(
            out=str(tmp_path_factory.mktemp("run") / "run"),
            epochs=1,
            batch_size=16,
            device="cpu",
            data=DataConfig(root=str(labelled), workers=0),
            views=ViewsConfig(size=16),
            encoder=EncoderConfig(name="resnet20", width=0.25),
            projector=ProjectorConfig(hidden=16, out=24),
            optim=OptimConfig(lr=1.0, warmup_epochs=0),
            log=LogConfig(tensorboard=False),
            eval=EvalConfig(recalibrate_batches=2, batch_size=16),
        )
    ).folder


@pytest.fixture
def run_folder(run_once: Path, tmp_path: Path) -> Path:
    """Of a run of three steps on those images."""
    return Path(shutil.copytree(run_once, tmp_path / "run"))


def annotation(*objects: tuple[str, bool]) -> str:
    each = "".join(
        f"<object><name>{name}</name><difficult>{int(difficult)}</difficult></object>"
        for name, difficult in objects
    )
    return f"<annotation><folder>VOC2007</folder>{each}</annotation>"


@pytest.fixture
def voc(tmp_path: Path) -> Path:
    """20 + 10 images in the official layout: dark ones show a cat, every third a person, the last
    of each split a difficult dog."""
    root = tmp_path / "voc" / "VOCdevkit" / "VOC2007"
    for part in ("JPEGImages", "Annotations", "ImageSets/Main"):
        (root / part).mkdir(parents=True)
    rng = np.random.default_rng(0)
    for split, names in NAMES.items():
        (root / "ImageSets/Main" / f"{split}.txt").write_text("\n".join(names) + "\n")
        for i, name in enumerate(names):
            objects = [("cat", False), ("cat", True)] if i % 2 else [("car", False)]
            objects += [("person", False)] * (i % 3 == 0)
            objects += [("dog", True)] if name == names[-1] else []
            pixels = rng.normal(60 if i % 2 else 180, 30, (24, 30, 3)).clip(0, 255)
            Image.fromarray(pixels.astype(np.uint8)).save(root / "JPEGImages" / f"{name}.jpg")
            (root / "Annotations" / f"{name}.xml").write_text(annotation(*objects))
    return tmp_path / "voc"
