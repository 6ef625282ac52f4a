"""What ``engine.traffic`` and ``bench_traffic`` count, by hand."""

import pytest
import torch
import torch.nn.functional as F
from bench_traffic import convolution_outputs, measure
from torch import nn

from sacl_fast.engine.traffic import Traffic


def traffic(function) -> tuple[dict[str, int], int, int]:
    with Traffic() as seen:
        function()
    return dict(seen.values), seen.operators, seen.launches


def test_a_chain_of_operators():
    x, y = torch.randn(2, 3, 4, 5), torch.randn(3, 1, 1)  # 120 and 3 values

    def chain():
        z = (x.transpose(1, 2) + y.expand(2, 3, 4, 5).transpose(1, 2)).view(2, 4, 3, 5)
        z.mul_(z)  # itself twice, but in memory once
        torch.empty_like(z).copy_(z)
        z.zero_()

    values, operators, launches = traffic(chain)
    assert values == {
        "add": 120 + 3 + 120,
        "mul_": 120 + 120,
        "copy_": 120 + 120,
        "zero_": 120,
    }
    assert launches == 4 and operators > launches


def test_forward_and_backward_of_a_layer():
    conv = nn.Conv2d(3, 4, 1, bias=False)  # 12 weights
    x = torch.randn(2, 3, 5, 5)  # 150 values; the layer's 200
    values, *_ = traffic(lambda: F.relu(conv(x)).backward(torch.ones(2, 4, 5, 5)))
    assert values["convolution"] == 150 + 12 + 200
    assert values["relu"] == 200 + 200
    assert values["threshold_backward"] == 200 + 200 + 200
    assert values["convolution_backward"] == 200 + 150 + 12 + 12  # no image gradient


def test_y():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Conv2d(4, 2, 3, stride=2))
    assert convolution_outputs(model.train(), 5) == 4 * 25 + 2 * 4
    assert model.training


@pytest.mark.parametrize("plan", ["eager+mask", "dense+skip", "fused"])
def test_a_step(plan):
    row = measure("resnet20", 0.5, plan, size=16, batch=256)
    assert 15 < row["in_y"] < 60
    assert row["launches"] < row["operators"]
    assert row["gbytes"] == pytest.approx(row["in_y"] * row["y_gbytes"], rel=0.1)


def test_products_and_bytes():
    x = torch.randn(2, 6, 5, 5, dtype=torch.bfloat16, requires_grad=True)
    conv = nn.Conv2d(6, 12, 3, padding=1, groups=6, bias=False).bfloat16()
    with Traffic() as seen:
        y = conv(x)
    assert seen.flops == 2 * (2 * 12 * 25) * 9  # each value of y: nine taps of one channel
    assert seen.bytes == 2 * (2 * 6 * 25 + 12 * 9 + 2 * 12 * 25)
    with Traffic() as seen:
        y.backward(torch.ones_like(y))
    assert seen.flops == 2 * 2 * (2 * 12 * 25) * 9  # both gradients, as many each
    with Traffic() as seen:
        torch.mm(torch.randn(3, 4), torch.randn(4, 5))
    assert seen.flops == 2 * 3 * 4 * 5
