"""``SlimConv2d`` against a masked convolution."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sacl_fast.slim import Slicer, SlimConv2d

CASES = {
    "1x1": {"kernel_size": 1},
    "strided": {"kernel_size": 3, "stride": 2, "padding": 1},
    "no bias": {"kernel_size": 3, "bias": False, "dilation": 2},
    "grouped": {"kernel_size": 3, "groups": 2, "padding": "same"},
    "depthwise": {"kernel_size": 3, "groups": 8},
    "reflected": {"kernel_size": 3, "padding": 1, "padding_mode": "reflect"},
}


@pytest.mark.parametrize("options", CASES.values(), ids=CASES)
def test_equals_a_masked_convolution(options):
    torch.manual_seed(0)
    slim = SlimConv2d(8, 16, ratio=0.4, **options).double()
    masked = nn.Conv2d(8, 16, **options).double()
    kept = slim.mask.double()
    assert kept.sum() == 6
    with torch.no_grad():
        for name, p in masked.named_parameters():
            p.copy_(slim.get_parameter(name) * kept.view(-1, *[1] * (p.ndim - 1)))
    x = torch.randn(3, 8, 9, 7, dtype=torch.float64)
    outputs = [conv(x) for conv in (slim, masked)]
    torch.testing.assert_close(*outputs)
    for y in outputs:
        y.square().sum().backward()
    for name, p in masked.named_parameters():
        torch.testing.assert_close(
            slim.get_parameter(name).grad, p.grad * kept.view(-1, *[1] * (p.ndim - 1))
        )


def test_inside_a_slim_encoder():
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), SlimConv2d(8, 8, 3), nn.BatchNorm2d(8)
    ).double()
    slim = encoder[3]
    assert isinstance(slim, SlimConv2d)
    slim.keep(0.5)
    x, outputs = torch.randn(2, 3, 9, 9, dtype=torch.float64), []
    for mode in ("mask", "skip"):
        with Slicer(encoder, 0.5, exclude=(r"^3$",)).mode(mode):
            outputs.append(encoder(x))
    torch.testing.assert_close(*outputs)


def test_the_choice_is_saved_and_can_be_given():
    conv, other = SlimConv2d(4, 6, 1, ratio=0.5), SlimConv2d(4, 6, 1)
    other.load_state_dict(conv.state_dict())
    x = torch.randn(1, 4, 2, 2)
    torch.testing.assert_close(other(x), conv(x))
    assert "kept=3" in repr(other)
    other.keep(torch.tensor([True, *[False] * 5]))
    assert not other(x)[:, 1:].any() and other(x)[:, 0].any()
    torch.testing.assert_close(other(x)[:, :1], F.conv2d(x, other.weight[:1], other.bias[:1]))


@pytest.mark.parametrize("mask", [[True] * 5, [False] * 6])
def test_a_mask_that_cannot_be(mask):
    with pytest.raises(ValueError, match=r"shape \(6,\) that keeps at least one works"):
        SlimConv2d(4, 6, 1).keep(torch.tensor(mask))


@pytest.mark.parametrize("ratio", [0, -1, 1.5])
def test_a_ratio_that_cannot_be(ratio):
    with pytest.raises(ValueError, match="above 0 and at most 1 works"):
        SlimConv2d(4, 6, 1, ratio=ratio)
