"""The gate of a raw slim activation, in plain PyTorch: values and gradients of the plain steps."""

import pytest
import torch
import torch.nn.functional as F
from against_float64 import images

from sacl_fast.ops import compiled, norm_act
from sacl_fast.ops.batch_norm_act import ACTIVATIONS
from sacl_fast.ops.norm_slim_gate import is_compiled
from sacl_fast.ops.slim_gate import slim_gate

pytestmark = pytest.mark.skipif(
    not (is_compiled() and norm_act.is_compiled()), reason=str(compiled.obstacle())
)
N, EPS = 4, 1e-5


# Channels of x, of the map, of the gate.
@pytest.mark.parametrize("sizes", [(7, 0, 7), (8, 0, 11), (5, 3, 8), (6, 9, 20)])
@pytest.mark.parametrize("act", range(len(ACTIVATIONS)))
def test_it_is_norm_activation_and_gate(sizes, act):
    """Forward, and backward together with what norm_act does of it, against autograd."""
    g, op = torch.Generator().manual_seed(sum(sizes)), torch.ops.sacl_fast
    K, R, C = sizes
    x, gate = 3 * images(N, K, 5, 3, g=g) + 2, torch.randn(N, C, generator=g)
    map_ = images(1, R, 5, 3, g=g) if R else None
    weight, bias = torch.randn(2, K, generator=g)
    order = torch.randperm(C, generator=g)
    x_index = None if K == C else order[:K]
    map_index = order[K : K + R] if R else None
    dy = images(N, K + R, 5, 3, g=g)

    own = [t.double().requires_grad_() for t in (x, weight, bias, gate)]
    exact_map = map_.double().requires_grad_() if map_ is not None else None
    normalised = F.batch_norm(own[0], None, None, own[1], own[2], True, 0, EPS)
    activated = list(ACTIVATIONS.values())[act](normalised)
    factors = own[3][:, :, None, None]
    exact = slim_gate(activated, exact_map, factors, x_index, map_index, backend="torch")
    exact.backward(dy.double())

    norm = weight, bias, None, None
    affine, _ = op.norm_act_affine(
        op.norm_act_moments(x), *norm, None, None, None, N * 15, 0.1, EPS, act
    )
    operands = x, affine, act, map_, gate, x_index, map_index
    y = op.norm_slim_gate(*operands)
    dmap, dgate = op.norm_slim_gate_backward(dy, *operands)
    own_gate = gate if x_index is None else gate[:, x_index]
    gradient, gsums = op.norm_act_gradient(dy, x, affine, act, own_gate, None)
    coefficients, dweight, dbias = op.norm_act_coefficients(gsums, None, *norm, affine, N * 15, act)
    dx = op.norm_act_input_gradient(gradient, x, coefficients)

    ours = [y, dx, dweight, dbias, dgate, dmap]
    exact_dmap = torch.empty(0).double() if exact_map is None else exact_map.grad
    theirs = [exact.detach(), *(t.grad for t in own), exact_dmap]
    for got, expected in zip(ours, theirs, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=2e-5, atol=2e-5)


def test_the_operators_keep_the_rules_of_torch_library():
    g, op = torch.Generator().manual_seed(0), torch.ops.sacl_fast
    x, map_, gate = images(N, 5, 3, 3, g=g), images(1, 2, 3, 3, g=g), torch.randn(N, 9, generator=g)
    order = torch.randperm(9, generator=g)
    for others in ((map_, gate, order[:5], order[5:7]), (None, gate, order[:5], None)):
        given = x, torch.randn(4, 5, generator=g), 3, *others
        dy = op.norm_slim_gate(*given)
        torch.library.opcheck(op.norm_slim_gate, given)
        torch.library.opcheck(op.norm_slim_gate_backward, (dy, *given))


def test_a_gradient_of_more_channels_is_that_of_the_first():
    g, op = torch.Generator().manual_seed(0), torch.ops.sacl_fast
    x, dy, affine = images(N, 5, 3, 3, g=g), images(N, 7, 3, 3, g=g), torch.randn(4, 5, generator=g)
    for act in (0, 1):
        wide, sums = op.norm_act_gradient(dy, x, affine, act, None, None)
        own = dy[:, :5].contiguous(memory_format=torch.channels_last)
        narrow, expected = op.norm_act_gradient(own, x, affine, act, None, None)
        assert torch.equal(wide, narrow if narrow.numel() else own)
        assert torch.equal(sums, expected)
        torch.library.opcheck(op.norm_act_gradient, (dy, x, affine, act, None, None))
