"""Batch norms of an activation in parts against those of its dense form."""

import copy

import pytest
import torch
from timm.layers import BatchNormAct2d
from torch import nn

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
