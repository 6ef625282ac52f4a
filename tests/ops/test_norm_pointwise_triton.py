"""The Triton kernels against float64: on a GPU, or on any machine in Triton's interpreter.

Whether kernels are interpreted is settled when Triton is imported, so without a GPU the last test
runs this file once more in a process of its own. The interpreter shows no races and no layouts, and
its bf16 products are wrong, so bf16 is for the GPU alone.
"""
# ruff: noqa: E741 (O: output channels, as in the shapes)

import os
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from cuda_graphs import captured
from torch import Tensor

from sacl_fast.ops.norm_pointwise import register
from sacl_fast.verification import Wrong, verify
from sacl_kernels import norm_pointwise
from sacl_kernels.norm_pointwise_launch import launch_for

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
# Of the largest value. Half types: their own rounding, of operands and results.
TOLERANCES = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
DTYPES = [torch.float32, torch.float16] + ([] if INTERPRETED else [torch.bfloat16])
ACTIVATIONS = [lambda z: z, F.relu, F.relu6, F.hardswish, F.silu]
# N, K, H, W, O: one input, odd sizes, one pixel, several tiles, channels of one block and of
# several, rows of 16 bytes and not.
SHAPES = [
    (3, 1, 5, 3, 3),
    (5, 13, 1, 1, 16),
    (2, 40, 9, 11, 24),
    (2, 17, 7, 7, 150),
    (2, 136, 8, 7, 8),
    (1, 152, 9, 9, 144),
]
if not INTERPRETED:
    SHAPES += [(16, 32, 112, 112, 64), (64, 256, 14, 14, 512), (64, 1024, 7, 7, 1024)]


def device_test(test):
    return test if INTERPRETED else pytest.mark.gpu(test)


class Case:
    """Random arguments of both launchers."""

    def __init__(self, shape, dtype, act, *, plain=False, offset=None, weight_dtype=torch.float32):
        N, K, H, W, O = shape
        generator = torch.Generator().manual_seed(sum(shape) + act)

        def random(*size, scale=1.0, shift=0.0, dtype=torch.float32):
            values = torch.randn(size, generator=generator) * scale + shift
            return values.to(DEVICE, dtype)

        def images(*size, shift=0.0):
            values = random(*size, shift=shift, dtype=dtype)
            return values.contiguous(memory_format=torch.channels_last)

        self.act = act
        self.x, self.g = images(N, K, H, W, shift=0.5), images(N, O, H, W)
        self.affine = self.gate = self.y = self.coefficients = self.offset = self.other = None
        self.in_index = self.out_index = None
        inputs, outputs = K, O
        if not plain:
            self.affine = torch.stack([random(K, scale=0.5, shift=2), *random(3, K)])
            self.gate = random(N, K).sigmoid()
            self.y = images(N, O, H, W, shift=-1.0)
            self.coefficients = random(4, O)
            self.other = images(N, K, H, W)
            self.offset = images(*(offset or (1, O, H, W)))
            inputs, outputs = K + 5, O + 2
            self.in_index = torch.randperm(inputs, generator=generator)[:K].to(DEVICE)
            self.out_index = torch.randperm(outputs, generator=generator)[:O].to(DEVICE)
        self.weight = random(outputs, inputs, scale=K**-0.5, dtype=weight_dtype)

    def forward(self, **options):
        return norm_pointwise.forward(
            *(self.x, self.affine, self.act, self.gate, self.weight, self.in_index),
            *(self.out_index, self.offset),
            **options,
        )

    def backward(self, to_norm=True, input=True, **options):
        return norm_pointwise.backward(
            *(self.g, self.y, self.coefficients, self.x, self.affine, self.act, self.gate),
            *(self.weight, self.in_index, self.out_index, to_norm, input, self.other),
            **options,
        )

    def expected(self):
        """y; dx not to a norm and to one; sums of g and g * xhat (2, K); the gate's gradient;
        dweight: in float64."""
        x, g, weight = self.x.double(), self.g.double(), self.weight.double()
        z = xhat = x
        if self.affine is not None:
            scale, bias, mean, rstd = (v.double().view(1, -1, 1, 1) for v in self.affine)
            z, xhat = (x - mean) * scale + bias, (x - mean) * rstd
        z = z.requires_grad_()
        value = ACTIVATIONS[self.act](z) if self.affine is not None else z * 1
        gated = value if self.gate is None else value * self.gate.double()[:, :, None, None]
        part = weight if self.out_index is None else weight[self.out_index]
        part = part if self.in_index is None else part[:, self.in_index]
        y = torch.einsum("nkhw,ok->nohw", gated, part)
        y = y if self.offset is None else y + self.offset.double()
        dy = g
        if self.y is not None:
            c0, c1, c2, c3 = (v.double().view(1, -1, 1, 1) for v in self.coefficients)
            dy = c0 * g + c1 * (self.y.double() - c3) + c2
        dx = torch.einsum("nohw,ok->nkhw", dy, part)
        dx = dx if self.other is None else dx + self.other.double()
        dgate = (dx * value.detach()).sum((2, 3))
        (to_norm,) = torch.autograd.grad(value, z, dx)
        gsums = torch.stack([to_norm.sum((0, 2, 3)), (to_norm * xhat).sum((0, 2, 3))]).detach()
        dweight = torch.zeros_like(weight)
        outs, ins = (
            torch.arange(n, device=DEVICE) if i is None else i
            for i, n in zip((self.out_index, self.in_index), weight.shape, strict=True)
        )
        dweight[outs[:, None], ins] = torch.einsum("nohw,nkhw->ok", dy, gated.detach())
        return y.detach(), dx, to_norm, gsums, dgate, dweight


