"""What a training step asks of PyTorch."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sacl_fast.config import Config, EncoderConfig, ProjectorConfig, SlimConfig
from sacl_fast.data.views import CIFAR
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep


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


@pytest.mark.parametrize("width", [0.25, 1])
@pytest.mark.parametrize("mode", ["mask", "skip"])
@pytest.mark.parametrize("backend", ["auto", "torch"])
def test_narrow_strided_pointwise_convolutions_are_not_channels_last(width, mode, backend):
    """There oneDNN overwrites memory, now and then until something breaks."""
    config = Config(
        views=CIFAR,
        encoder=EncoderConfig(name="resnet20", width=width),
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
    assert any(last for *_, last in convolutions.seen) or width < 1
