"""Depthwise convolution between norms: the reference against autograd of what it fuses."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from sacl_fast.ops import norm_act, norm_depthwise
from sacl_fast.ops.batch_norm_act import ACTIVATIONS

if not (norm_act.is_compiled() and norm_depthwise.is_compiled()):
    pytest.skip("sacl_fast._C is not built here", allow_module_level=True)

op = torch.ops.sacl_fast
WINDOWS = [([1, 1], [1, 1], [1, 1]), ([2, 2], [1, 1], [1, 1]), ([2, 1], [0, 2], [1, 2])]


def rows(count):
    return torch.rand(4, count, dtype=torch.float64)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("window", WINDOWS, ids=str)
@pytest.mark.parametrize("act", range(len(ACTIVATIONS)))
def test_equals_what_it_fuses(act, window, listed):
    torch.manual_seed(act)
    x = torch.randn(2, 6, 7, 9, dtype=torch.float64)
    weight = torch.randn(6, 3, 3, dtype=torch.float64, requires_grad=True)
    out_index = torch.tensor([4, 1, 2]) if listed else None
    in_index = torch.tensor([5, 0, 3, 1]) if listed else None  # the last filter is of zeros
    affine = rows(6)
    before = norm_act._normalised(x, affine).requires_grad_()
    activated = list(ACTIVATIONS.values())[act](before * 1)
    activated.retain_grad()
    filters, read = weight, activated
    if out_index is not None:
        filters = torch.cat([weight[out_index], weight.new_zeros(1, 3, 3)])
        read = activated[:, in_index]
    y = F.conv2d(read, filters.unsqueeze(1), None, *window, groups=len(filters))
    own = x, affine, act, weight.detach(), out_index, in_index, *window
    found, sums = op.norm_depthwise(*own)
    torch.testing.assert_close(found, y.detach())
    torch.testing.assert_close(sums, op.norm_act_moments(y.detach()))

    g, coefficients = torch.randn_like(found), rows(len(filters))
    y.backward(op.norm_act_input_gradient(g, found, coefficients))
    for to_norm, expected in ((True, before.grad), (False, activated.grad)):
        dx, gsums, dweight = op.norm_depthwise_backward(g, found, coefficients, *own, to_norm)
        torch.testing.assert_close(dx, expected)
        torch.testing.assert_close(dweight, weight.grad)
        if to_norm:
            torch.testing.assert_close(gsums, norm_act.gradient_sums(dx, x, affine))
        else:
            assert gsums.shape == (0,)
