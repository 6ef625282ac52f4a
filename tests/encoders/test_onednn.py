"""The way around a fault of oneDNN: which convolutions take it, and that it changes no value."""

import copy

import pytest
import torch
from timm.layers import ScaledStdConv2d
from torch import nn

from sacl_fast.config import Config, EncoderConfig, ProjectorConfig, SlimConfig
from sacl_fast.data.views.tables import CIFAR
from sacl_fast.encoders.onednn import avoid_memory_overwrite
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep
from sacl_fast.passes import choose_passes
from tests.operators import Convolutions


@pytest.mark.parametrize("name, width", [("resnet20", 0.25), ("resnet20", 1), ("repvgg_a0", 1)])
@pytest.mark.parametrize("mode", ["mask", "skip"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_narrow_strided_pointwise_convolutions_are_not_channels_last(name, width, mode, backend):
    """There oneDNN overwrites memory, now and then until something breaks."""
    config = Config(
        views=CIFAR,
        encoder=EncoderConfig(name=name, width=width),
        projector=ProjectorConfig(hidden=16, out=24),
        slim=SlimConfig(mode=mode, ratio=0.25),
        backend=backend,
        device="cpu",
    )
    ranks = Ranks(0, 1, torch.device("cpu"))
    passes = choose_passes(config, ranks.device, steps_per_epoch=1)
    step = TrainingStep(build_method(config, passes), config, ranks, steps_per_epoch=1)
    views = torch.randn(2, 4, 3, 32, 32).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    view_a, view_b = views.chunk(2)
    with Convolutions() as convolutions:
        step(view_a, view_b, 0)
    assert not any(convolutions.narrow())
    assert any(last for *_, last in convolutions.seen)


def test_what_avoids_it_is_the_same_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, (2, 3)), nn.Conv2d(8, 4, 1, 2, bias=False)).double()
    changed = copy.deepcopy(model)
    avoid_memory_overwrite(changed)
    changed = copy.deepcopy(changed)
    x = torch.randn(2, 3, 9, 14, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    results = []
    for m in (model, changed):
        own = x.clone().requires_grad_()
        y = m(own)
        results.append((y, *torch.autograd.grad(y.square().sum(), [own, *m.parameters()])))
    assert vars(changed[0])["forward"].args[0] is changed[0]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_convolution_with_a_forward_of_its_own_keeps_it():
    model = nn.Sequential(ScaledStdConv2d(4, 8, 1, stride=2, padding=0))
    avoid_memory_overwrite(model)
    assert "forward" not in vars(model[0])


def test_other_kinds_of_tensors_are_convolved_in_their_own_way():
    convolved = []

    class Other(torch.Tensor):
        @classmethod
        def __torch_function__(cls, func, types, args=(), kwargs=None):
            if func is torch.nn.functional.conv2d:
                convolved.append(tuple(args[0].shape))
            return super().__torch_function__(func, types, args, kwargs)

    model = nn.Sequential(nn.Conv2d(3, 8, 1, 2))
    avoid_memory_overwrite(model)
    model(torch.randn(1, 3, 8, 8).as_subclass(Other))
    assert convolved == [(1, 3, 8, 8)]  # all pixels, not only those that are read
