"""The settings of runs that take a second or two."""

from __future__ import annotations

from pathlib import Path

from sacl_fast.config import (
    Config,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    LogConfig,
    OptimConfig,
    ProjectorConfig,
    ViewConfig,
    ViewsConfig,
)


def tiny_run(images: Path, out: Path) -> Config:
    return Config(
        out=str(out),
        epochs=2,
        batch_size=16,
        device="cpu",
        data=DataConfig(root=str(images), workers=0),
        views=ViewsConfig(size=16, a=ViewConfig(), b=ViewConfig(solarize=0.2)),
        encoder=EncoderConfig(name="resnet20", width=0.25, drop_path=0.2),
        projector=ProjectorConfig(hidden=16, out=24),
        optim=OptimConfig(lr=1.0, warmup_epochs=1),
        log=LogConfig(every=1, tensorboard=False),
        eval=EvalConfig(every=1, recalibrate_batches=2, batch_size=16),
    )
