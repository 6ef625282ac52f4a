"""The CUDA sums and gates of slim activations against PyTorch in float64: values and gradients."""

import pytest
import torch
from cuda_devices import DTYPES, assert_near, both, emulator, images

PLACES = (3, 6, 5)  # N, H, W


def batch(channels, dtype, seed=0, samples=PLACES[0]):
    return images(samples, channels, *PLACES[1:], dtype=dtype, seed=seed)


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
        source = None
        if channels:
            source = torch.randperm(live + constants, generator=generator)[:channels]
        out += [batch(live, dtype, seed), rest, source]
    return out


def exact_sum(a, a_rest, a_source, b, b_rest, b_source):
    leaves = [None if t is None else t.double().requires_grad_() for t in (a, a_rest, b, b_rest)]

    def chosen(x, rest, source):
        if rest is not None:
            x = torch.cat([x, rest.view(1, -1, 1, 1).expand(len(x), -1, *x.shape[2:])], 1)
        return x if source is None else x[:, source]

    y = chosen(*leaves[:2], a_source) + chosen(*leaves[2:], b_source)
    return leaves, y


@both()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_sum(device, case, dtype):
    given = operands(*case, dtype)
    leaves, expected = exact_sum(*given)
    dy = batch(expected.shape[1], dtype, seed=7)
    there = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(expected, there, dy.double()))
    a, a_rest, a_source, b, b_rest, b_source = map(device.put, given)
    y = device.ops.slim_add(a, a_rest, a_source, b, b_rest, b_source)
    assert_near(y, expected.detach(), dtype)
    counts = [0 if rest is None else len(rest) for rest in (a_rest, b_rest)]
    ours = device.ops.slim_add_backward(
        device.put(dy), a.shape[1], counts[0], a_source, b.shape[1], counts[1], b_source
    )
    for i, (got, leaf) in enumerate(zip(ours, leaves, strict=True)):
        right = None if leaf is None else next(grads)
        if case[2] is None:
            assert got.numel() == 0  # dy itself
        elif right is not None:
            assert_near(got, right, dtype, slack=1 + i % 2)


# (channels of x, of the map, of the gate); as many as the gate has: in order.
GATES = [(16, 0, 16), (5, 0, 5), (13, 7, 20), (16, 8, 40), (270, 0, 300)]


def gated(K, R, C, dtype):
    generator = torch.Generator().manual_seed(K + R)
    gate = torch.rand(PLACES[0], C, generator=generator).to(dtype)
    order = torch.randperm(C, generator=generator)
    index = None if K == C else order[:K]
    shared = batch(R, dtype, seed=3, samples=1) if R else None
    return batch(K, dtype), shared, gate, index, order[K : K + R] if R else None


@both()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATES, ids=str)
def test_gate(device, case, dtype):
    x, shared, gate, index, shared_index = given = gated(*case, dtype)
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, shared, gate)]
    factors = leaves[2][:, :, None, None]
    expected = leaves[0] * (factors if index is None else factors[:, index])
    if shared is not None:
        expected = torch.cat([expected, leaves[1] * factors[:, shared_index]], 1)
    dy = batch(expected.shape[1], dtype, seed=7)
    there = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(expected, there, dy.double()))
    x, shared, gate, index, shared_index = map(device.put, given)
    y = device.ops.slim_gate(x, shared, gate, index, shared_index)
    assert_near(y, expected.detach(), dtype)
    ours = device.ops.slim_gate_backward(device.put(dy), x, shared, gate, index, shared_index)
    for got, leaf in zip(ours, leaves, strict=True):
        assert_near(got, torch.empty(0) if leaf is None else next(grads), dtype)


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_the_order_of_threads_changes_nothing(device):
    x, shared, gate, index, shared_index = map(device.put, gated(13, 7, 20, torch.bfloat16))
    dy = device.put(batch(20, torch.bfloat16))

    def run():
        return device.ops.slim_gate_backward(dy, x, shared, gate, index, shared_index)

    first = run()
    emulator().sacl_simt_reverse(1)
    try:
        assert all(map(torch.equal, first, run()))
    finally:
        emulator().sacl_simt_reverse(0)


@both()
def test_wrong_arguments_are_errors(device):
    x, _, gate, *_ = map(device.put, gated(16, 0, 16, torch.float32))
    with pytest.raises(RuntimeError, match="the same number of values"):
        device.ops.slim_add(x, None, None, device.put(batch(15, torch.float32)), None, None)
    with pytest.raises(RuntimeError, match="16 channels and a gate of 15"):
        device.ops.slim_gate(x, None, gate[:, :15].contiguous(), None, None)
    with pytest.raises(RuntimeError, match="gate is not contiguous, of the expected type"):
        device.ops.slim_gate(x, None, gate.half(), None, None)
