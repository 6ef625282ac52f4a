"""The compiled depthwise convolution against PyTorch in float64: values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from sacl_fast.ops import compiled
from sacl_fast.ops.depthwise_conv import depthwise_conv, is_compiled

pytestmark = pytest.mark.skipif(not is_compiled(), reason=str(compiled.obstacle()))

# (shape of x, filters, kernel, stride, padding, dilation): all channels and some, fewer than a
# vector and more, odd sizes, windows as large as the image, an even and an oblong window.
CASES = [
    ((2, 20, 9, 11), 20, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 20, 9, 11), 13, (3, 3), (2, 2), (1, 1), (1, 1)),
    ((3, 40, 12, 7), 33, (5, 5), (2, 2), (2, 2), (1, 1)),
    ((3, 90, 12, 7), 17, (5, 5), (1, 1), (2, 2), (1, 1)),
    ((1, 17, 15, 15), 17, (7, 7), (1, 1), (3, 3), (1, 1)),
    ((2, 50, 10, 10), 21, (3, 3), (1, 1), (2, 2), (2, 2)),
    ((2, 24, 9, 9), 24, (3, 3), (2, 2), (0, 0), (1, 1)),
    ((2, 35, 8, 9), 20, (2, 4), (2, 1), (1, 3), (1, 1)),
    ((1, 5, 3, 3), 5, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((1, 33, 1, 1), 4, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((2, 18, 6, 6), 18, (3, 3), (1, 1), (4, 4), (1, 1)),  # padding beyond the window
    ((9, 32, 70, 70), 24, (3, 3), (1, 1), (1, 1), (1, 1)),  # several blocks and sums
    ((1, 16, 8, 8), 16, (1, 1), (3, 3), (0, 0), (1, 1)),
]


def inputs(shape, filters, kernel):
    generator = torch.Generator().manual_seed(sum(shape) + filters)
    x = torch.randn(shape, generator=generator).contiguous(memory_format=torch.channels_last)
    weight = torch.randn(filters, 1, *kernel, generator=generator)
    index = None
    if filters < shape[1]:
        index = torch.randperm(shape[1], generator=generator)[:filters]
    return x, weight, index


def run(x, weight, index, dy=None, **options):
    x, weight = (t.detach().clone().requires_grad_() for t in (x, weight))
    y = depthwise_conv(x, weight, index, **options)
    generator = torch.Generator().manual_seed(1)
    y.backward(torch.randn(y.shape, generator=generator, dtype=torch.float32).to(y.dtype))
    return y.detach(), x.grad, weight.grad


@pytest.mark.parametrize(("shape", "filters", "kernel", "stride", "padding", "dilation"), CASES)
def test_equals_pytorch(shape, filters, kernel, stride, padding, dilation):
    x, weight, index = inputs(shape, filters, kernel)
    window = {"stride": stride, "padding": padding, "dilation": dilation}
    ours = run(x, weight, index, backend="cpu", **window)
    exact = run(x.double(), weight.double(), index, backend="torch", **window)
    for got, expected in zip(ours, exact, strict=True):
        scale = expected.abs().max()
        torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=5e-6)


def test_the_number_of_threads_changes_nothing():
    given, threads = inputs((5, 40, 30, 30), 24, (3, 3)), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(run(*given, padding=(1, 1), backend="cpu"))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(map(torch.equal, results[0], other))


def test_the_operator_keeps_the_rules_of_torch_library():
    for shape, filters, kernel, *window in CASES[:2]:
        x, weight, index = inputs(shape, filters, kernel)
        arguments = (x, weight.squeeze(1).clone(), index, *map(list, window))
        torch.library.opcheck(torch.ops.sacl_fast.depthwise_conv, arguments)


def test_constants_that_fill_an_image():
    torch.manual_seed(0)
    in_index, out_index = torch.tensor([3, 0, 1]), torch.tensor([5, 2, 0])
    values, weight = torch.randn(1, 4, 1, 1), torch.randn(6, 1, 3, 3)
    options = {"size": (6, 5), "padding": (1, 1), "stride": (2, 1)}
    results = []
    for backend, *tensors in (("cpu", values, weight), ("torch", values.double(), weight.double())):
        leaves = [t.clone().requires_grad_() for t in tensors]
        y = depthwise_conv(leaves[0], leaves[1], in_index, out_index, backend=backend, **options)
        y.square().sum().backward()
        results.append([y.detach().double(), *(t.grad.double() for t in leaves)])
    assert results[0][0].shape == (1, 3, 3, 5)
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_some_filters_of_the_full_weight():
    x, full = inputs((3, 20, 6, 6), 11, (3, 3))[0], torch.randn(30, 1, 3, 3)
    in_index, out_index = torch.randperm(20)[:11], torch.randperm(30)[:11]
    grads = []
    for backend, values, weight in (("cpu", x, full), ("torch", x.double(), full.double())):
        leaves = [t.clone().requires_grad_() for t in (values, weight)]
        y = depthwise_conv(
            leaves[0], leaves[1], in_index, out_index, padding=(1, 1), backend=backend
        )
        y.square().sum().backward()
        grads.append([y.detach().double(), *(t.grad.double() for t in leaves)])
    for got, expected in zip(*grads, strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-4)


def test_a_wrong_index_is_an_error():
    x, weight, _ = inputs((1, 20, 5, 5), 3, (3, 3))
    with pytest.raises(RuntimeError, match="out of range"):
        depthwise_conv(x, weight, torch.tensor([0, 1, 20]), backend="cpu")
    with pytest.raises(RuntimeError, match="twice"):
        depthwise_conv(x, weight, torch.tensor([0, 1, 0]), backend="cpu")
    with pytest.raises(RuntimeError, match="larger than the padded image"):
        depthwise_conv(x, torch.zeros(20, 1, 7, 7), backend="cpu")


def both_ways(x, weight, device):
    """Of a convolution under autocast, ours and PyTorch's: the output and its leaves' gradients."""
    results = []
    for convolve in (depthwise_conv, lambda *t, **k: F.conv2d(*t, groups=x.shape[1], **k)):
        leaves = [t.detach().clone().to(device).requires_grad_() for t in (x, weight)]
        with torch.autocast(device, torch.bfloat16):
            y = convolve(*leaves, padding=(1, 1))
        y.backward(torch.ones_like(y))
        results.append([y.detach(), *(t.grad for t in leaves)])
    return results


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_autocast_is_heeded(device):
    x, weight, _ = inputs((2, 24, 6, 6), 24, (3, 3))
    for ours, theirs in zip(*both_ways(x, weight, device), strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2 * theirs.abs().max().item())
    y = depthwise_conv(x, weight, padding=(1, 1))
    assert y.dtype == torch.float32
    with torch.autocast("cpu", torch.bfloat16):  # float64 is left alone
        assert depthwise_conv(x.double(), weight.double()).dtype == torch.float64


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu(dtype):
    for shape, filters, kernel, *window in CASES[:5]:
        given = inputs(shape, filters, kernel)
        x, weight, index = (None if t is None else t.cuda() for t in given)
        x, weight = x.to(dtype), weight.to(dtype)
        options = dict(zip(("stride", "padding", "dilation"), window, strict=True))
        ours = run(x, weight, index, backend="cuda", **options)
        exact = run(x.double(), weight.double(), index, backend="torch", **options)
        for got, expected in zip(ours, exact, strict=True):
            assert got is not None and expected is not None and got.dtype == dtype
            error = (got.double() - expected).abs().max() / expected.abs().max()
            assert error < {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}[dtype]


def test_flops_are_counted():
    x, weight, index = inputs((2, 20, 6, 6), 9, (3, 3))
    leaves = [t.requires_grad_() for t in (x, weight)]
    with FlopCounterMode(display=False) as counter:
        depthwise_conv(leaves[0], leaves[1], index, padding=(1, 1), backend="cpu").sum().backward()
    assert counter.get_total_flops() == 3 * 2 * (2 * 9 * 6 * 6) * 9


def test_channels_after_those_of_filters_are_read_by_zeros():
    torch.manual_seed(0)
    in_index, out_index = torch.tensor([3, 0, 1, 5, 4]), torch.tensor([3, 0, 1])
    x = torch.randn(2, 6, 5, 7).contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(6, 1, 3, 3, requires_grad=True)
    filters = weight[out_index], torch.zeros(2, 1, 3, 3)
    expected = F.conv2d(x[:, in_index], torch.cat(filters), padding=1, groups=5)
    for backend in ("cpu", "torch"):
        y = depthwise_conv(x, weight, in_index, out_index, padding=(1, 1), backend=backend)
        assert not y[:, 3:].any()
        torch.testing.assert_close(y, expected)
        both = [
            torch.autograd.grad(out.square().sum(), (x, weight), retain_graph=True)
            for out in (y, expected)
        ]
        torch.testing.assert_close(*both, rtol=1e-5, atol=1e-4)
