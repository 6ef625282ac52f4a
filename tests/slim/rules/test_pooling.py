"""Pooling and padding, on an activation in parts against the same on its dense form."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.slim.activations import FORMS, agree, stays_slim

STAYS_SLIM = {
    "pad": lambda x: F.pad(x, (1, 0, 2, 1)),
    "pad by nothing": lambda x: F.pad(x, (0, 0, 0, 0)),
    "reflect": lambda x: F.pad(x, (1, 1, 2, 1), mode="reflect"),
    "crop": lambda x: F.pad(x, (-1, 0, 0, -2)),
    "max pool": nn.MaxPool2d(3, 2, 1),
    "average pool": nn.AvgPool2d(3, 2, 1),
    "average pool, ceil": nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
    "adaptive": nn.AdaptiveAvgPool2d(2),
}
TURNS_DENSE = {
    "global": nn.AdaptiveAvgPool2d(1),
    "mean": lambda x: x.mean((2, 3)),
    "mean, keepdim": lambda x: torch.mean(x, dim=[-1, -2], keepdim=True),
    "amax": lambda x: x.amax(dim=(2, 3)),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STAYS_SLIM)
def test_on_parts(name, form, caplog):
    stays_slim(STAYS_SLIM[name], form, caplog)


@pytest.mark.parametrize("form", ["constant", "map", "by_sample"])
@pytest.mark.parametrize("name", TURNS_DENSE)
def test_made_dense(name, form):
    agree(TURNS_DENSE[name], form)
