"""The CUDA batch norm with activation against PyTorch in float64: values, gradients, statistics."""

import pytest
import torch
import torch.nn.functional as F
from cuda_devices import DTYPES, assert_near, both, emulator, images

from sacl_fast.ops.batch_norm_act import ACTIVATIONS

EPS, MOMENTUM = 1e-5, 0.1
# (shape of x, zeroed channels, channels in neither list): vectors of channels, single ones, more
# channels than a block takes, few rows and many.
CASES = [
    ((3, 16, 5, 7), 0, 0),
    ((2, 8, 1, 1), 0, 0),
    ((5, 3, 1, 1), 4, 0),
    ((4, 37, 9, 9), 20, 0),
    ((2, 264, 3, 3), 9, 7),
    ((2, 24, 40, 33), 600, 0),
]
LARGE = [((32, 64, 112, 112), 0, 0), ((64, 301, 14, 14), 211, 0), ((256, 1024, 7, 7), 0, 0)]


def inputs(shape, zeroed_count, others, dtype, offset=2.0):
    x = (images(*shape, dtype=torch.float32) * 3 + offset).to(dtype)
    dy = images(*shape, dtype=dtype, seed=1)
    generator = torch.Generator().manual_seed(sum(shape))
    C = shape[1] + zeroed_count + others
    weight, bias, mean = torch.randn(3, C, generator=generator)
    var = torch.rand(C, generator=generator)
    kept = zeroed = drest = None
    if zeroed_count or others:
        order = torch.randperm(C, generator=generator)
        kept, zeroed = order[: shape[1]], order[shape[1] : shape[1] + zeroed_count]
        drest = torch.randn(1, zeroed_count, 1, 1, generator=generator).to(dtype)
    return x, dy, drest, weight, bias, kept, zeroed, mean, var


def exact(act, x, dy, drest, weight, bias, kept, zeroed, mean, var):
    """Of the full activation, in which the zeroed channels are 0."""
    x, dy, mean, var = (t.double() for t in (x, dy, mean, var))
    weight, bias = (t.double().requires_grad_() for t in (weight, bias))
    live = x.requires_grad_()
    kept = torch.arange(x.shape[1]) if kept is None else kept
    zeroed = kept[:0] if zeroed is None else zeroed
    index = torch.cat([kept, zeroed])
    full = torch.cat([live, x.new_zeros(x.shape[0], len(zeroed), *x.shape[2:])], 1)
    own_mean, own_var = mean[index], var[index]
    if x.numel() == x.shape[1]:  # torch refuses one value
        out = bias[index].view(1, -1, 1, 1).expand(full.shape)
    else:
        arguments = (own_mean, own_var, weight[index], bias[index], True, MOMENTUM, EPS)
        out = F.batch_norm(full, *arguments)
    out = ACTIVATIONS[act](out)
    y, rest = out[:, : x.shape[1]], out[:1, x.shape[1] :, :1, :1]
    objective = (y * dy).sum() + (0 if drest is None else (rest * drest.double()).sum())
    dx, dweight, dbias = torch.autograd.grad(objective, (live, weight, bias))
    mean[index], var[index] = own_mean, own_var
    return y.detach(), rest.detach(), mean, var, dx, dweight, dbias


def run(device, act, x, dy, drest, weight, bias, kept, zeroed, mean, var):
    code = list(ACTIVATIONS).index(act)
    x, dy, drest, weight, bias, kept, zeroed, mean, var = map(
        device.put, (x, dy, drest, weight, bias, kept, zeroed, mean, var)
    )
    count = x.numel() // x.shape[1]
    y, rest, batch_mean, rstd = device.ops.batch_norm_act(
        x, weight, bias, kept, zeroed, mean, var, count, MOMENTUM, EPS, code
    )
    grads = device.ops.batch_norm_act_backward(
        dy, drest, x, weight, bias, kept, zeroed, batch_mean, rstd, code
    )
    return y, rest, mean, var, *grads


