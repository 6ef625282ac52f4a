"""The CUDA depthwise convolution between batch norms against PyTorch in float64."""

from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from cuda_devices import DTYPES, assert_near, both, emulator, images
from test_cuda_depthwise_conv import CASES as WINDOWS
from test_cuda_depthwise_conv import LARGE
from torch import Tensor

from sacl_fast.ops.batch_norm_act import ACTIVATIONS

FUNCTIONS = list(ACTIVATIONS.values())
# More images than threads at a time; pairs of channels gathered for a window of 5x5.
CASES = [
    *WINDOWS,
    ((40, 128, 3, 3), 128, (3, 3), (1, 1), (1, 1), (1, 1)),
    ((30, 128, 5, 4), 128, (5, 5), (2, 2), (2, 2), (1, 1)),
    ((2, 50, 7, 9), 24, (5, 5), (1, 1), (2, 2), (1, 1)),
]
PLAIN, GATHERED, EVEN, OBLONG = CASES[0], CASES[4], CASES[6], CASES[16]


class Call(NamedTuple):
    """What the operators are given, and their window."""

    x: Tensor
    affine: Tensor | None
    act: int
    weight: Tensor
    index: Tensor | None
    window: tuple


def call(case, dtype, act: int, normalised: bool = True) -> Call:
    shape, filters, kernel, *window = case
    generator = torch.Generator().manual_seed(sum(shape) + filters)
    weight = torch.randn(filters, *kernel, generator=generator).to(dtype)
    index = None
    if filters < shape[1]:
        index = torch.randperm(shape[1], generator=generator)[:filters]
    affine = torch.randn(4, shape[1], generator=generator)
    affine[3].abs_().add_(0.5)
    x = images(*shape, dtype=dtype)
    return Call(x, affine if normalised else None, act, weight, index, tuple(window))


def rows(values: Tensor) -> list[Tensor]:  # of (4, K), along with images
    return [v.view(1, -1, 1, 1) for v in values.double()]


class Exact(NamedTuple):
    """The convolution in float64, and what its gradients are taken of."""

    before: Tensor  # the activation
    operand: Tensor
    weight: Tensor
    y: Tensor


def exact(given: Call) -> Exact:
    before = given.x.double()
    if given.affine is not None:
        scale, bias, mean, _ = rows(given.affine)
        before = (before - mean) * scale + bias
    before.requires_grad_()
    operand = before if given.affine is None else FUNCTIONS[given.act](before * 1)
    operand.retain_grad()
    weight = given.weight.double().requires_grad_()
    read = operand if given.index is None else operand.index_select(1, given.index)
    y = F.conv2d(read, weight.unsqueeze(1), None, *given.window, groups=len(weight))
    return Exact(before, operand, weight, y)


def gradient(of: Tensor) -> Tensor:
    assert of.grad is not None
    return of.grad


def on(device, given: Call) -> tuple:
    x, affine, act, weight, index, window = given
    return *map(device.put, (x, affine)), act, *map(device.put, (weight, index)), *window


