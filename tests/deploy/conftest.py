"""A run to export, trained once for each file of tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from sacl_fast.config import (
    Config,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    LogConfig,
    ProjectorConfig,
    ViewsConfig,
)
from sacl_fast.engine.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Config(
        preset="demo",
        out=str(tmp_path_factory.mktemp("runs") / "run"),
        epochs=1,
        batch_size=16,
        device="cpu",
        data=DataConfig(source="demo", limit=48, workers=0),
        views=ViewsConfig(size=16, mean=(0.4, 0.5, 0.6)),
        encoder=EncoderConfig(name="resnet20", width=0.5),
        projector=ProjectorConfig(hidden=16, out=24),
        log=LogConfig(every=1, tensorboard=False),
        eval=EvalConfig(k=5, bank=40, queries=20, recalibrate_batches=2, batch_size=16),
    )
    return train(config).folder
