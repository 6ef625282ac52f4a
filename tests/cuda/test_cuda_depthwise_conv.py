"""The CUDA depthwise convolution against PyTorch in float64: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from cuda_devices import DTYPES, assert_near, both, emulator, images

from sacl_fast.ops.slim_channels import positions_in

# (shape of x, filters, kernel, stride, padding, dilation): vectors of channels and single ones,
# more channels than a block takes, index lists, odd sizes, windows larger than the image, an even
# and an oblong window.
CASES = [
    ((2, 16, 9, 11), 16, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 24, 9, 11), 24, (3, 3), (2, 2), (1, 1), (1, 1)),
    ((1, 264, 5, 4), 264, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 264, 6, 5), 264, (3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 20, 9, 11), 13, (3, 3), (2, 2), (1, 1), (1, 1)),
    ((2, 37, 12, 7), 37, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 70, 8, 9), 48, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((3, 16, 12, 7), 16, (5, 5), (2, 2), (2, 2), (1, 1)),
    ((2, 32, 12, 7), 32, (5, 5), (1, 1), (2, 2), (1, 1)),
    ((2, 50, 12, 7), 17, (5, 5), (2, 2), (2, 2), (1, 1)),
    ((1, 24, 11, 13), 24, (7, 7), (1, 1), (3, 3), (1, 1)),
    ((1, 24, 11, 13), 24, (7, 7), (2, 2), (3, 3), (1, 1)),
    ((1, 17, 9, 9), 9, (7, 7), (1, 1), (3, 3), (1, 1)),
    ((2, 50, 10, 10), 21, (3, 3), (1, 1), (2, 2), (2, 2)),
    ((2, 24, 9, 9), 24, (3, 3), (2, 2), (0, 0), (1, 1)),
    ((2, 24, 8, 10), 24, (3, 3), (2, 2), (2, 2), (1, 1)),
    ((2, 35, 8, 9), 20, (2, 4), (2, 1), (1, 3), (1, 1)),
    ((1, 8, 3, 3), 8, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 33, 1, 1), 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 8, 6, 6), 8, (3, 3), (1, 1), (4, 4), (1, 1)),  # padding beyond the window
    ((1, 16, 8, 8), 16, (1, 1), (3, 3), (0, 0), (1, 1)),
    ((3, 8, 40, 33), 8, (3, 3), (1, 1), (1, 1), (1, 1)),  # many strips a block
]
# Of MobileNet-V1 and EfficientNet-B0.
LARGE = [
    ((8, 32, 112, 112), 32, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((8, 512, 14, 14), 301, (3, 3), (2, 2), (1, 1), (1, 1)),
    ((8, 672, 14, 14), 672, (5, 5), (2, 2), (2, 2), (1, 1)),
    ((64, 1024, 7, 7), 1024, (3, 3), (1, 1), (1, 1), (1, 1)),
]


def inputs(shape, filters, kernel, dtype):
    generator = torch.Generator().manual_seed(sum(shape) + filters)
    weight = torch.randn(filters, *kernel, generator=generator).to(dtype)
    index = None
    if filters < shape[1]:
        index = torch.randperm(shape[1], generator=generator)[:filters]
    return images(*shape, dtype=dtype), weight, index


def exact(x, weight, index, window):
    x, weight = (t.double().requires_grad_() for t in (x, weight))
    read = x if index is None else x.index_select(1, index)
    y = F.conv2d(read, weight.unsqueeze(1), None, *window, groups=len(weight))
    dy = images(*y.shape, dtype=torch.float32, seed=1)
    return x, weight, y, dy


def run(device, x, weight, index, dy, window):
    x, weight, index, dy = map(device.put, (x, weight, index, dy))
    channels, high, wide = x.shape[1:]
    y = device.ops.depthwise_conv(x, weight, index, *window)
    given = dy, weight, index, high, wide, channels, *window
    dx = device.ops.depthwise_conv_backward_input(*given, positions=positions_in(index, channels))
    assert torch.equal(dx, device.ops.depthwise_conv_backward_input(*given))
    dweight = device.ops.depthwise_conv_backward_weight(x, dy, index, *weight.shape[1:], *window)
    return y, dx, dweight


def compare(device, case, dtype):
    shape, filters, kernel, *window = case
    x, weight, index = inputs(shape, filters, kernel, dtype)
    x64, weight64, y64, dy = exact(x, weight, index, window)
    dy = dy.to(dtype)
    y, dx, dweight = run(device, x, weight, index, dy, window)
    y64.backward(dy.double())
    for got, expected in ((y, y64), (dx, x64.grad), (dweight, weight64.grad)):
        assert got.dtype == dtype
        assert_near(got, expected.detach(), dtype)
    assert y.is_contiguous(memory_format=torch.channels_last)
    if index is not None:
        unread = torch.ones(shape[1], dtype=torch.bool)
        unread[index] = False
        assert (dx.cpu()[:, unread] == 0).all()


@both()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_pytorch(device, case, dtype):
    compare(device, case, dtype)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_equals_pytorch_at_full_size(device, case, dtype):
    compare(device, case, dtype)


@both()
def test_addresses_that_do_not_suit_vectors(device):
    x, weight, _ = inputs((2, 16, 9, 11), 16, (3, 3), torch.float16)
    shifted = torch.empty(x.numel() + 1, dtype=x.dtype)[1:].as_strided(x.shape, x.stride())
    given = device.put(shifted)
    if device.name == "cuda":  # .to() would align it
        given = torch.empty(x.numel() + 1, dtype=x.dtype, device="cuda")[1:]
        given = given.as_strided(x.shape, x.stride())
    given.copy_(x)
    window = ((1, 1), (1, 1), (1, 1))
    expected = device.ops.depthwise_conv(device.put(x), device.put(weight), None, *window)
    y = device.ops.depthwise_conv(given, device.put(weight), None, *window)
    assert_near(y, expected.double().cpu(), torch.float16)


@both()
def test_nan_in_a_channel_that_no_filter_reads(device):
    x, weight, index = inputs((1, 20, 5, 5), 6, (3, 3), torch.float32)
    unread = torch.ones(20, dtype=torch.bool)
    unread[index] = False
    x[:, unread] = float("nan")
    window = ((1, 1), (1, 1), (1, 1))
    *_, dy = exact(x, weight, index, window)
    assert not any(t.isnan().any() for t in run(device, x, weight, index, dy, window))


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
@pytest.mark.parametrize("case", [CASES[0], CASES[4], CASES[13]], ids=str)
def test_the_order_of_threads_changes_nothing(device, case):
    shape, filters, kernel, *window = case
    x, weight, index = inputs(shape, filters, kernel, torch.float32)
    *_, dy = exact(x, weight, index, window)
    first = run(device, x, weight, index, dy, window)
    emulator().sacl_simt_reverse(1)
    try:
        assert all(map(torch.equal, first, run(device, x, weight, index, dy, window)))
    finally:
        emulator().sacl_simt_reverse(0)


@both()
def test_wrong_arguments_are_errors(device):
    x, weight, _ = inputs((1, 20, 5, 5), 20, (3, 3), torch.float32)
    x, weight = device.put(x), device.put(weight)
    window = ((1, 1), (0, 0), (1, 1))
    conv = device.ops.depthwise_conv
    with pytest.raises(RuntimeError, match="weight is not contiguous, of the expected type"):
        conv(x, weight.half(), None, *window)
    with pytest.raises(RuntimeError, match="3 filters for 20 channels and no in_index"):
        conv(x, weight[:3], None, *window)
    with pytest.raises(RuntimeError, match="channels-last"):
        conv(x.contiguous(), weight, None, *window)
    with pytest.raises(RuntimeError, match="larger than the padded image"):
        conv(x, weight.new_zeros(20, 7, 7), None, *window)
    with pytest.raises(RuntimeError, match="float32, float16 or bfloat16"):
        conv(x.double(), weight.double(), None, *window)


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_an_index_out_of_range_ends_the_kernel(device):
    x, weight, _ = inputs((1, 20, 5, 5), 3, (3, 3), torch.float32)
    index = torch.tensor([0, 1, 20])
    with pytest.raises(RuntimeError, match="trap"):
        device.ops.depthwise_conv(*map(device.put, (x, weight, index)), (1, 1), (1, 1), (1, 1))
