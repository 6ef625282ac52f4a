"""The CUDA 1x1 convolution on index lists against PyTorch in float64: values and gradients."""

import pytest
import torch
from cuda_devices import DTYPES, assert_near, both, emulator, images

from sacl_fast.ops.slim_channels import positions_in

# (shape of x, Cin, Cout, outputs, constants (n, R) or None, offset's (n, h, w) or None); n, h, w
# are 1 or "full". Cin and Cout larger than what is taken mean index lists.
CASES = [
    ((2, 16, 5, 7), 16, 24, 24, None, None),
    ((2, 16, 5, 7), 16, 24, 24, None, (1, 1, 1)),
    ((3, 13, 6, 5), 20, 31, 17, None, None),
    ((3, 13, 6, 5), 20, 31, 17, (1, 7), None),
    ((3, 13, 6, 5), 20, 31, 17, ("full", 7), None),
    ((3, 16, 6, 5), 24, 48, 40, (1, 8), (1, 1, 1)),
    ((3, 16, 6, 5), 24, 48, 40, (1, 3), (1, "full", "full")),
    ((3, 16, 6, 5), 24, 48, 40, ("full", 8), ("full", 1, 1)),
    ((3, 16, 6, 5), 24, 24, 24, None, ("full", "full", "full")),
    ((3, 16, 6, 5), 16, 48, 40, None, (1, "full", 1)),
    ((2, 16, 6, 5), 16, 48, 13, None, ("full", 1, "full")),
    ((1, 3, 1, 1), 9, 5, 2, (1, 6), (1, 1, 1)),
    ((2, 8, 40, 33), 8, 8, 8, None, (1, 1, 1)),  # sums in parts
    ((2, 8, 1, 1), 300, 280, 272, ("full", 292), None),
]
LARGE = [
    ((16, 256, 28, 28), 256, 512, 512, None, (1, 1, 1)),
    ((16, 133, 28, 28), 256, 512, 301, ("full", 123), (1, "full", "full")),
]
# Two products in a row, or a product and an offset, each rounded to the type.
SLACK = 3


def inputs(case, dtype, weight_dtype):
    shape, Cin, Cout, filters, constants, offset = case
    samples, K, high, wide = shape
    generator = torch.Generator().manual_seed(Cin * Cout + filters)
    x = images(*shape, dtype=dtype)
    # The kernels round a float32 weight to the activations' type; the reference gets it rounded.
    weight = torch.randn(Cout, Cin, generator=generator).to(dtype).to(weight_dtype)
    order = torch.randperm(Cin, generator=generator)
    in_index = order[:K] if Cin > K else None
    out_index = torch.randperm(Cout, generator=generator)[:filters] if Cout > filters else None
    rest = rest_index = None
    if constants:
        n, R = constants
        rest = torch.randn(samples if n == "full" else n, R, generator=generator).to(dtype)
        rest_index = order[K : K + R]
    if offset:
        sizes = zip(offset, (samples, high, wide), strict=True)
        n, h, w = (size if kept == "full" else 1 for kept, size in sizes)
        offset = images(n, filters, h, w, dtype=dtype, seed=5)
    return x, weight, in_index, out_index, rest, rest_index, offset


def exact(x, weight, in_index, out_index, rest, rest_index, offset):
    """y, and a function of dy to the gradients."""
    leaves = [None if t is None else t.double().requires_grad_() for t in (x, weight, rest, offset)]
    x, weight, rest, offset = leaves
    filters = weight if out_index is None else weight[out_index]
    y = torch.einsum("nkhw,ok->nohw", x, filters if in_index is None else filters[:, in_index])
    if rest is not None:
        y = y + (rest @ filters[:, rest_index].T)[:, :, None, None]
    if offset is not None:
        y = y + offset

    def gradients(dy):
        there = [t for t in leaves if t is not None]
        found = iter(torch.autograd.grad(y, there, dy.double()))
        return [torch.empty(0) if t is None else next(found) for t in leaves]

    return y.detach(), gradients


