"""Functions of one operand, on an activation in parts against the same on its dense form."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from tests.slim.activations import FORMS, C, agree, stays_slim

STAYS_SLIM = {
    "relu": F.relu,
    "relu_": lambda x: F.relu(x * 1, inplace=True),
    "hardswish": nn.Hardswish(),
    "hardtanh in place": lambda x: nn.Hardtanh(inplace=True)(x + 0),
    "relu6 in place": lambda x: nn.ReLU6(inplace=True)(x + 0),
    "clamp_": lambda x: (x + 0).clamp_(-0.5, 0.5),
    "gelu": nn.GELU(),
    "prelu": nn.PReLU(C, dtype=torch.float64),
    "sigmoid": lambda x: x.sigmoid(),
    "mish": nn.Mish(),
    "dropout, eval": nn.Dropout(0.5).eval(),
}
TURNS_DENSE = {
    "dropout": nn.Dropout(0.5),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STAYS_SLIM)
def test_on_parts(name, form, caplog):
    stays_slim(STAYS_SLIM[name], form, caplog)


@pytest.mark.parametrize("form", ["constant", "map", "by_sample"])
@pytest.mark.parametrize("name", TURNS_DENSE)
def test_made_dense(name, form):
    agree(TURNS_DENSE[name], form)
