"""The parts of a batch norm against the operator that they are of, on the CPU."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sacl_fast.ops import norm_act
from sacl_fast.ops.batch_norm_act import ACTIVATIONS, Activation, batch_norm_act

if not norm_act.is_compiled():
    pytest.skip("sacl_fast._C is not built here", allow_module_level=True)

op = torch.ops.sacl_fast
KEPT, ZEROED, CHANNELS = 8, 3, 12


def images(*shape: int, seed: int, offset: float = 0.0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, dtype=torch.float64, generator=generator) * 3 + offset
    return x.contiguous(memory_format=torch.channels_last)


def vectors(count: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.rand(CHANNELS, dtype=torch.float64, generator=generator) for _ in range(count)]


def lists() -> tuple[Tensor, Tensor]:
    order = torch.randperm(CHANNELS, generator=torch.Generator().manual_seed(3))
    return order[:KEPT], order[KEPT : KEPT + ZEROED]


@pytest.mark.parametrize("offset", [0.0, 1000.0])
@pytest.mark.parametrize("act", ACTIVATIONS)
def test_together_they_are_batch_norm_act(act: Activation, offset: float):
    x = images(3, KEPT, 5, 6, seed=1, offset=offset).requires_grad_()
    weight, bias = (v.requires_grad_() for v in vectors(2))
    running, own = (vectors(2) for _ in range(2))
    kept, zeroed = lists()
    indices = {"kept_index": kept, "zeroed_index": zeroed}
    y, rest, _ = batch_norm_act(x, weight, bias, *running, **indices, act=act, backend="torch")
    dy, drest = images(*y.shape, seed=2), torch.ones_like(rest)
    torch.autograd.backward([y, rest], [dy, drest])
    code, count = list(ACTIVATIONS).index(act), x.numel() // KEPT
    with torch.no_grad():
        sums = op.norm_act_moments(x)
        parts = sums, weight, bias, kept, zeroed, *own, None, count, 0.1, 1e-5, code
        affine, constants = op.norm_act_affine(*parts)
        found = [op.norm_act_apply(x, affine, code, None, None, 0), constants.view(rest.shape)]
        g, gsums = op.norm_act_gradient(dy, x, affine, code, None, None)
        given = drest.flatten(), weight, bias, kept, zeroed, affine, count, code
        coefficients, *gradients = op.norm_act_coefficients(gsums, *given)
        found.append(op.norm_act_input_gradient(g if g.numel() else dy, x, coefficients))
    expected = [y, rest, x.grad, weight.grad, bias.grad, *running]
    for ours, theirs in zip([*found, *gradients, *own], expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_sums_of_several_sets_are_one():
    x = images(4, 5, 3, 3, seed=1, offset=50)
    whole = op.norm_act_moments(x)
    sets = torch.cat([op.norm_act_moments(x[:1]), op.norm_act_moments(x[1:])])
    given = torch.ones(5), torch.zeros(5), None, None, None, None, None, 36, 0.1, 1e-5, 0
    results = (op.norm_act_affine(of, *given) for of in (whole, sets))
    for one, several in zip(*results, strict=True):
        torch.testing.assert_close(one, several, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("act", [0, 3])
def test_a_gate_and_a_mean(act: int):
    """The gradient of act(x) * gate + the mean's, and the gate's."""
    x = images(3, 4, 5, 2, seed=1)
    affine = torch.rand(4, 4, dtype=torch.float64)
    before = norm_act._normalised(x, affine).requires_grad_()
    gate = torch.rand(3, 4, dtype=torch.float64, requires_grad=True)
    activated = list(ACTIVATIONS.values())[act](before * 1)
    mean = activated.mean((2, 3), keepdim=True)
    torch.testing.assert_close(op.norm_act_mean(x, affine, act), mean.detach())
    dy, dmean = images(3, 4, 5, 2, seed=2), torch.rand(3, 4, 1, 1, dtype=torch.float64)
    torch.autograd.backward([activated * gate[:, :, None, None], mean], [dy, dmean])
    factors = gate.detach()
    g, gsums = op.norm_act_gradient(dy, x, affine, act, factors, dmean.flatten(1))
    torch.testing.assert_close(g, before.grad)
    torch.testing.assert_close(gsums.sum(0)[0], g.sum((0, 2, 3)))
    torch.testing.assert_close(op.norm_act_gate_gradient(dy, x, affine, act), gate.grad)


@pytest.mark.parametrize("shape", [(1, 4, 1, 1), (3, 4, 1, 1), (1, 4, 5, 6), (3, 4, 5, 6)])
def test_the_gradient_of_an_offset(shape):
    g, y = images(3, 4, 5, 6, seed=1), images(3, 4, 5, 6, seed=2)
    coefficients = torch.rand(4, 4, dtype=torch.float64)
    dy = op.norm_act_input_gradient(g, y, coefficients)
    found = op.norm_act_offset_gradient(g, y, coefficients, list(shape), [])
    torch.testing.assert_close(found, dy.sum_to_size(shape))
    torch.testing.assert_close(
        op.norm_act_offset_gradient(g, None, None, list(shape), []), g.sum_to_size(shape)
    )


def test_along_a_border_the_sum_is_0_and_the_rest_is_even():
    g = images(3, 4, 5, 6, seed=1)
    found = op.norm_act_offset_gradient(g, None, None, [1, 4, 5, 6], [1, 2, 0, 1])
    inner = found[:, :, 1:3, :5]
    torch.testing.assert_close(inner, inner[:, :, :1, :1].expand_as(inner))
    torch.testing.assert_close(found.sum((2, 3)), torch.zeros(1, 4, dtype=torch.float64))
    torch.testing.assert_close(found[:, :, 0], g.sum(0, keepdim=True)[:, :, 0])
    whole = op.norm_act_offset_gradient(g, None, None, [1, 4, 5, 6], [3, 2, 0, 0])
    torch.testing.assert_close(whole, g.sum(0, keepdim=True))
