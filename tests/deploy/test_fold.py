"""Folding batch norms of sums and of joined channels changes nothing but rounding."""

from __future__ import annotations

import operator

import pytest
import torch
from timm.layers import ScaledStdConv2d
from torch import Tensor, fx, nn

from sacl_fast.deploy.fold import fold_batch_norms
from sacl_fast.slim import Slicer
from sacl_fast.slim.export import compact
from tests.slim.test_skip import encoder_of


def left(module: fx.GraphModule) -> int:
    """Batch norms behind something else than a convolution."""
    count = 0
    for node in module.graph.nodes:
        if node.op == "call_module":
            (given,) = node.all_input_nodes
            is_norm = isinstance(module.get_submodule(str(node.target)), nn.BatchNorm2d)
            count += is_norm and given.target in (operator.add, torch.cat)
    return count


@pytest.mark.parametrize("name", ["test_efficientnet", "resnet10t"])
def test_slim_encoders(name: str):
    encoder = encoder_of(name).eval()
    module = compact(encoder, Slicer(encoder, 0.5).masks, statistics="encoder")
    assert isinstance(module, fx.GraphModule) and left(module) > 2
    images = torch.randn(2, 3, 64, 64, dtype=torch.float64)
    with torch.no_grad():
        expected = module(images)
        folded = fold_batch_norms(module)
        torch.testing.assert_close(folded(images), expected, rtol=1e-9, atol=1e-9)
    assert left(module) == 0


class Sums(nn.Module):
    """Sums that a norm follows, each with another reason to leave it alone but the last."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.twice, self.other, self.narrow = (
            nn.Conv2d(3, count, 3, padding=1) for count in (4, 4, 4, 1)
        )
        self.last, self.without_bias = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 4, 1, bias=False)
        self.a, self.b = nn.Conv2d(4, 4, 1, bias=False), nn.Conv2d(4, 4, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(4, affine=number != 1) for number in range(6))

    def forward(self, x: Tensor) -> Tensor:
        read = self.first(x)
        y = self.norms[0](read + self.other(x)) + read
        y = self.norms[1](self.twice(x) + self.twice(x.relu())) + y
        y = self.norms[2](self.a(y) + 1.5)
        once = self.narrow(x)
        y = self.norms[3](self.b(y) + once)
        y = self.norms[4](y + y)
        return self.norms[5](self.last(y) + self.without_bias(y))


class Joined(nn.Module):
    """Values joined in each way of writing it; one convolution's weight is standardised."""

    def __init__(self) -> None:
        super().__init__()
        self.convs = nn.ModuleList(nn.Conv2d(3, 2, 1) for _ in range(7))
        self.convs.append(ScaledStdConv2d(3, 2, 1))
        self.norms = nn.ModuleList(nn.BatchNorm2d(count) for count in (4, 4, 4, 2))

    def forward(self, x: Tensor) -> Tensor:
        a, b, c, d, e, f, g, standardised = (conv(x) for conv in self.convs)
        y = self.norms[0](torch.cat((a, b), 1)) + self.norms[1](torch.cat((c, d), dim=1))
        y = self.norms[2](torch.cat([g, standardised], dim=1)) + y
        return torch.cat((y, y)) + self.norms[3](torch.cat((e, f))).repeat(1, 2, 1, 1)


@pytest.mark.parametrize(("network", "stay"), [(Sums, 5), (Joined, 2)])
def test_what_is_read_elsewhere_stays(network, stay):
    torch.manual_seed(0)
    encoder = network()
    for name, statistic in encoder.named_buffers():
        if name.endswith(("mean", "var")):
            statistic.uniform_(0.1, 3)
    module = fx.symbolic_trace(encoder.double().eval())
    images = torch.randn(2, 3, 8, 8, dtype=torch.float64)
    with torch.no_grad():
        expected = module(images)
        torch.testing.assert_close(fold_batch_norms(module)(images), expected)
    assert left(module) == stay