def compare(device, case, dtype, act):
    given = inputs(*case, dtype=dtype)
    ours = run(device, act, *given)
    assert [t.dtype for t in ours[:2]] == [dtype] * 2 and ours[4].dtype == dtype
    for i, (got, expected) in enumerate(zip(ours, exact(act, *given), strict=True)):
        # Of two values the gradient is what is left of a cancellation, in PyTorch's fp32 too.
        slack = 200 if i == 4 and case[0] == (2, 8, 1, 1) else 3
        # Parameters' gradients and statistics stay in fp32.
        assert_near(got, expected, dtype if i in (0, 1, 4) else torch.float32, slack)


@both()
@pytest.mark.parametrize("act", ACTIVATIONS)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_pytorch(device, case, act):
    for dtype in DTYPES:
        compare(device, case, dtype, act)


@pytest.mark.gpu
@pytest.mark.parametrize("device", ["cuda"], indirect=True)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_equals_pytorch_at_full_size(device, case, dtype):
    compare(device, case, dtype, "hardswish")


@both()
def test_an_offset_costs_no_digits(device):
    given = inputs((8, 24, 6, 6), 5, 0, torch.float32, offset=3000.0)
    for got, expected in zip(run(device, "none", *given), exact("none", *given), strict=True):
        assert (got.cpu().double() - expected).norm() < 1e-3 * expected.norm()


@both()
def test_a_constant_channel_becomes_its_bias_and_nan_stays(device):
    x, *rest = inputs((4, 24, 3, 3), 0, 0, torch.float32)
    bias = rest[3]
    x[:, 5] = 7.25
    y = run(device, "none", x, *rest)[0].cpu()
    torch.testing.assert_close(y[:, 5], bias[5].expand(4, 3, 3))
    x[1, 3, 0, 0] = float("nan")
    for act in ACTIVATIONS:
        y = run(device, act, x, *rest)[0].cpu()
        assert y[:, 3].isnan().all() and not y[:, 4].isnan().any()


@both()
def test_without_running_statistics_and_without_a_gradient_of_the_rest(device):
    x, dy, _, weight, bias, kept, zeroed, _, _ = inputs((3, 16, 5, 5), 8, 2, torch.float32)
    x, dy, weight, bias, kept, zeroed = map(device.put, (x, dy, weight, bias, kept, zeroed))
    lists = (kept, zeroed)
    outputs = device.ops.batch_norm_act(x, weight, bias, *lists, None, None, 75, MOMENTUM, EPS, 1)
    assert not any(t.isnan().any() for t in outputs)
    _, dweight, dbias = device.ops.batch_norm_act_backward(
        dy, None, x, weight, bias, *lists, *outputs[2:], 1
    )
    live = torch.zeros(26, dtype=torch.bool)
    live[kept.cpu()] = True
    for grad in (dweight.cpu(), dbias.cpu()):
        assert (grad[~live] == 0).all() and not grad.isnan().any()


@pytest.mark.parametrize("device", ["emulated"], indirect=True)
def test_the_order_of_threads_changes_nothing(device):
    given = inputs((4, 40, 6, 6), 20, 0, torch.bfloat16)
    first = run(device, "silu", *given)
    emulator().sacl_simt_reverse(1)
    try:
        assert all(map(torch.equal, first, run(device, "silu", *given)))
    finally:
        emulator().sacl_simt_reverse(0)


@both()
def test_wrong_arguments_are_errors(device):
    x, _, _, weight, bias, *_ = inputs((3, 16, 5, 5), 0, 0, torch.bfloat16)
    x, weight, bias = map(device.put, (x, weight, bias))

    def forward(weight, bias, act):
        numbers = (75, MOMENTUM, EPS, act)
        device.ops.batch_norm_act(x, weight, bias, None, None, None, None, *numbers)

    with pytest.raises(RuntimeError, match="weight is not contiguous, of the expected type"):
        forward(weight.bfloat16(), bias, 0)
    with pytest.raises(RuntimeError, match="16 live and 0 zeroed channels are not of 15"):
        forward(weight[:15], bias[:15], 0)
    with pytest.raises(RuntimeError, match="no such activation"):
        forward(weight, bias, 9)
