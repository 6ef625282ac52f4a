"""Functions of two operands, on an activation in parts against the same on its dense form."""

import pytest
import torch
from timm.layers import DropPath, SqueezeExcite

from sacl_fast.slim.tensor import SlimTensor
from tests.slim.activations import FORMS, C, H, N, W, activation, agree, stays_slim

STAYS_SLIM = {
    "scalar": lambda x: 2 - x / 3 + x * 2 - 1,
    "zero-dim": lambda x: x * torch.tensor(3.0, dtype=torch.float64),
    "channels": lambda x: torch.linspace(0, 1, C, dtype=torch.float64).view(1, C, 1, 1) * x,
    "gate": lambda x: x * torch.linspace(0, 1, N * C, dtype=torch.float64).view(N, C, 1, 1),
    "gate in place": lambda x: (x + 0).mul_(torch.rand(1, C, 1, 1, dtype=torch.float64)),
    "reversed": lambda x: torch.rand(C, 1, 1, dtype=torch.float64) - x,
    "sum with itself": lambda x: x + x.relu(),
    "drop path": DropPath(0.5),
    "layer scale": lambda x: x.mul(torch.rand(C, 1, 1, dtype=x.dtype)),
}
TURNS_DENSE = {
    "add dense": lambda x: x + torch.ones(N, C, H, W, dtype=x.dtype),
    "dense add": lambda x: torch.ones(N, C, H, W, dtype=x.dtype) + x,
    "subtract from dense": lambda x: torch.ones(N, C, H, W, dtype=x.dtype) - x,
    "dense add_": lambda x: torch.ones(N, C, H, W, dtype=x.dtype).add_(x),
    "larger": lambda x: x[:1] + torch.ones(N, C, H, W, dtype=x.dtype),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STAYS_SLIM)
def test_on_parts(name, form, caplog):
    stays_slim(STAYS_SLIM[name], form, caplog)


@pytest.mark.parametrize("form", ["constant", "map", "by_sample"])
@pytest.mark.parametrize("name", TURNS_DENSE)
def test_made_dense(name, form):
    agree(TURNS_DENSE[name], form)


def test_different_live_channels():
    others = activation("map", seed=3)[0].parts

    def add(x):
        return x + SlimTensor(others, x.shape) if isinstance(x, SlimTensor) else x + dense_other

    dense_other = SlimTensor(others, torch.Size((N, C, H, W))).dense()
    out = agree(add, "constant")
    assert isinstance(out, SlimTensor) and len(out.parts[0].channels) > 4


@pytest.mark.parametrize("form", FORMS)
def test_squeeze_excite(form):
    block = SqueezeExcite(C, rd_channels=3).double()
    assert isinstance(agree(lambda x: block(x), form), SlimTensor)
