"""The CUDA sum of slim activations that are raw, against ops/norm_slim_add.py in float64."""

from collections.abc import Callable

import pytest
import torch
from cuda_devices import DTYPES, assert_near, both, emulator, images

from sacl_fast.ops import norm_slim_add

exact: Callable[..., torch.Tensor] = norm_slim_add._forward
SIDES = (6, 5)
# (live, constants) of a and b; channels of the result, None: all live ones in order.
SUMS = [
    ((16, 0), (16, 0), None),
    ((5, 0), (5, 0), None),
    ((16, 9), (13, 12), 25),
    ((40, 7), (20, 20), 40),
    ((1, 3), (70, 0), 4),
]


def batch(channels, dtype, seed=0, mean=0.0):
    x = 3 * images(3, channels, *SIDES, dtype=torch.float32, seed=seed) + mean
    return x.to(dtype)


def operands(left, right, channels, dtype, raw):
    """As the operator takes them; what is raw has a mean of 1000, as its affine says."""
    generator = torch.Generator().manual_seed(left[0] + right[0])
    out = []
    for seed, ((live, constants), is_raw) in enumerate(zip((left, right), raw, strict=True)):
        affine = torch.randn(4, live, generator=generator)
        affine[2] += 1000
        rest = torch.randn(constants, generator=generator).to(dtype) if constants else None
        index = None
        if channels:
            index = torch.randperm(live + constants, generator=generator)[:channels]
        x = batch(live, dtype, seed, 1000.0 if is_raw else 0.0)
        out += [x, affine if is_raw else None, rest, index]
    return out


def double(t):
    return None if t is None else t.double() if t.is_floating_point() else t


@both()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", SUMS, ids=str)
def test_equals_pytorch(device, case, dtype):
    for raw in ((True, True), (True, False), (False, True), (False, False)):
        given = operands(*case, dtype=dtype, raw=raw)
        y = device.ops.norm_slim_add(*map(device.put, given))
        assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
        assert_near(y, exact(*map(double, given)), dtype)


@both()
def test_what_is_not_raw_is_added_as_by_slim_add(device):
    for case in SUMS:
        given = list(map(device.put, operands(*case, dtype=torch.bfloat16, raw=(False, False))))
        y = device.ops.slim_add(*(t for i, t in enumerate(given) if i % 4 != 1))
        assert torch.equal(device.ops.norm_slim_add(*given), y)


@both()
def test_images_that_no_vector_fits(device):
    """16 channels, but not at a multiple of 16 bytes."""
    given = operands(*SUMS[0], dtype=torch.float16, raw=(True, True))
    memory = torch.cat([given[0].new_zeros(1), given[0].permute(0, 2, 3, 1).flatten()])
    put = list(map(device.put, given))
    put[0] = device.put(memory)[1:].view(3, *SIDES, 16).permute(0, 3, 1, 2)
    y = device.ops.norm_slim_add(*put)
    assert_near(y, exact(*map(double, given)), torch.float16)


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_the_order_of_threads_changes_nothing(device):
    given = list(map(device.put, operands(*SUMS[2], dtype=torch.bfloat16, raw=(True, True))))
    first = device.ops.norm_slim_add(*given)
    emulator().sacl_simt_reverse(1)
    try:
        assert torch.equal(first, device.ops.norm_slim_add(*given))
    finally:
        emulator().sacl_simt_reverse(0)


@both()
def test_wrong_arguments_are_errors(device):
    given = list(map(device.put, operands(*SUMS[0], dtype=torch.float32, raw=(True, True))))
    with pytest.raises(RuntimeError, match=r"affine has not the shape \(4, 16\)"):
        device.ops.norm_slim_add(given[0], given[1][:3], *given[2:])
    with pytest.raises(RuntimeError, match="the same number of values"):
        device.ops.norm_slim_add(*given[:4], given[4][:2], *given[5:])
    with pytest.raises(RuntimeError, match="affine is not contiguous, of the expected type"):
        device.ops.norm_slim_add(given[0], given[1].half(), *given[2:])
