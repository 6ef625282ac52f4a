"""Training steps of two gloo ranks: what they ask of the host, and how gradients are sent."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from sacl_fast.config import (
    Config,
    EncoderConfig,
    EngineConfig,
    OptimConfig,
    ProjectorConfig,
    SlimConfig,
)
from sacl_fast.data.views.tables import CIFAR
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep
from sacl_fast.passes import choose_passes
from tests.engine.ranks import in_ranks
from tests.waiting import NoWaiting

CONFIG = Config(
    batch_size=8,
    epochs=2,
    views=CIFAR,
    encoder=EncoderConfig(name="resnet20", width=0.25),
    projector=ProjectorConfig(hidden=16, out=24),
    optim=OptimConfig(lr=0.1, warmup_epochs=0),
    device="cpu",
)


def step_of(config: Config) -> TrainingStep:
    torch.manual_seed(0)
    ranks = Ranks(dist.get_rank(), dist.get_world_size(), torch.device("cpu"))
    passes = choose_passes(config, ranks.device, steps_per_epoch=100)
    return TrainingStep(build_method(config, passes), config, ranks, steps_per_epoch=100)


def views(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(10 * step + dist.get_rank())
    a, b = torch.randn(2, 4, 3, 16, 16, generator=generator)
    return (
        a.contiguous(memory_format=torch.channels_last),
        b.contiguous(memory_format=torch.channels_last),
    )


def never_wait() -> None:
    pairs: tuple[tuple[Any, Any, Any], ...] = (  # every two settings together
        ("lars", "fp32", "mask"),
        ("lars", "bf16", "skip"),
        ("adamw", "fp32", "skip"),
        ("adamw", "bf16", "mask"),
    )
    for name, precision, mode in pairs:
        optim = replace(CONFIG.optim, name=name)
        step = step_of(
            replace(CONFIG, optim=optim, precision=precision, slim=SlimConfig(mode=mode))
        )
        for i in range(3):
            with NoWaiting():
                step(*views(i), i)
        assert step.weights_are_finite()


def gradients_in_bf16() -> None:
    def gradients(config: Config) -> dict[str, Tensor]:
        step = step_of(config)
        step(*views(0), 0)
        found = ((name, p.grad) for name, p in step.method.named_parameters())
        return {name: gradient for name, gradient in found if gradient is not None}

    exact = gradients(CONFIG)
    sent = gradients(replace(CONFIG, engine=EngineConfig(gradient_type="bf16")))
    for name, gradient in sent.items():
        all_ranks = [torch.empty_like(gradient) for _ in range(dist.get_world_size())]
        dist.all_gather(all_ranks, gradient.contiguous())
        assert torch.equal(*all_ranks), name
    assert sent.keys() == exact.keys()
    largest = max(gradient.norm() for gradient in exact.values())
    errors = [float((sent[name] - exact[name]).norm() / largest) for name in exact]
    assert 1e-4 < max(errors) < 1e-2, max(errors)


def own_norms_before_slimming_starts() -> None:
    step = step_of(replace(CONFIG, slim=SlimConfig(batch_norm="separate", warmup_epochs=1)))
    step.method.slicer.enabled = False
    for i in range(3):
        step.method.slicer.enabled = i == 2
        step(*views(i), i)
    gradients = [p.grad for norm in step.method.slicer.norms.values() for p in norm.parameters()]
    assert all(g is not None and g.isfinite().all() for g in gradients)


def all_scenes() -> None:
    never_wait()
    gradients_in_bf16()
    own_norms_before_slimming_starts()


def test_steps_among_ranks():
    in_ranks(2, all_scenes)
