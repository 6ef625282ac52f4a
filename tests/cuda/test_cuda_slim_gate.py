"""The CUDA gate of slim activations against PyTorch in float64: values and gradients."""

import pytest
import torch
from cuda_devices import DTYPES, assert_near, both, emulator, images

PIXELS = (3, 6, 5)  # N, H, W


def batch(channels, dtype, seed=0, samples=PIXELS[0]):
    return images(samples, channels, *PIXELS[1:], dtype=dtype, seed=seed)


# (channels of x, of the map, of the gate); as many as the gate has: in order.
GATES = [(16, 0, 16), (5, 0, 5), (13, 7, 20), (16, 8, 40), (270, 0, 300)]


def gated(K, R, C, dtype):
    generator = torch.Generator().manual_seed(K + R)
    gate = torch.rand(PIXELS[0], C, generator=generator).to(dtype)
    order = torch.randperm(C, generator=generator)
    x_index = None if K == C else order[:K]
    map_ = batch(R, dtype, seed=3, samples=1) if R else None
    return batch(K, dtype), map_, gate, x_index, order[K : K + R] if R else None


@both()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATES, ids=str)
def test_equals_pytorch(device, case, dtype):
    x, map_, gate, x_index, map_index = given = gated(*case, dtype=dtype)
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, map_, gate)]
    factors = leaves[2][:, :, None, None]
    expected = leaves[0] * (factors if x_index is None else factors[:, x_index])
    if map_ is not None:
        expected = torch.cat([expected, leaves[1] * factors[:, map_index]], 1)
    dy = batch(expected.shape[1], dtype, seed=7)
    there = [t for t in leaves if t is not None]
    grads = iter(torch.autograd.grad(expected, there, dy.double()))
    x, map_, gate, x_index, map_index = map(device.put, given)
    y = device.ops.slim_gate(x, map_, gate, x_index, map_index)
    assert_near(y, expected.detach(), dtype)
    ours = device.ops.slim_gate_backward(device.put(dy), x, map_, gate, x_index, map_index)
    for got, leaf in zip(ours, leaves, strict=True):
        assert_near(got, torch.empty(0) if leaf is None else next(grads), dtype)


@both()
def test_a_map_of_one_channel_at_many_pixels(device):
    """A block takes as many of them as it may."""
    x, mapped = (images(n, c, 12, 11, dtype=torch.float32) for n, c in ((2, 3), (1, 1)))
    gate, index = torch.rand(2, 5), torch.tensor([4, 0, 2])
    dy = images(2, 4, 12, 11, dtype=torch.float32, seed=1)
    given = map(device.put, (dy, x, mapped, gate, index, torch.tensor([3])))
    _, dmap, dgate = device.ops.slim_gate_backward(*given)
    of_map = dy.double()[:, 3:]
    assert_near(dmap, (of_map * gate.double()[:, 3, None, None, None]).sum(0, True), torch.float32)
    assert_near(dgate[:, 3], (of_map * mapped.double()).sum((1, 2, 3)), torch.float32)


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_the_order_of_threads_changes_nothing(device):
    x, map_, gate, x_index, map_index = map(device.put, gated(13, 7, 20, torch.bfloat16))
    dy = device.put(batch(20, torch.bfloat16))

    def run():
        return device.ops.slim_gate_backward(dy, x, map_, gate, x_index, map_index)

    first = run()
    emulator().sacl_simt_reverse(1)
    try:
        assert all(map(torch.equal, first, run()))
    finally:
        emulator().sacl_simt_reverse(0)


@both()
def test_wrong_arguments_are_errors(device):
    x, _, gate, *_ = map(device.put, gated(16, 0, 16, torch.float32))
    with pytest.raises(RuntimeError, match="16 channels and a gate of 15"):
        device.ops.slim_gate(x, None, gate[:, :15].contiguous(), None, None)
    with pytest.raises(RuntimeError, match="gate is not contiguous, of the expected type"):
        device.ops.slim_gate(x, None, gate.half(), None, None)