def merged(sums: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Count, mean and sum of squared differences of all sets together, in float64."""
    counts, means, squares = sums.double().unbind(1)
    count = counts.sum(0)
    mean = (counts * means).sum(0) / count
    return count, mean, (squares + counts * (means - mean).square()).sum(0)


def close(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    assert ours.shape == theirs.shape
    error = (ours.double() - theirs).abs().max() / theirs.abs().max().clamp_min(1e-30)
    assert error < tolerance, error.item()


def check_moments(sums: Tensor, y: Tensor, tolerance: float) -> None:
    count, mean, squares = merged(sums)
    values = y.double().transpose(0, 1).flatten(1)
    assert (count == values.shape[1]).all()
    deviation = values.std(1, correction=0)
    assert ((mean - values.mean(1)).abs() <= tolerance * deviation + 1e-6).all()
    expected = deviation.square() * values.shape[1]
    assert ((squares - expected).abs() <= tolerance * expected + 1e-9).all()


def check(case, dtype, to_norm=True, **options):
    """Both launchers against float64."""
    y, dx, dx_to_norm, gsums, dgate, dweight = case.expected()
    tolerance = TOLERANCES[dtype]
    ours, sums = case.forward(**options)
    assert ours.is_contiguous(memory_format=torch.channels_last) and ours.dtype == dtype
    close(ours, y, tolerance)
    check_moments(sums, ours, 10 * tolerance)
    our_dx, our_gsums, our_dgate, our_dweight = case.backward(to_norm, **options)
    assert our_dx.is_contiguous(memory_format=torch.channels_last) and our_dx.dtype == dtype
    close(our_dx, dx_to_norm if to_norm else dx, tolerance)
    if to_norm:
        close(our_gsums.double().sum(0), gsums, tolerance)
    else:
        assert not our_gsums.numel()
    if case.gate is None:
        assert not our_dgate.numel()
    else:
        close(our_dgate, dgate, 2 * tolerance)
    assert our_dweight.dtype == case.weight.dtype
    close(our_dweight, dweight, tolerance)
    assert (our_dweight[dweight == 0] == 0).all()
    return ours, sums, our_dx, our_gsums, our_dgate, our_dweight


@device_test
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_at_once(dtype, shape):
    """An activation, gate, offset and index lists; gradients to a norm."""
    case = Case(shape, dtype, act=sum(shape) % 5)
    results = check(case, dtype)
    for again, first in zip((*case.forward(), *case.backward()), results, strict=True):
        assert torch.equal(again, first)  # same input, same bits


@device_test
@pytest.mark.parametrize("act", range(5))
def test_activations_and_kinds_of_offsets(act):
    shape = N, _, H, W, O = (3, 8, 4, 5, 16)
    offset = [(1, O, 1, 1), (N, O, 1, 1), (N, O, H, W), (N, O, H, 1), (1, O, 1, W)][act]
    case = Case(shape, torch.float32, act, offset=offset)
    check(case, torch.float32, to_norm=act % 2 == 0)


@device_test
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nothing_but_a_convolution(dtype):
    case = Case((2, 16, 5, 7, 24), dtype, act=4, plain=True, weight_dtype=dtype)
    check(case, dtype, to_norm=False)


@device_test
@pytest.mark.parametrize("fused", [True, False], ids=["fused", "apart"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_few_programs_for_many_tiles(dtype, fused):
    """A multiprocessor's programs take all rows; gradients in one kernel and in two."""
    case = Case((1, 16, 21, 20, 32), dtype, act=3)
    launch = launch_for(16, 32, torch.float16, (9, 0))
    launch = replace(launch, processors=1, fused=launch.fused if fused else None)
    assert (launch.fused is not None) == fused
    results = check(case, dtype, launch=launch)
    assert len(results[1]) <= 3 and len(results[3]) <= 3
    dx, gsums, dgate, dweight = case.backward(input=False, launch=launch)
    assert not dx.numel() and not gsums.numel() and not dgate.numel()
    close(dweight, results[5].double(), TOLERANCES[dtype])
    case.gate = case.other = None
    check(case, dtype, launch=launch)


@device_test
def test_an_offset_in_the_data_costs_no_digits():
    case = Case((2, 8, 12, 12, 16), torch.float32, act=1)
    case.offset = case.offset + 1000
    y, sums = case.forward()
    check_moments(sums, y, 1e-4)


@device_test
def test_nan_stays():
    for act in range(5):
        case = Case((1, 8, 3, 3, 16), torch.float32, act)
        case.x[0, 3, 1, 1] = float("nan")
        y, sums = case.forward()
        assert y[0, :, 1, 1].isnan().all() and y.isnan().sum() == 16
        assert sums[:, 1].isnan().any()


@pytest.mark.gpu
def test_in_a_cuda_graph():
    case = Case((16, 64, 28, 28, 128), torch.bfloat16, act=2)
    graph, results = captured(lambda: (*case.forward(), *case.backward()))
    graph.replay()
    for again, first in zip(results, (*case.forward(), *case.backward()), strict=True):
        assert torch.equal(again, first)


@device_test
def test_the_self_check_passes_and_finds_a_wrong_gradient(monkeypatch):
    op, device = torch.ops.sacl_fast, torch.device(DEVICE)
    register()
    kernels = {
        "norm_pointwise": norm_pointwise.forward,
        "norm_pointwise_backward": norm_pointwise.backward,
    }
    if INTERPRETED:  # in place of what runs on CPUs, but in float64, in which cases are exact
        for name, kernel in kernels.items():
            plain = getattr(op, name)
            monkeypatch.setattr(op, name, by_type(plain, kernel))
    verify("norm_pointwise", "triton", device)
    own = op.norm_pointwise_backward

    def off(*given):
        dx, gsums, dgate, dweight = own(*given)
        return dx, gsums, dgate * (1.01 if given[0].dtype == torch.float32 else 1), dweight

    monkeypatch.setattr(op, "norm_pointwise_backward", off)
    with pytest.raises(Wrong, match=r"^float32: gradient of the gate \(13 to 9\) is off by 0.01"):
        verify("norm_pointwise", "triton", device)


def by_type(plain, kernel):
    return lambda g, *given: (plain if g.dtype == torch.float64 else kernel)(g, *given)


@pytest.mark.skipif(INTERPRETED, reason="this is it")
def test_all_of_this_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]


@pytest.mark.skipif(not INTERPRETED, reason="of the interpreter")
def test_the_interpreter_refuses_bf16():
    with pytest.raises(ValueError, match="bf16"):
        Case((1, 8, 3, 3, 16), torch.bfloat16, act=0).forward()
