"""The CUDA sum of slim activations against PyTorch in float64: values and gradients."""

import pytest
import torch
from cuda_devices import DTYPES, assert_near, both, images

PIXELS = (3, 6, 5)  # N, H, W


def batch(channels, dtype, seed=0, samples=PIXELS[0]):
    return images(samples, channels, *PIXELS[1:], dtype=dtype, seed=seed)


# (live, constants) of a and b; channels of the result, None: all live ones in order.
SUMS = [
    ((16, 0), (16, 0), None),
    ((5, 0), (5, 0), None),
    ((16, 9), (13, 12), 25),
    ((40, 7), (20, 20), 40),
]


def operands(left, right, channels, dtype):
    generator = torch.Generator().manual_seed(left[0] + right[0])
    out = []
    for seed, (live, constants) in enumerate((left, right)):
        rest = torch.randn(constants, generator=generator).to(dtype) if constants else None
        index = None
        if channels:
            index = torch.randperm(live + constants, generator=generator)[:channels]
        out += [batch(live, dtype, seed), rest, index]
    return out


def exact_sum(a, a_rest, a_index, b, b_rest, b_index):
    leaves = [None if t is None else t.double().requires_grad_() for t in (a, a_rest, b, b_rest)]

    def chosen(x, rest, index):
        if rest is not None:
            x = torch.cat([x, rest.view(1, -1, 1, 1).expand(len(x), -1, *x.shape[2:])], 1)
        return x if index is None else x[:, index]

    y = chosen(leaves[0], leaves[1], a_index) + chosen(leaves[2], leaves[3], b_index)
    return leaves, y


@both()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_equals_pytorch(device, case, dtype):
    given = operands(*case, dtype=dtype)
    leaves, expected = exact_sum(*given)
    dy = batch(expected.shape[1], dtype, seed=7)
    there = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(expected, there, dy.double()))
    a, a_rest, a_index, b, b_rest, b_index = map(device.put, given)
    y = device.ops.slim_add(a, a_rest, a_index, b, b_rest, b_index)
    assert_near(y, expected.detach(), dtype)
    counts = [0 if rest is None else len(rest) for rest in (a_rest, b_rest)]
    ours = device.ops.slim_add_backward(
        device.put(dy), a.shape[1], counts[0], a_index, b.shape[1], counts[1], b_index
    )
    for i, (got, leaf) in enumerate(zip(ours, leaves, strict=True)):
        right = None if leaf is None else next(grads)
        if case[2] is None:
            assert got.numel() == 0  # dy itself
        elif right is not None:
            assert_near(got, right, dtype, slack=1 + i % 2)


@both()
def test_wrong_arguments_are_errors(device):
    a, b = (device.put(batch(channels, torch.float32)) for channels in (16, 15))
    with pytest.raises(RuntimeError, match="the same number of values"):
        device.ops.slim_add(a, None, None, b, None, None)
