"""What a training step asks of PyTorch."""

import copy

import pytest
import torch
from timm.layers import ScaledStdConv2d
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from sacl_fast.config import Config, EncoderConfig, ProjectorConfig, SlimConfig
from sacl_fast.data.views.tables import CIFAR
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import (
    TrainingStep,
    autocast_dtype,
    precision_reason,
    stay_within_memory,
)


class Convolutions(TorchDispatchMode):
    """Notes the backward passes of convolutions: weight, stride, whether in channels-last."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            _, x, weight, _, stride, *_ = args
            last = x.is_contiguous(memory_format=torch.channels_last)
            self.seen.append((tuple(weight.shape), tuple(stride), last))
        return func(*args, **kwargs or {})


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
    step = TrainingStep(
        build_method(config), config, Ranks(0, 1, torch.device("cpu")), steps_per_epoch=1
    )
    views = torch.randn(2, 4, 3, 32, 32).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    with Convolutions() as convolutions:
        step(*views.chunk(2), 0)
    narrow = [
        last
        for (_, channels, *kernel), stride, last in convolutions.seen
        if kernel == [1, 1] and stride != (1, 1) and channels < 16
    ]
    assert not any(narrow)
    assert any(last for *_, last in convolutions.seen)


def test_what_stays_within_memory_is_the_same_convolution():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1, (2, 3)), nn.Conv2d(8, 4, 1, 2, bias=False)).double()
    changed = copy.deepcopy(model)
    stay_within_memory(changed)
    changed = copy.deepcopy(changed)
    x = torch.randn(2, 3, 9, 14, dtype=torch.float64).contiguous(memory_format=torch.channels_last)
    results = []
    for m in (model, changed):
        own = x.clone().requires_grad_()
        y = m(own)
        results.append((y, *torch.autograd.grad(y.square().sum(), [own, *m.parameters()])))
    assert "forward" in vars(changed[0]) and changed[0].forward.args[0] is changed[0]
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_a_convolution_with_a_forward_of_its_own_keeps_it():
    model = nn.Sequential(ScaledStdConv2d(4, 8, 1, stride=2, padding=0))
    stay_within_memory(model)
    assert "forward" not in vars(model[0])


def step_of(steps_per_epoch=30, **slim) -> TrainingStep:
    torch.manual_seed(0)
    config = Config(
        views=CIFAR,
        encoder=EncoderConfig(name="resnet20", width=0.5),
        projector=ProjectorConfig(hidden=16, out=24),
        slim=SlimConfig(mode="skip", **slim),
        device="cpu",
    )
    ranks = Ranks(0, 1, torch.device("cpu"))
    return TrainingStep(build_method(config), config, ranks, steps_per_epoch=steps_per_epoch)


def test_only_what_has_four_dimensions_is_channels_last():
    """Some encoders have 3-D or 1-D convolutions, whose weights have other dimensions."""
    config = Config(
        views=CIFAR,
        encoder=EncoderConfig(name="resnet20", width=0.25),
        projector=ProjectorConfig(hidden=8, out=8),
    )
    method = build_method(config)
    method.encoder.add_module("extra", nn.ModuleList([nn.Conv3d(2, 3, 2), nn.Conv1d(2, 3, 2)]))
    ranks = Ranks(0, 1, torch.device("cpu"))
    TrainingStep(method, config, ranks, steps_per_epoch=1)
    weights = [m.weight for m in method.modules() if isinstance(m, nn.Conv2d)]
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_slim_passes_are_recorded_where_that_pays():
    assert step_of(30).method.recorded is not None
    assert step_of(29).method.recorded is None
    assert step_of(1000, refresh_steps=29).method.recorded is None


def test_training_is_the_same_with_recorded_passes():
    views = torch.randn(2, 6, 3, 32, 32).flatten(0, 1)
    views = views.contiguous(memory_format=torch.channels_last).chunk(2)
    recorded, plain = step_of(), step_of()
    plain.method.recorded = None
    for i in range(6):
        if i == 4:
            recorded.method.slicer.refresh(), plain.method.slicer.refresh()
        assert torch.equal(recorded(*views, i)[0], plain(*views, i)[0])


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 1), None), ((7, 0), None), ((7, 5), None), ((8, 0), "bf16"), ((9, 0), "bf16")],
)
def test_auto_is_bf16_where_the_gpu_computes_in_it(monkeypatch, capability, dtype):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    expected = torch.bfloat16 if dtype else None
    assert autocast_dtype("auto", gpu) is expected
    reason = precision_reason("auto", gpu)
    assert (reason is None) == (dtype == "bf16")
    assert reason is None or "fp32, because Tesla V100 is older than bf16" in reason
    assert autocast_dtype("bf16", gpu) is torch.bfloat16  # as requested
    assert precision_reason("bf16", gpu) is None
    assert autocast_dtype("auto", torch.device("cpu")) is None
