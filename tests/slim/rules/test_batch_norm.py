"""Batch norms of an activation in parts against those of its dense form."""

import copy
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d
from torch import nn

from sacl_fast.ops.batch_norm_act import Activation, batch_norm_act
from sacl_fast.slim.rules.elementwise import activation
from sacl_fast.slim.tensor import SlimTensor
from tests.slim.activations import FORMS, C, agree


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}],
    ids=["default", "cumulative", "no affine", "no statistics"],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_batch_norm(kind, training, options, form):
    torch.manual_seed(5)
    norm = kind(C, **options).double().train(training)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    if norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    norms = [norm, copy.deepcopy(norm)]
    remaining = list(norms)

    def forward(x):
        return remaining.pop(0)(x)

    assert isinstance(agree(forward, form), SlimTensor)
    for a, b in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


WAITED_FOR = {  # by each name under which a model calls them
    "nn.ReLU": nn.ReLU(),
    "nn.ReLU in place": nn.ReLU(inplace=True),
    "torch.relu_": torch.relu_,
    "nn.ReLU6": nn.ReLU6(),
    "nn.ReLU6 in place": nn.ReLU6(inplace=True),
    "F.relu6": F.relu6,
    "F.relu6 in place": lambda x: F.relu6(x, inplace=True),
    "nn.Hardtanh": nn.Hardtanh(0, 6),
    "F.hardtanh": lambda x: F.hardtanh(x, 0, 6.0),
    "F.hardtanh in place": lambda x: F.hardtanh(x, 0.0, 6, True),
    "F.hardtanh_": lambda x: F.hardtanh_(x, min_val=0.0, max_val=6.0),
    "nn.SiLU": nn.SiLU(),
    "nn.SiLU in place": nn.SiLU(inplace=True),
    "nn.Hardswish": nn.Hardswish(),
    "nn.Hardswish in place": nn.Hardswish(inplace=True),
}


def _leaky(x: torch.Tensor, slope: float) -> torch.Tensor:
    """As if ``leaky_relu`` were one that norms wait for."""
    if isinstance(x, SlimTensor):
        return activation(F.leaky_relu, x, slope)  # pyright: ignore[reportArgumentType]
    return F.leaky_relu(x, slope)


BY_ITSELF = {
    "nn.Hardtanh": nn.Hardtanh(),
    "nn.Hardtanh in place": nn.Hardtanh(0, 1, inplace=True),
    "clamp": lambda x: x.clamp(0, 6),  # whose gradient at 0 is another
    "clamp_": lambda x: torch.clamp_(x, 0, 6),
    "nn.Hardsigmoid": nn.Hardsigmoid(),
    "nn.LeakyReLU": nn.LeakyReLU(inplace=True),
    "one with a parameter": lambda x: _leaky(x, 0.3),
}
ALL = {**{f"{n}, waited for": f for n, f in WAITED_FOR.items()}, **BY_ITSELF}


@pytest.mark.parametrize("form", ["constant", "map"])
@pytest.mark.parametrize("name", ALL)
def test_the_activation_after_a_norm(name, form, monkeypatch):
    """Values at both bounds and channels of value 0 exactly among them."""
    torch.manual_seed(5)
    norm, seen = nn.BatchNorm2d(C).double(), []
    with torch.no_grad():
        norm.weight.normal_(std=6).mul_(torch.arange(C) % 3 > 0)  # every third channel is constant
        norm.bias.normal_(3, 3).mul_(torch.arange(C) % 2).add_(6 * (torch.arange(C) % 4 == 0))
    norms = [norm, copy.deepcopy(norm)]
    remaining = list(norms)

    def note(*args: Any, act: Activation = "none", **options: Any) -> Any:
        seen.append(act)
        return batch_norm_act(*args, act=act, **options)

    monkeypatch.setattr("sacl_fast.slim.rules.batch_norm.batch_norm_act", note)
    out = agree(lambda x: ALL[name](remaining.pop(0)(x)), form)
    assert isinstance(out, SlimTensor)
    assert all((act != "none") == (name not in BY_ITSELF) for act in seen) and seen
    for a, b in zip(*(n.buffers() for n in norms), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)
