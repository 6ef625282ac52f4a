"""The compiled batch norm against PyTorch in float64: values, gradients, statistics."""

import pytest
import torch

from sacl_fast.ops import compiled
from sacl_fast.ops.batch_norm_act import ACTIVATIONS, batch_norm_act, is_compiled

pytestmark = pytest.mark.skipif(not is_compiled(), reason=str(compiled.obstacle()))
# Channels: fewer than a vector, one, one and a bit, several; rows: fewer and more than are summed
# in one go.
SHAPES = [(5, 3, 1, 1), (3, 16, 5, 7), (4, 37, 9, 9), (8, 64, 20, 20), (2, 1, 3, 3)]


def inputs(shape, offset=2.0):
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 3 + offset
    weight, bias = torch.randn(2, shape[1], generator=generator)
    dy = torch.randn(shape, generator=generator)
    return x.contiguous(memory_format=torch.channels_last), weight, bias, dy


def run(x, weight, bias, dy, **options):
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]
    y, mean, variance = batch_norm_act(*leaves, eps=1e-5, **options)
    y.backward(dy)
    return [y.detach(), *(t.grad for t in leaves), mean, variance]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_pytorch(shape, act):
    given = inputs(shape)
    ours = run(*given, act=act, backend="cpu")
    exact = run(*(t.double() for t in given), act=act, backend="torch")
    for got, expected in zip(ours, exact, strict=True):
        scale = expected.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=5e-6)


def test_an_offset_costs_no_digits():
    x, *rest = inputs((8, 20, 6, 6), offset=3000.0)
    ours = run(x, *rest, backend="cpu")
    exact = run(x.double(), *(t.double() for t in rest), backend="torch")
    for got, expected in zip(ours, exact, strict=True):
        assert (got.double() - expected).norm() < 1e-3 * expected.norm()


def test_the_number_of_threads_changes_nothing():
    given, threads = inputs((8, 40, 30, 30)), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(*given, act="silu", backend="cpu"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_a_constant_channel_becomes_its_bias_and_nan_stays():
    x, weight, bias, _ = inputs((4, 18, 3, 3))
    x[:, 5] = 7.25
    y, *_ = batch_norm_act(x, weight, bias, eps=1e-5, backend="cpu")
    torch.testing.assert_close(y[:, 5], bias[5].expand(4, 3, 3))
    x[1, 3, 0, 0] = float("nan")
    for act in ACTIVATIONS:
        y, *_ = batch_norm_act(x, weight, bias, eps=1e-5, act=act, backend="cpu")
        assert y[:, 3].isnan().all() and not y[:, 4].isnan().any()


def test_the_operator_keeps_the_rules_of_torch_library():
    x, weight, bias, _ = inputs((3, 21, 4, 5))
    leaves = [t.requires_grad_() for t in (x, weight, bias)]
    torch.library.opcheck(torch.ops.sacl_fast.batch_norm_act, (*leaves, 1e-5, 4))
