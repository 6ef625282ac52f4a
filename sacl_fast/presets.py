"""The published recipes as configurations, by name."""

from __future__ import annotations

from dataclasses import replace

from sacl_fast.checks import check, shown
from sacl_fast.config import (
    Config,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    LossConfig,
    OptimConfig,
    ProjectorConfig,
    SlimConfig,
)
from sacl_fast.data.views import tables
from sacl_fast.errors import UserError, nearest

# The projector's output D sets the loss scale: about 196 / D.
_PROJECTOR_2048, _SCALE_2048 = ProjectorConfig(hidden=2048, out=2048), LossConfig(scale=0.1)
_PROJECTOR_4096, _SCALE_4096 = ProjectorConfig(hidden=4096, out=4096), LossConfig(scale=0.048)

_IMAGENET1K = Config(
    preset="imagenet1k",
    epochs=100,
    views=tables.IMAGENET,
    encoder=EncoderConfig(name="mobilenetv3_large_100"),
    projector=_PROJECTOR_4096,
    loss=_SCALE_4096,
    optim=OptimConfig(lr=0.8, weight_decay=1.5e-6, eta=0.001, clip=False),
)

_IMAGENET100 = Config(
    preset="imagenet100",
    epochs=400,
    views=tables.IMAGENET,
    encoder=EncoderConfig(name="mobilenetv1_100"),
    projector=_PROJECTOR_2048,
    loss=_SCALE_2048,
    optim=OptimConfig(lr=0.3, weight_decay=1e-4, eta=0.02, clip=True),
)

_CIFAR10 = replace(
    _IMAGENET100,
    preset="cifar10",
    epochs=1000,
    data=DataConfig(source="cifar10", root="data/cifar10"),
    views=tables.CIFAR,
    encoder=EncoderConfig(name="mobilenetv1_100", stem="cifar"),
)

_TINY_IMAGENET = replace(
    _IMAGENET100,
    preset="tiny_imagenet",
    views=tables.TINY_IMAGENET,
    encoder=EncoderConfig(name="mobilenetv1_100", stem="stride1"),
)

_IMAGENET100_VIT = replace(
    _IMAGENET100,
    preset="imagenet100_vit",
    encoder=EncoderConfig(name="vit_tiny_patch16_224"),
    slim=SlimConfig(ratio=1.0),
    optim=OptimConfig(name="adamw", lr=0.005, weight_decay=1e-4),
)

# Not published: one's own photos, 5,000 to 50,000 of them. AdamW and small batches, since that many
# images are few steps; what was run of it is in docs/training.md. The blur's window is a tenth of
# the image, as published at other sizes.
_PHOTOS = Config(
    preset="photos",
    epochs=400,
    batch_size=64,
    views=replace(tables.IMAGENET, size=160, blur_window=17),
    encoder=EncoderConfig(name="mobilenetv3_large_100"),
    projector=_PROJECTOR_2048,
    loss=_SCALE_2048,
    optim=OptimConfig(name="adamw", lr=0.004, weight_decay=1e-4, warmup_epochs=20),
)

# Not published: what shows learning on two CPU cores within two minutes.
_DEMO = Config(
    preset="demo",
    epochs=5,
    batch_size=64,
    data=DataConfig(source="demo"),
    views=tables.DEMO,
    encoder=EncoderConfig(name="resnet20"),
    projector=ProjectorConfig(hidden=256, out=256),
    loss=LossConfig(scale=0.1),
    optim=OptimConfig(name="adamw", lr=0.008, weight_decay=1e-4, warmup_epochs=1),
    eval=EvalConfig(every=2, bank=2000, recalibrate_batches=2),
)


def _barlow_twins(config: Config) -> Config:
    """The supplement's baseline: the same recipe, one encoder, no distillation."""
    return replace(
        config,
        preset=f"barlow_twins_{config.preset}",
        slim=replace(config.slim, ratio=1.0),
        loss=replace(config.loss, distillation="none"),
    )


_METHODS = (_IMAGENET1K, _IMAGENET100, _CIFAR10, _TINY_IMAGENET)

PRESETS: dict[str, Config] = {
    config.preset: config
    for config in (_DEMO, _PHOTOS, *_METHODS, _IMAGENET100_VIT, *map(_barlow_twins, _METHODS))
}


def get_preset(name: str) -> Config:
    """The preset of that name; an unknown one is answered with the nearest."""
    name = check(name, str, "the preset's name")
    if name not in PRESETS:
        raise UserError(f"unknown preset {shown(name)}; {nearest(name[:100], PRESETS)}")
    return PRESETS[name]
