"""What a run says of itself: only what it uses, and what it leaves unused that it could."""

from __future__ import annotations

from dataclasses import replace

import torch

from sacl_fast.config import Config, SlimConfig
from sacl_fast.engine.description import describe
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep
from sacl_fast.ops.backend import SLIM_OPERATORS
from sacl_fast.passes import choose_passes

CPU = Ranks(0, 1, torch.device("cpu"))


def step_of(config: Config) -> TrainingStep:
    passes = choose_passes(config, CPU.device, steps_per_epoch=3)
    return TrainingStep(build_method(config, passes), config, CPU, steps_per_epoch=3)


def lines(config: Config) -> list[str]:
    return list(describe(config, CPU, step_of(config), 3))


def starts(config: Config) -> set[str]:
    return {line.split(":")[0] for line in lines(config) if ":" in line}


def test_operators_that_the_run_does_not_use_are_not_named(tiny):
    slim = ", ".join(SLIM_OPERATORS)
    assert starts(tiny) == {"xcorr_loss", slim, "lars", "slim passes"}
    adamw = replace(tiny, optim=replace(tiny.optim, name="adamw"))
    assert starts(adamw) == {"xcorr_loss", slim, "slim passes"}
    assert starts(replace(tiny, slim=SlimConfig(ratio=1.0))) == {"xcorr_loss", "lars"}


def test_sizes(tiny):
    first, second, *_ = lines(tiny)
    assert first == "3 steps an epoch, batches of 16 images"
    assert second.startswith("resnet20 x 0.25, 0.02 M parameters, slim ratio 0.5, float32 on CPU")


def test_an_encoder_that_cannot_be_slimmed_is_said(tiny):
    vit = replace(
        tiny,
        encoder=replace(tiny.encoder, name="vit_tiny_patch16_224", width=1.0),
        views=replace(tiny.views, size=32),
    )
    said = "vit_tiny_patch16_224 has no convolution to slim: slim passes leave nothing out"
    assert [line for line in lines(vit) if line.startswith(said)]
    assert starts(vit) == {"xcorr_loss", "lars", "vit_tiny_patch16_224 has no convolution to slim"}
    assert not any("no convolution to slim" in line for line in lines(tiny))


def test_gpus_that_stay_unused_are_named(tiny, monkeypatch):
    step = step_of(tiny)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "GPU")
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    gpu = torch.device("cuda", 0)
    said = list(describe(tiny, Ranks(0, 1, gpu), step, 3))
    hint = "1 of 4 GPUs is used; torchrun --nproc-per-node 4 -m sacl_fast train ... uses all"
    assert any(line.startswith(hint) for line in said)
    assert any(line.startswith("convolutions: cuDNN takes the fastest") for line in said)
    assert not any(line.startswith("convolutions") for line in lines(tiny))
    assert not any(" of 4 GPUs" in line for line in describe(tiny, Ranks(0, 4, gpu), step, 3))


def test_how_the_slim_passes_run_is_said(tiny):
    (line,) = (line for line in lines(tiny) if line.startswith("slim passes: "))
    mode = choose_passes(tiny, CPU.device, steps_per_epoch=3)
    assert line == f"slim passes: {mode.mode} ({mode.reason})"
    often = replace(tiny, slim=SlimConfig(mode="skip", refresh_steps=100))
    assert "slim passes: skip, recorded (as requested)" in lines(often)
