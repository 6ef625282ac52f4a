"""What a slim tensor does with operations that have no rule, in place, and of itself."""

import logging

import pytest
import torch
import torch.nn.functional as F

from sacl_fast.slim.tensor import _already_logged
from tests.slim.activations import C, H, N, W, activation, agree

TURNS_DENSE = {
    "softmax": lambda x: x.softmax(1),
    "flatten": lambda x: x.flatten(1),
    "unknown in place": lambda x: (x + 0).cumsum_(1),
    "item": lambda x: torch.where(x > 0, x, 0 * x),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
}


@pytest.mark.parametrize("form", ["constant", "map", "by_sample"])
@pytest.mark.parametrize("name", TURNS_DENSE)
def test_made_dense(name, form):
    agree(TURNS_DENSE[name], form)


def test_in_place_operations_reach_other_references():
    def forward(x):
        same = x = x + 0
        x.neg_()
        x += torch.ones(N, C, H, W, dtype=x.dtype)
        x *= 2
        return same

    agree(forward, "map")


def test_an_operation_s_result_has_its_own_memory():
    for function in (lambda x: F.max_pool2d(x, 3), lambda x: F.pad(x, (1, 1))):

        def forward(x, function=function):
            out = function(x)
            out.relu_()
            return x.sum() + out.sum()

        agree(forward, "constant")
    agree(lambda x: torch.cat([x, x.new_zeros(N, 1, H, W)], 1).relu_().sum() + x.sum(), "constant")


def test_one_line_for_each_operation(caplog):
    _already_logged.clear()
    x, _ = activation("constant")
    with caplog.at_level(logging.INFO, logger="sacl_fast"):
        for _ in range(3):
            x.cumsum(1)
            x.flip(1)
    assert ["cumsum" in r.message or "flip" in r.message for r in caplog.records] == [True] * 2


def test_what_a_tensor_says_of_itself():
    x, _ = activation("map")
    assert isinstance(x, torch.Tensor) and x.requires_grad
    assert x.shape == (N, C, H, W) and x.size(1) == C and x.ndim == x.dim() == 4
    assert x.dtype == torch.float64 and x.device.type == "cpu" and len(x) == N
    assert x.contiguous() is x and x.double() is x and x.to("cpu") is x
    assert not x.detach().requires_grad and x.float().dtype == torch.float32
    assert "map" not in repr(x) and "SlimTensor" in repr(x)
    assert x.new_empty((2,)).shape == (2,)