def run(device, given, dy):
    x, weight, in_index, out_index, rest, rest_index, offset = map(device.put, given)
    lists = (x, weight, in_index, out_index, rest, rest_index)
    y = device.ops.slim_pointwise(*lists, offset)
    shape = [] if offset is None else list(offset.shape)
    given = device.put(dy), *lists, shape
    outs, ins = weight.shape
    positions = {
        "out_positions": positions_in(out_index, outs),
        "in_positions": positions_in(in_index, ins, rest_index),
    }
    grads = device.ops.slim_pointwise_backward(*given, **positions)
    assert torch.equal(grads[1], device.ops.slim_pointwise_backward(*given)[1])
    return y, grads


def compare(device, case, dtype, weight_dtype):
    given = inputs(case, dtype, weight_dtype)
    expected, gradients = exact(*given)
    dy = images(*expected.shape, dtype=dtype, seed=1)
    y, grads = run(device, given, dy)
    assert y.is_contiguous(memory_format=torch.channels_last) and y.dtype == dtype
    assert grads[1].dtype == weight_dtype
    assert_near(y, expected, dtype, SLACK)
    for got, right in zip(grads, gradients(dy), strict=True):
        assert_near(got, right, dtype, SLACK)


@both()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_pytorch(device, case, dtype):
    for weight_dtype in {dtype, torch.float32}:
        compare(device, case, dtype, weight_dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_equals_pytorch_at_full_size(device, case, dtype):
    compare(device, case, dtype, torch.float32)


@both()
def test_an_offset_in_another_memory_format(device):
    given = inputs(CASES[6], torch.float32, torch.float32)
    expected, _ = exact(*given)
    *given, offset = map(device.put, given)
    y = device.ops.slim_pointwise(*given, offset.contiguous())
    assert_near(y, expected, torch.float32, SLACK)


@both()
def test_a_rest_of_no_channels_is_none(device):
    x, weight, *_ = map(device.put, inputs(CASES[0], torch.float32, torch.float32))
    rest, index = x.new_empty(2, 0), device.put(torch.arange(16))
    nowhere = index[:0]
    y = device.ops.slim_pointwise(x, weight, index, None, rest, nowhere, None)
    assert torch.equal(y, device.ops.slim_pointwise(x, weight, index, None, None, None, None))
    dy = device.put(images(2, 24, 5, 7, dtype=torch.float32))
    grads = device.ops.slim_pointwise_backward(dy, x, weight, index, None, rest, nowhere, [])
    assert [len(g) for g in grads] == [2, 24, 0, 0]


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_the_order_of_threads_changes_nothing(device):
    given = inputs(CASES[7], torch.bfloat16, torch.float32)
    dy = images(3, 40, 6, 5, dtype=torch.bfloat16)
    y, grads = run(device, given, dy)
    emulator().sacl_simt_reverse(1)
    try:
        again, again_grads = run(device, given, dy)
        assert all(map(torch.equal, (y, *grads), (again, *again_grads)))
    finally:
        emulator().sacl_simt_reverse(0)


@both()
def test_wrong_arguments_are_errors(device):
    x, weight, *_ = map(device.put, inputs(CASES[0], torch.bfloat16, torch.float32))
    rest = device.put(torch.zeros(2, 4, dtype=torch.bfloat16))
    nothing = [None] * 4
    conv = device.ops.slim_pointwise
    with pytest.raises(RuntimeError, match="16 inputs of 15 without in_index"):
        conv(x, weight[:, :15].contiguous(), *nothing, None)
    with pytest.raises(RuntimeError, match="rest goes with rest_index"):
        conv(x, weight, None, None, rest, None, None)
    with pytest.raises(RuntimeError, match="weight is not contiguous, of the expected type"):
        conv(x, weight.half(), *nothing, None)
    with pytest.raises(RuntimeError, match="does not spread"):
        conv(x, weight, *nothing, x.new_zeros(1, 24, 3, 7))
    with pytest.raises(RuntimeError, match="offset is not of x's type"):
        conv(x, weight, *nothing, weight.new_zeros(1, 24, 1, 1))
