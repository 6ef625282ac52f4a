"""What a run with a loss that is not finite is told."""

import pytest
import torch

from sacl_fast.config import (
    Config,
    EncoderConfig,
    LossConfig,
    OptimConfig,
    ProjectorConfig,
    SlimConfig,
    ViewsConfig,
)
from sacl_fast.engine.diagnosis import what_may_help


def configured(name: str = "resnet20", **parts) -> Config:
    projector = ProjectorConfig(hidden=8, out=8)
    encoder = EncoderConfig(name=name, width=0.25 if name == "resnet20" else 1.0)
    return Config(views=ViewsConfig(size=32), encoder=encoder, projector=projector, **parts)


@pytest.mark.parametrize(
    ("config", "amp_dtype", "said", "unsaid"),
    [
        (configured(), None, ["--optim.lr", "damped"], ["fp32", "warmup", "literal"]),
        (configured(), torch.bfloat16, ["--optim.lr", "--precision fp32"], ["warmup"]),
        (configured(optim=OptimConfig(warmup_epochs=0)), None, ["warmup-epochs 1"], ["fp32"]),
        (configured(slim=SlimConfig(ratio=1.0)), None, ["--optim.lr"], ["damped"]),
        (configured(slim=SlimConfig(norm_gradient="damped")), None, ["--optim.lr"], ["damped"]),
        (configured(slim=SlimConfig(norm_gradient="exact")), None, ["--optim.lr"], ["grow"]),
        (configured(loss=LossConfig(off_diagonal="literal")), None, ["squared"], ["--optim.lr"]),
        (
            configured("repvit_m0_9", slim=SlimConfig(norm_gradient="exact")),
            torch.bfloat16,
            ["repvit_m0_9", "--slim.norm-gradient damped", "at any rate and precision"],
            ["--optim.lr", "--precision"],
        ),
    ],
)
def test_only_what_can_help(config, amp_dtype, said, unsaid):
    sentence = what_may_help(config, amp_dtype)
    assert all(part in sentence for part in said), sentence
    assert not any(part in sentence for part in unsaid), sentence
