"""Whole encoders in mode ``skip`` on the CUDA operators, against the masked encoder in float64."""

import copy

import pytest
import torch
from cuda_devices import Device, both
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.encoders import build_encoder
from sacl_fast.ops import (
    batch_norm_act,
    compiled,
    depthwise_conv,
    slim_add,
    slim_gate,
    slim_pointwise,
)
from sacl_fast.slim import Slicer
from tests.modules import channels_last

OPERATORS = """
    batch_norm_act batch_norm_act_backward depthwise_conv depthwise_conv_backward_input
    depthwise_conv_backward_weight slim_pointwise slim_pointwise_backward slim_add slim_add_backward
    slim_gate slim_gate_backward
""".split()


def observe(encoder, mode, x, *, backend="torch", dtype=None):
    """Output, gradients and running statistics, in float64 on the CPU."""
    encoder = copy.deepcopy(encoder).to(x.device, x.dtype)
    slicer = Slicer(encoder, 0.5)
    slicer.backend = backend
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with torch.autocast(x.device.type, dtype, enabled=dtype is not None), slicer.mode(mode):
        out = encoder(x)
    out = out.to(x.dtype)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype, device=out.device)
    (out.square() + weights.view(out.shape) * out).sum().backward()
    gradients = torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in encoder.parameters())])
    buffers = torch.cat([b.double().flatten() for b in encoder.buffers()])
    return [t.detach().double().cpu() for t in (out, gradients, buffers)]


@pytest.fixture
def calls(device: Device, monkeypatch) -> dict[str, int]:
    """How often each operator was called; emulated, they take the place of the CPU's."""
    for module in (batch_norm_act, depthwise_conv, slim_add, slim_gate, slim_pointwise):
        assert module.is_compiled()  # and tells torch of the operators before they are replaced
    counts: dict[str, int] = {name: 0 for name in OPERATORS}

    def counted(name: str):
        operator = getattr(device.ops, name)

        def call(*arguments, **named):
            counts[name] += 1
            return operator(*arguments, **named)

        return call

    for name in OPERATORS:
        monkeypatch.setattr(torch.ops.sacl_fast, name, counted(name))
    if device.name == "emulated":

        def unfit(x, *others):
            typed = all(t is None or t.dtype == x.dtype for t in others)
            last = x.is_contiguous(memory_format=torch.channels_last)
            fits = typed and x.dtype in compiled.CUDA_DTYPES and last and x.numel() > 0
            return None if fits else "unfit"

        monkeypatch.setattr(compiled, "unfit", unfit)
    return counts


@pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))
@pytest.mark.parametrize("dtype", [None, torch.bfloat16], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["mobilenetv3_small_100", "resnet18", "efficientnet_b0"])
@both()
def test_as_exact_as_the_masked_encoder(device: Device, name, dtype, calls):
    emulated = device.name == "emulated"
    torch.manual_seed(0)
    encoder = build_encoder(name, width=0.25 if emulated else 1.0, image_size=32).train()
    for norm in encoder.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.5)
    channels_last(encoder)
    x = torch.randn(4, 3, 35, 32) if emulated else torch.randn(16, 3, 67, 64)
    exact = observe(encoder, "mask", x.double())
    x = x if emulated else x.cuda()
    masked = observe(encoder, "mask", x, dtype=dtype)
    assert not any(calls.values())
    skipped = observe(encoder, "skip", x, backend="auto", dtype=dtype)
    absent = ("depthwise", "slim_gate", "slim_pointwise") if name == "resnet18" else ()
    for operator, count in calls.items():
        assert operator.startswith(absent) or count > 0, operator
    for truth, own, ours in zip(exact, masked, skipped, strict=True):
        errors = [((other - truth).norm() / truth.norm()).item() for other in (own, ours)]
        assert errors[1] < 3 * max(errors[0], 1e-6), errors
