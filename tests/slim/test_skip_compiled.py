"""Mode ``skip`` on the compiled operators, which take float32: as exact as ``mask`` in float32."""

import copy
from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.encoders import build_encoder
from sacl_fast.ops import batch_norm_act, depthwise_conv
from sacl_fast.ops.batch_norm_act import ACTIVATIONS
from sacl_fast.slim import Slicer
from sacl_fast.slim.slicer import Mode
from tests.modules import channels_last
from tests.operators import Operators

pytestmark = pytest.mark.skipif(
    not depthwise_conv.is_compiled(), reason="the compiled module is not built"
)


def observe(encoder: nn.Module, mode: Mode, backend: str, x: torch.Tensor) -> list[torch.Tensor]:
    """Output, gradients and running statistics, in float64."""
    encoder = copy.deepcopy(encoder).to(x.dtype)
    slicer = Slicer(encoder, 0.5)
    slicer.backend = backend
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    with slicer.mode(mode):
        out = encoder(x)
    weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
    (out.square() + weights * out).sum().backward()
    gradients = torch.cat([x.grad.flatten(), *(p.grad.flatten() for p in encoder.parameters())])
    buffers = torch.cat([b.double().flatten() for b in encoder.buffers()])
    return [out.detach().double(), gradients.double(), buffers]


@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv3_large_100", "efficientnet_b0"])
def test_compiled_operators_are_as_exact_as_the_masked_encoder(name, monkeypatch):
    torch.manual_seed(0)
    encoder = build_encoder(name, width=0.5, image_size=64).train()
    for norm in encoder.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.5)
    encoder = channels_last(encoder)
    x = torch.randn(6, 3, 64, 64)
    calls = {"norm": 0, "depthwise": 0}

    def count(module, which):
        original = module._unfit

        def unfit(*arguments):
            calls[which] += original(*arguments) is None
            return original(*arguments)

        monkeypatch.setattr(module, "_unfit", unfit)

    exact = observe(encoder, "mask", "torch", x.double())
    masked = observe(encoder, "mask", "torch", x)
    count(batch_norm_act, "norm")
    count(depthwise_conv, "depthwise")
    plain = observe(encoder, "skip", "torch", x)
    assert not any(calls.values())
    skipped = observe(encoder, "skip", "cpu", x)
    assert calls["norm"] > 20 and calls["depthwise"] > 10
    for truth, *others in zip(exact, masked, plain, skipped, strict=True):
        errors = [((other - truth).norm() / truth.norm()).item() for other in others]
        assert errors[2] < 3 * max(errors[0], 1e-6), errors


@pytest.mark.parametrize(
    ("name", "without_norm"),  # of squeeze-excite blocks and of the head
    [
        ("mobilenetv1_100", {}),
        ("mobilenetv2_100", {}),
        ("mobilenetv3_large_100", {"relu": 8, "hardswish": 1}),
        ("efficientnet_b0", {"silu": 16}),
    ],
)
def test_activations_run_along_with_their_norms(name, without_norm):
    encoder = channels_last(build_encoder(name, width=0.5, image_size=64)).train()
    x = torch.randn(2, 3, 64, 64).contiguous(memory_format=torch.channels_last)
    with Operators() as seen, Slicer(encoder, 0.5).mode("skip"):
        encoder(x)
    ran = Counter({op.rstrip("_"): n for op, n in seen.count.items()})
    assert ran["batch_norm_act"] >= sum(isinstance(m, _BatchNorm) for m in encoder.modules())
    activations = {*ACTIVATIONS, "hardtanh"}
    assert {op: n for op, n in ran.items() if op in activations} == without_norm
