"""The compiled batch norm against PyTorch in float64: values, gradients, running statistics."""

from typing import Any, get_args

import pytest
import torch

from sacl_fast.ops import compiled
from sacl_fast.ops.batch_norm_act import ACTIVATIONS, Activation, batch_norm_act, is_compiled

pytestmark = pytest.mark.skipif(not is_compiled(), reason=str(compiled.obstacle()))
# Channels: fewer than a vector, one, one and a bit, several; rows: fewer and more than are summed
# in one go.
SHAPES = [(5, 3, 1, 1), (3, 16, 5, 7), (4, 37, 9, 9), (8, 64, 20, 20), (2, 1, 3, 3)]
COUNT = 1000  # of the full activation, where x is a map that all samples share


def inputs(shape, offset=2.0, more=0):
    """x and dy of a shape; a norm of ``more`` channels more, and the lists that tell which."""
    generator = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(shape, generator=generator) * 3 + offset
    weight, bias, mean = torch.randn(3, shape[1] + more, generator=generator)
    dy = torch.randn(shape, generator=generator)
    x = x.contiguous(memory_format=torch.channels_last)
    order = torch.randperm(shape[1] + more, generator=generator)
    lists = {"kept_index": order[more:], "zeroed_index": order[: more // 2 + 1]} if more else {}
    return [x, weight, bias, mean, weight.square() + 0.1, dy], lists


def run(given, **options):
    x, weight, bias, mean, var, dy, *maps = given
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias, *maps)]
    running = [mean.clone(), var.clone()]
    if maps:
        options["map"] = leaves[3]
    outputs = batch_norm_act(*leaves[:3], *running, momentum=0.3, eps=1e-5, **options)
    outputs = [y for y in outputs if y is not None]
    weights = [dy, *(torch.linspace(-1, 2, y.numel()).view_as(y) for y in outputs[1:])]
    terms = [(y * w).sum() for y, w in zip(outputs, weights, strict=True)]
    torch.stack(terms).sum().backward()
    return [*(y.detach() for y in outputs), *(t.grad for t in leaves), *running]


def assert_equal(ours, exact, tolerance=5e-6):
    for got, expected in zip(ours, exact, strict=True):
        assert got.shape == expected.shape
        scale = expected.abs().max().clamp(min=1e-3) if expected.numel() else 1
        torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=tolerance)


def double(given):
    return [t.double() for t in given]


@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_pytorch(shape, act):
    given, _ = inputs(shape)
    assert_equal(run(given, act=act, backend="cpu"), run(double(given), act=act, backend="torch"))


@pytest.mark.parametrize("count", [None, COUNT])
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_of_some_channels_and_zeros(shape, act, count):
    given, lists = inputs(shape, more=9)
    options = {"act": act, "count": count, **lists}
    assert_equal(
        run(given, backend="cpu", **options), run(double(given), backend="torch", **options)
    )


@pytest.mark.parametrize("act", ["none", "silu"])
def test_with_a_map(act):
    given, lists = inputs((4, 37, 9, 9), more=9)
    lists["map_index"] = lists.pop("zeroed_index")
    given.append(torch.randn(1, 5, 9, 9).contiguous(memory_format=torch.channels_last))
    ours = run(given, act=act, backend="cpu", **lists)
    assert_equal(ours, run(double(given), act=act, backend="torch", **lists))


def test_the_reference_is_batch_norm():
    given, _ = inputs((4, 6, 5, 5))
    x, weight, bias, mean, var, _ = double(given)
    ours = run(double(given), act="relu", backend="torch")
    y = torch.nn.functional.batch_norm(x, mean, var, weight, bias, True, 0.3, 1e-5).relu()
    for got, expected in ((ours[0], y), (ours[-2], mean), (ours[-1], var)):
        torch.testing.assert_close(got, expected)


def test_an_offset_costs_no_digits():
    given, _ = inputs((8, 20, 6, 6), offset=3000.0)
    ours, exact = run(given, backend="cpu"), run(double(given), backend="torch")
    for got, expected in zip(ours, exact, strict=True):
        assert (got.double() - expected).norm() <= 1e-3 * expected.norm()


def test_the_number_of_threads_changes_nothing():
    (given, _), threads = inputs((8, 40, 30, 30)), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(given, act="silu", backend="cpu"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_a_constant_channel_becomes_its_bias_and_nan_stays():
    (x, weight, bias, *_), _ = inputs((4, 18, 3, 3))
    x[:, 5] = 7.25
    y, *_ = batch_norm_act(x, weight, bias, backend="cpu")
    torch.testing.assert_close(y[:, 5], bias[5].expand(4, 3, 3))
    x[1, 3, 0, 0] = float("nan")
    for act in get_args(Activation):
        y, *_ = batch_norm_act(x, weight, bias, act=act, backend="cpu")
        assert y[:, 3].isnan().all() and not y[:, 4].isnan().any()


@pytest.mark.parametrize(
    "lists", [{"kept_index": [0, 1]}, {"kept_index": [0, 1, 9]}, {"zeroed_index": [-1]}]
)
def test_wrong_lists_are_refused(lists):
    (x, weight, bias, *_), _ = inputs((2, 3, 4, 4))
    with pytest.raises(RuntimeError, match=r"index|channels"):
        given: dict[str, Any] = {name: torch.tensor(list_) for name, list_ in lists.items()}
        batch_norm_act(x, weight, bias, backend="cpu", **given)


def test_the_operator_keeps_the_rules_of_torch_library():
    (x, weight, bias, mean, var, dy), lists = inputs((3, 21, 4, 5), more=4)
    given = x, weight, bias, lists["kept_index"], lists["zeroed_index"]
    op = torch.ops.sacl_fast
    torch.library.opcheck(op.batch_norm_act, (*given, mean, var, 60, 0.1, 1e-5, 4))
    _, rest, *statistics = op.batch_norm_act(*given, None, None, 60, 0.1, 1e-5, 4)
    dy = dy.contiguous(memory_format=torch.channels_last)
    torch.library.opcheck(op.batch_norm_act_backward, (dy, rest, *given, *statistics, 4))