def merged(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:  # count, mean, variance
    counts, means, squares = sums.cpu().double().unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    return count, mean, (squares + counts * (means - mean).square()).sum(0) / count


def gradients_given(y: Tensor, normalised: bool) -> tuple[Tensor, Tensor | None, Tensor | None]:
    y = y.detach().contiguous(memory_format=torch.channels_last)
    g = images(*y.shape, dtype=y.dtype, seed=1)
    coefficients = torch.randn(4, y.shape[1], generator=torch.Generator().manual_seed(7))
    return (g, y, coefficients) if normalised else (g, None, None)


def compare_forward(device, given: Call, true: Exact) -> Tensor:
    y, sums = device.ops.norm_depthwise(*on(device, given))
    assert y.dtype == given.x.dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert_near(y, true.y.detach(), y.dtype)
    count, mean, variance = merged(sums)
    assert (count == true.y.numel() / true.y.shape[1]).all()
    assert_near(mean, true.y.detach().mean((0, 2, 3)), torch.float32)
    assert_near(variance, true.y.detach().var((0, 2, 3), correction=0), torch.float32, slack=2)
    return y.cpu()


def compare_backward(device, given: Call, true: Exact, taken, to_norm: bool) -> None:
    g, y, coefficients = taken
    dy = g.double()
    if coefficients is not None:
        c0, c1, c2, c3 = rows(coefficients)
        dy = c0 * dy + c1 * (y.double() - c3) + c2
    true.y.backward(dy, retain_graph=True)
    of_norm = to_norm and given.affine is not None
    expected = gradient(true.before if of_norm else true.operand)
    dx, gsums, dweight = device.ops.norm_depthwise_backward(
        *map(device.put, taken), *on(device, given), to_norm
    )
    assert dx.dtype == dweight.dtype == given.x.dtype
    assert_near(dx, expected, dx.dtype)
    assert_near(dweight, gradient(true.weight), dx.dtype)
    if of_norm and given.affine is not None:
        _, _, mean, rstd = rows(given.affine)
        xhat = (given.x.double() - mean) * rstd
        of_sums = torch.stack([expected.sum((0, 2, 3)), (expected * xhat).sum((0, 2, 3))])
        assert_near(gsums.cpu().double().sum(0), of_sums, torch.float32, slack=4)
    else:
        assert gsums.shape == (0,)
    if given.index is not None:
        unread = torch.ones(dx.shape[1], dtype=torch.bool)
        unread[given.index] = False
        assert (dx.cpu()[:, unread] == 0).all()
        assert not of_norm or (gsums.cpu()[..., unread] == 0).all()


def compare(device, given: Call, *, norm_after: bool = True, to_norm: bool = True) -> None:
    true = exact(given)
    y = compare_forward(device, given, true)
    compare_backward(device, given, true, gradients_given(y, norm_after), to_norm)


@both()
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_pytorch(device, case, dtype):
    compare(device, call(case, dtype, act=CASES.index(case) % len(FUNCTIONS)))


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_equals_pytorch_at_full_size(device, case, dtype):
    compare(device, call(case, dtype, act=2))


@both()
@pytest.mark.parametrize("act", range(len(FUNCTIONS)), ids=list(ACTIVATIONS))
@pytest.mark.parametrize("case", [EVEN, OBLONG], ids=str)
def test_activations(device, case, act):
    compare(device, call(case, torch.float32, act))


@both()
@pytest.mark.parametrize("case", [PLAIN, GATHERED, OBLONG], ids=str)
@pytest.mark.parametrize("norm_before", [True, False])
@pytest.mark.parametrize("norm_after", [True, False])
@pytest.mark.parametrize("to_norm", [True, False])
def test_without_one_of_the_norms(device, case, norm_before, norm_after, to_norm):
    given = call(case, torch.float32, act=3, normalised=norm_before)
    compare(device, given, norm_after=norm_after, to_norm=to_norm)


@both()
@pytest.mark.parametrize("case", [(PLAIN[0], 16, (3, 3), (1, 1), (0, 0), (1, 1)), OBLONG], ids=str)
def test_an_offset_costs_the_statistics_no_digits(device, case):
    shape, filters, kernel, stride, _, dilation = case
    case = shape, filters, kernel, stride, (0, 0), dilation
    given = call(case, torch.float32, act=0, normalised=False)
    given = given._replace(x=given.x + 1000, weight=given.weight.abs() + 0.1)
    y = exact(given).y.detach()
    _, mean, variance = merged(device.ops.norm_depthwise(*on(device, given))[1])
    assert_near(mean, y.mean((0, 2, 3)), torch.float32)
    assert_near(variance, y.var((0, 2, 3), correction=0), torch.float32, slack=100)


@both()
def test_addresses_that_do_not_suit_vectors(device):
    given = call(PLAIN, torch.float16, act=2)
    true = exact(given)

    def shifted(t: Tensor) -> Tensor:
        memory = torch.empty(t.numel() + 1, dtype=t.dtype, device=t.device)[1:]
        return memory.as_strided(t.shape, t.stride()).copy_(t)

    x, *others = on(device, given)
    y, _ = device.ops.norm_depthwise(shifted(x), *others)
    assert_near(y, true.y.detach(), torch.float16)
    g = images(*y.shape, dtype=y.dtype, seed=1)
    true.y.backward(g.double())
    for of_g, of_x in ((shifted(device.put(g)), x), (device.put(g), shifted(x))):
        dx, _, dweight = device.ops.norm_depthwise_backward(of_g, None, None, of_x, *others, True)
        assert_near(dx, gradient(true.before), torch.float16)
        assert_near(dweight, gradient(true.weight), torch.float16)


@both()
@pytest.mark.parametrize("case", [GATHERED, CASES[13]], ids=str)
def test_nan_in_a_channel_that_no_filter_reads(device, case):
    given = call(case, torch.float32, act=3)
    unread = torch.ones(given.x.shape[1], dtype=torch.bool)
    unread[given.index] = False
    given.x[:, unread] = float("nan")
    y, sums = device.ops.norm_depthwise(*on(device, given))
    taken = map(device.put, gradients_given(y.cpu(), True))
    gradients = device.ops.norm_depthwise_backward(*taken, *on(device, given), True)
    assert not any(t.isnan().any() for t in (y, sums, *gradients))


def run(device, given: Call, taken) -> tuple[Tensor, ...]:
    forward = device.ops.norm_depthwise(*on(device, given))
    backward = device.ops.norm_depthwise_backward(*map(device.put, taken), *on(device, given), True)
    return *forward, *backward


@both()
@pytest.mark.parametrize("case", [PLAIN, GATHERED, OBLONG], ids=str)
def test_the_same_input_gives_the_same_bits(device, case):
    given = call(case, torch.bfloat16, act=4)
    taken = gradients_given(exact(given).y.bfloat16(), True)
    assert all(map(torch.equal, run(device, given, taken), run(device, given, taken)))


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
@pytest.mark.parametrize("case", [PLAIN, GATHERED, OBLONG], ids=str)
def test_the_order_of_threads_changes_nothing(device, case):
    given = call(case, torch.float32, act=2)
    taken = gradients_given(exact(given).y.float(), True)
    first = run(device, given, taken)
    emulator().sacl_simt_reverse(1)
    try:
        assert all(map(torch.equal, first, run(device, given, taken)))
    finally:
        emulator().sacl_simt_reverse(0)


@both()
def test_wrong_arguments_are_errors(device):
    given = call(PLAIN, torch.float32, act=1)
    conv, gradients = device.ops.norm_depthwise, device.ops.norm_depthwise_backward
    x, affine, act, weight, *others = on(device, given)
    with pytest.raises(RuntimeError, match="affine has not the shape"):
        conv(x, affine[:, 1:].contiguous(), act, weight, *others)
    with pytest.raises(RuntimeError, match="there is no activation 5"):
        conv(x, affine, 5, weight, *others)
    with pytest.raises(RuntimeError, match="weight is not contiguous, of the expected type"):
        conv(x, affine, act, weight.half(), *others)
    with pytest.raises(RuntimeError, match="channels-last"):
        conv(x.contiguous(), affine, act, weight, *others)
    y, _ = conv(x, affine, act, weight, *others)
    with pytest.raises(RuntimeError, match="y goes with coefficients"):
        gradients(y, y, None, x, affine, act, weight, *others, True)
    with pytest.raises(RuntimeError, match="g has not the shape"):
        gradients(y[:1], None, None, x, affine, act, weight, *others, True)
