"""Convolutions, on an activation in parts against the same on its dense form."""

import pytest
import torch.nn.functional as F
from timm.layers import Conv2dSame
from torch import nn

from tests.slim.activations import FORMS, C, agree, kept_conv, stays_slim


def conv2d_same() -> nn.Conv2d:
    """timm declares it as a module of any kind."""
    conv = Conv2dSame(C, 8, 3, stride=2)
    assert isinstance(conv, nn.Conv2d)
    return conv


STAYS_SLIM = {
    "1x1": lambda x: kept_conv(nn.Conv2d(C, 8, 1))(x),
    "1x1, stride": lambda x: kept_conv(nn.Conv2d(C, 8, 1, stride=2))(x),
    "1x1, stride down": lambda x: kept_conv(nn.Conv2d(C, 8, 1, (3, 1), "valid", bias=False))(x),
    "3x3": lambda x: kept_conv(nn.Conv2d(C, 8, 3, stride=2, padding=1))(x),
    "dilated": lambda x: kept_conv(nn.Conv2d(C, 8, 3, padding=(3, 2), dilation=2))(x),
    "1x3": lambda x: kept_conv(nn.Conv2d(C, 8, (1, 3), padding=(2, 0), bias=False))(x),
    "same": lambda x: kept_conv(nn.Conv2d(C, 8, (2, 4), padding="same"))(x),
    "timm's same": lambda x: kept_conv(conv2d_same())(x),
    "reflected": lambda x: kept_conv(nn.Conv2d(C, 8, 3, padding=1, padding_mode="reflect"))(x),
    "grouped": lambda x: kept_conv(nn.Conv2d(C, 8, 3, padding=1, groups=4))(x),
    "depthwise": lambda x: kept_conv(nn.Conv2d(C, C, 3, padding=1, groups=C))(x),
    "depthwise, stride": lambda x: kept_conv(nn.Conv2d(C, C, 5, 2, 2, groups=C))(x),
    "depthwise, unpadded": lambda x: kept_conv(nn.Conv2d(C, C, 3, groups=C, bias=False))(x),
    "depthwise, one": lambda x: kept_conv(nn.Conv2d(C, C, 3, 1, 1, groups=C), (5,))(x),
    "multiplied": lambda x: kept_conv(nn.Conv2d(C, 3 * C, 3, groups=C), (1, 8, 22, 23, 30))(x),
    "two in a row": lambda x: kept_conv(nn.Conv2d(8, 8, 3, padding=1))(
        F.silu(kept_conv(nn.Conv2d(C, 8, 3, padding=1), (1, 2, 7))(x))
    ),
}
TURNS_DENSE = {
    "all filters": lambda x: nn.Conv2d(C, 8, 3, padding=1, dtype=x.dtype)(x),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STAYS_SLIM)
def test_on_parts(name, form, caplog):
    stays_slim(STAYS_SLIM[name], form, caplog)


@pytest.mark.parametrize("form", ["constant", "map", "by_sample"])
@pytest.mark.parametrize("name", TURNS_DENSE)
def test_made_dense(name, form):
    agree(TURNS_DENSE[name], form)
