"""What a training step asks of PyTorch."""

from dataclasses import replace

import torch
from torch import nn

from sacl_fast.config import Config, EncoderConfig, ProjectorConfig, SlimConfig
from sacl_fast.data.views.tables import CIFAR
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep
from sacl_fast.optim import Lars
from sacl_fast.passes import Passes, choose_passes


def step_of(*, recorded: bool) -> TrainingStep:
    torch.manual_seed(0)
    config = Config(
        views=CIFAR,
        encoder=EncoderConfig(name="resnet20", width=0.5),
        projector=ProjectorConfig(hidden=16, out=24),
        slim=SlimConfig(mode="skip"),
        device="cpu",
    )
    ranks = Ranks(0, 1, torch.device("cpu"))
    passes = choose_passes(config, ranks.device, steps_per_epoch=100)
    assert passes.recorded
    method = build_method(config, replace(passes, recorded=recorded))
    return TrainingStep(method, config, ranks, steps_per_epoch=100)


def test_only_what_has_four_dimensions_is_channels_last():
    """Some encoders have 3-D or 1-D convolutions, whose weights have other dimensions."""
    config = Config(
        views=CIFAR,
        encoder=EncoderConfig(name="resnet20", width=0.25),
        projector=ProjectorConfig(hidden=8, out=8),
    )
    method = build_method(config, Passes())
    method.encoder.add_module("extra", nn.ModuleList([nn.Conv3d(2, 3, 2), nn.Conv1d(2, 3, 2)]))
    ranks = Ranks(0, 1, torch.device("cpu"))
    TrainingStep(method, config, ranks, steps_per_epoch=1)
    weights = [m.weight for m in method.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_training_is_the_same_with_recorded_passes():
    views = torch.randn(2, 6, 3, 32, 32).flatten(0, 1)
    view_a, view_b = views.contiguous(memory_format=torch.channels_last).chunk(2)
    recorded, plain = step_of(recorded=True), step_of(recorded=False)
    for i in range(6):
        if i == 4:
            recorded.method.slicer.refresh()
            plain.method.slicer.refresh()
        assert torch.equal(recorded(view_a, view_b, i)[0], plain(view_a, view_b, i)[0])


def test_the_optimiser_has_the_backend_that_the_run_resolved():
    step = step_of(recorded=False)
    assert isinstance(step.optimizer, Lars)
    assert step.optimizer.backend == step.backends["lars"].backend == "torch"
