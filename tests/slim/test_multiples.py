"""Live channels that are filled up to a multiple of 8: as on GPUs, here on the CPU."""

from collections import defaultdict
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sacl_fast.encoders import build_encoder
from sacl_fast.ops import batch_norm_act
from sacl_fast.slim import Slicer, channels
from tests.modules import channels_last
from tests.slim.test_skip import compare


@pytest.fixture(autouse=True)
def multiples_on_the_cpu(monkeypatch):
    monkeypatch.setitem(channels.MULTIPLES, "cpu", 8)
    channels.live_in_either.cache_clear()
    yield
    channels.live_in_either.cache_clear()


@pytest.mark.parametrize(
    ("name", "width", "ratio"),
    [
        ("mobilenetv1_100", 0.5, 0.25),
        ("mobilenetv2_100", 0.5, 0.5),
        ("mobilenetv3_large_100", 0.5, 0.5),
        ("mobilenetv3_large_100", 0.5, 0.001),
        ("efficientnet_b0", 0.5, 0.75),
        ("tf_efficientnet_b0", 1.0, 0.25),
        ("resnet20", 6 / 16, 0.167),
    ],
)
def test_training_equals_the_masked_encoder(name, width, ratio):
    compare(name, width, ratio)
    compare(name, width, ratio, n=3, refreshes=2, norm_gradient="damped")


class Widths(TorchDispatchMode):
    """Of what compiled operators are given: operator -> channels of (more than one) images."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[str, list[int]] = defaultdict(list)

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "sacl_fast" and len(args[0]) > 1:
            self.seen[func.overloadpacket.__name__].append(args[0].shape[1])
        return func(*args, **(kwargs or {}))


@pytest.mark.skipif(not batch_norm_act.is_compiled(), reason="the compiled module is not built")
@pytest.mark.parametrize("name", ["mobilenetv1_100", "efficientnet_b0"])
def test_where_others_are_left_to_fill_them_from(name):
    torch.manual_seed(0)
    encoder = channels_last(build_encoder(name, image_size=64)).train()
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with Widths() as widths, Slicer(encoder, 0.5).mode("skip"):
        encoder(x).sum().backward()
    own = {
        conv.out_channels // 2 for conv in encoder.modules() if isinstance(conv, torch.nn.Conv2d)
    }
    for name in ("batch_norm_act", "slim_pointwise", "depthwise_conv_backward_input", "slim_gate"):
        # But for those that 1x1 convolutions give, as many as are kept, or all of them.
        odd = [k for k in widths.seen[name] if k % 8 and k not in own and 2 * k not in own]
        assert not odd, (name, odd)
