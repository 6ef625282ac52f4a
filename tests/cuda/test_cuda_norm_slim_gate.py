"""The CUDA gate of a raw slim activation against ops/norm_slim_gate.py in float64."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cuda_devices import DTYPES, assert_near, both, emulator, images

from sacl_fast.ops import norm_slim_gate
from sacl_fast.ops.batch_norm_act import ACTIVATIONS

exact: Callable[..., Any] = norm_slim_gate._forward
exact_backward: Callable[..., Any] = norm_slim_gate._backward
ACTS = range(len(ACTIVATIONS))
# Channels of x, of the map, of the gate (as many as x has: in order); samples, height, width.
GATES = [
    ((16, 0, 16), (3, 6, 5)),
    ((5, 0, 5), (3, 6, 5)),
    ((13, 7, 20), (3, 6, 5)),
    ((16, 8, 40), (3, 6, 5)),
    ((16, 7, 40), (2, 3, 3)),
    ((270, 0, 300), (2, 3, 3)),
    ((264, 272, 536), (5, 2, 3)),
    ((8, 16, 24), (70, 3, 2)),
    ((24, 0, 33), (2, 1, 1)),
]


def gated(channels, sizes, dtype, act=3):
    """As the operator takes them, and dy."""
    (K, R, C), (N, H, W) = channels, sizes
    generator = torch.Generator().manual_seed(K + R)
    x = (3 * images(N, K, H, W, dtype=torch.float32) + 1000).to(dtype)
    affine = torch.randn(4, K, generator=generator)
    affine[2] += 1000
    gate = torch.rand(N, C, generator=generator).to(dtype)
    order = torch.randperm(C, generator=generator)
    x_index = None if K == C else order[:K]
    map_ = images(1, R, H, W, dtype=dtype, seed=3) if R else None
    dy = images(N, K + R, H, W, dtype=dtype, seed=7)
    return [x, affine, act, map_, gate, x_index, order[K : K + R] if R else None], dy


def put_on(device, given):
    return [device.put(t) if isinstance(t, torch.Tensor) else t for t in given]


def double(t):
    return t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t


@both()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", GATES, ids=str)
def test_equals_pytorch(device, case, dtype):
    for act in ACTS:
        given, dy = gated(*case, dtype=dtype, act=act)
        put = put_on(device, given)
        y = device.ops.norm_slim_gate(*put)
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert_near(y, exact(*map(double, given)), dtype)
        dmap, dgate = device.ops.norm_slim_gate_backward(device.put(dy), *put)
        exact_dmap, exact_dgate = exact_backward(dy.double(), *map(double, given))
        assert dmap.dtype == dtype and dgate.dtype == torch.float32
        assert_near(dmap, exact_dmap, dtype)
        assert_near(dgate, exact_dgate, torch.float32, 3)


@both()
def test_images_that_no_vector_fits(device):
    """Their channels are many enough, but not at a multiple of 16 bytes."""
    given, dy = gated((16, 8, 40), (3, 6, 5), torch.float16)
    memory = torch.cat([dy.new_zeros(1), dy.permute(0, 2, 3, 1).flatten()])
    off = device.put(memory)[1:].view(3, 6, 5, 24).permute(0, 3, 1, 2)
    ours = device.ops.norm_slim_gate_backward(off, *put_on(device, given))
    exact_dmap, exact_dgate = exact_backward(dy.double(), *map(double, given))
    assert_near(ours[0], exact_dmap, torch.float16)
    assert_near(ours[1], exact_dgate, torch.float32, 3)


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_the_order_of_threads_changes_nothing(device):
    for case in (((13, 7, 20), (3, 6, 5)), ((16, 8, 40), (3, 6, 5))):
        given, dy = gated(*case, dtype=torch.bfloat16)
        put, dy = put_on(device, given), device.put(dy)

        def run(put=put, dy=dy):
            return device.ops.norm_slim_gate(*put), *device.ops.norm_slim_gate_backward(dy, *put)

        first = run()
        emulator().sacl_simt_reverse(1)
        try:
            assert all(map(torch.equal, first, run()))
        finally:
            emulator().sacl_simt_reverse(0)


@both()
def test_wrong_arguments_are_errors(device):
    given, dy = gated((13, 7, 20), (3, 6, 5), torch.float32)
    (x, affine, act, *others), dy = put_on(device, given), device.put(dy)
    ops = device.ops
    with pytest.raises(RuntimeError, match=r"affine has not the shape \(4, 13\)"):
        ops.norm_slim_gate(x, affine[:3], act, *others)
    with pytest.raises(RuntimeError, match="no such activation"):
        ops.norm_slim_gate(x, affine, 9, *others)
    with pytest.raises(RuntimeError, match="gate is not contiguous, of the expected type"):
        ops.norm_slim_gate(x, affine, act, others[0], others[1].half(), *others[2:])
    with pytest.raises(RuntimeError, match=r"dy has not the shape \(3, 20, 6, 5\)"):
        ops.norm_slim_gate_backward(x, x, affine, act, *others)
