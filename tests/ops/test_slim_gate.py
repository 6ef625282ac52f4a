"""The compiled sum and gate of slim activations against PyTorch in float64."""

import pytest
import torch

from sacl_fast.ops import compiled
from sacl_fast.ops.slim_gate import is_compiled, slim_add, slim_gate

pytestmark = pytest.mark.skipif(not is_compiled(), reason=str(compiled.obstacle()))
N = 3


def images(*shape, g):
    return torch.randn(shape, generator=g).contiguous(memory_format=torch.channels_last)


def gradients(function, tensors):
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    grads = (torch.zeros_like(t) if t.grad is None else t.grad for t in leaves if t is not None)
    return [y.detach(), *grads]


def assert_equal(function, tensors):
    """``function(backend, *tensors)``"""
    ours = gradients(lambda *t: function("cpu", *t), tensors)
    exact = [None if t is None else t.double() for t in tensors]
    for got, expected in zip(ours, gradients(lambda *t: function("torch", *t), exact), strict=True):
        assert got.shape == expected.shape
        scale = expected.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=2e-6)


# Channels; live ones of a, of b (the others are constants); of the sum.
@pytest.mark.parametrize(
    "sizes",
    [
        (5, 2, 3, 4),
        (40, 17, 20, 30),
        (32, 32, 16, 32),
        (19, 19, 19, 19),
        (64, 1, 40, 50),
        (24, 17, 5, 17),
    ],
)
@pytest.mark.parametrize("side", [(1, 1), (9, 15)])
def test_sum(sizes, side):
    g = torch.Generator().manual_seed(0)
    C, live_a, live_b, U = sizes
    given, sources = [], []
    for live in (live_a, live_b):
        given.append(images(N, live, *side, g=g))
        given.append(torch.randn(1, C - live, 1, 1, generator=g) if live < C else None)
        # None also where there are constants, but none of them is in the sum
        chosen = torch.randperm(C, generator=g)[:U]
        sources.append(None if live == U else chosen)
    a_source, b_source = sources

    def add(backend, a, a_rest, b, b_rest):
        return slim_add(a, a_rest, a_source, b, b_rest, b_source, backend=backend)

    assert_equal(add, given)


@pytest.mark.parametrize("sizes", [(3, 3, 0), (40, 20, 9), (33, 16, 17), (8, 1, 0)])
@pytest.mark.parametrize("side", [(1, 1), (5, 13)])
def test_gate(sizes, side):
    g = torch.Generator().manual_seed(0)
    C, live, shared = sizes
    order = torch.randperm(C, generator=g)
    index = None if live == C else order[:live]
    shared_index = order[live : live + shared] if shared else None
    given = [
        images(N, live, *side, g=g),
        images(1, shared, *side, g=g) if shared else None,
        torch.randn(N, C, 1, 1, generator=g),
    ]

    def gated(backend, x, others, gate):
        return slim_gate(x, others, gate, index, shared_index, backend=backend)

    assert_equal(gated, given)


def test_the_operators_keep_the_rules_of_torch_library():
    g, op = torch.Generator().manual_seed(0), torch.ops.sacl_fast
    a, b, rest = images(N, 5, 3, 3, g=g), images(N, 7, 3, 3, g=g), torch.randn(2, generator=g)
    source = torch.tensor([6, 0, 1, 2, 5, 3, 4])
    torch.library.opcheck(op.slim_add, (a, rest, source, b, None, None))
    torch.library.opcheck(op.slim_add_backward, (b, 5, 2, source, 7, 0, None))
    gate, index = torch.randn(N, 9, generator=g), torch.tensor([8, 1, 2, 3, 4])
    given = a, None, gate, index, None
    torch.library.opcheck(op.slim_gate, given)
    torch.library.opcheck(op.slim_gate_backward, (a, *given))
