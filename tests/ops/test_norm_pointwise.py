"""1x1 convolution between norms: the reference against autograd of what it fuses."""

from __future__ import annotations

import pytest
import torch

from sacl_fast.ops import norm_act, norm_pointwise
from sacl_fast.ops.batch_norm_act import ACTIVATIONS

norm_pointwise.register()
op = torch.ops.sacl_fast


def rows(count):
    return torch.rand(4, count, dtype=torch.float64)


@pytest.mark.parametrize("listed", [False, True])
@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("summed", [False, True])
@pytest.mark.parametrize("offset", [None, (1, 5, 1, 1), (3, 5, 1, 1), (1, 5, 4, 6)], ids=str)
def test_equals_what_it_fuses(offset, summed, gated, listed):
    torch.manual_seed(0)
    act, x = 3, torch.randn(3, 6, 4, 6, dtype=torch.float64)
    weight = torch.randn(7 if listed else 5, 8 if listed else 6, dtype=torch.float64)
    weight.requires_grad_()
    out_index = torch.tensor([6, 0, 2, 4, 1]) if listed else None
    in_index = torch.tensor([7, 0, 3, 1, 5, 2]) if listed else None
    gate = torch.rand(3, 6, dtype=torch.float64, requires_grad=True) if gated else None
    other = torch.randn_like(x) if summed else None
    added = None if offset is None else torch.randn(offset, dtype=torch.float64)
    affine = rows(6)
    before = norm_act._normalised(x, affine).requires_grad_()
    activated = list(ACTIVATIONS.values())[act](before * 1)
    read = activated if gate is None else activated * gate[:, :, None, None]
    read.retain_grad()
    matrix = weight
    if out_index is not None and in_index is not None:
        matrix = weight[out_index][:, in_index]
    y = torch.einsum("nkhw,ok->nohw", read, matrix)
    y = y if added is None else y + added
    given = None if gate is None else gate.detach()
    own = x, affine, act, given, weight.detach(), in_index, out_index
    found, sums = op.norm_pointwise(*own, added)
    torch.testing.assert_close(found, y.detach())
    torch.testing.assert_close(sums, norm_act.moments(y.detach()))

    g, coefficients = torch.randn_like(found), rows(5)
    if other is not None:
        read.backward(other, retain_graph=True)
    y.backward(norm_act.input_gradient(g, found, coefficients))
    expected = {False: read.grad} if gated else {False: read.grad, True: before.grad}
    for to_norm, gradient in expected.items():
        given = g, found, coefficients, *own, to_norm, True, other
        dx, gsums, dgate, dweight = op.norm_pointwise_backward(*given)
        torch.testing.assert_close(dx, gradient)
        torch.testing.assert_close(dweight, weight.grad)
        assert gate is not None or dgate.shape == (0,)
        if gate is not None:
            torch.testing.assert_close(dgate, gate.grad)
        if to_norm:
            torch.testing.assert_close(gsums, norm_act.gradient_sums(dx, x, affine))
    given = g, found, coefficients, *own, True, False, other
    dx, gsums, dgate, dweight = op.norm_pointwise_backward(*given)
    assert dx.shape == gsums.shape == dgate.shape == (0,)
    torch.testing.assert_close(dweight, weight.grad)


def test_without_norms_it_is_a_product():
    torch.manual_seed(0)
    x, weight = torch.randn(2, 3, 4, 4), torch.randn(5, 3)
    y, _ = op.norm_pointwise(x, None, 0, None, weight, None, None, None)
    torch.testing.assert_close(y, torch.einsum("nkhw,ok->nohw", x, weight))
    g = torch.randn_like(y)
    given = g, None, None, x, None, 0, None, weight, None, None, False, True, None
    dx, _, _, dweight = op.norm_pointwise_backward(*given)
    torch.testing.assert_close(dx, torch.einsum("nohw,ok->nkhw", g, weight))
    torch.testing.assert_close(dweight, torch.einsum("nohw,nkhw->ok", g, x))
