"""Recordings with fused batch norms compute what the encoder does, as exactly as the encoder.

The yardstick is the eager encoder in float64: a fused pass may be off by about as much as the same
pass in float32 is, and by no more.
"""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from sacl_fast.passes import RecordedEncoder
from sacl_fast.passes.graph import Fusion
from sacl_fast.passes.recorded import RecordedMode
from sacl_fast.slim import Slicer
from tests.modules import channels_last
from tests.passes.pairs import encoder_of

pytest.importorskip("sacl_fast._C", reason="the operators that are fused are compiled")

SIZE = 48
RECORDED = 3  # passes of a kind before the recording runs


def images(n, size):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(n, 3, size, size, generator=generator)
    return x.contiguous(memory_format=torch.channels_last)


class Passes:
    """One encoder three times: fused, as recorded, and eager in float64."""

    def __init__(
        self,
        encoder: nn.Module,
        mode: RecordedMode,
        ratio=0.5,
        *,
        n=4,
        size=SIZE,
        input_gradient=False,
        fused: Fusion = "all",
        **options,
    ) -> None:
        encoder = channels_last(encoder).train()
        self.mode: RecordedMode = mode
        self.n, self.size, self.input_gradient = n, size, input_gradient
        self.encoders = [encoder, copy.deepcopy(encoder), copy.deepcopy(encoder).double()]
        self.slicers = [Slicer(e, ratio, **options) for e in self.encoders]
        self.fused = RecordedEncoder(self.slicers[0], mode, fused=fused)
        self.plain = RecordedEncoder(self.slicers[1], mode)
        for run in (self.fused, self.plain):
            self.prepare(run)

    def images(self):
        return images(self.n, self.size)

    def prepare(self, run: RecordedEncoder) -> None:
        """Have it record, and nothing changed by that."""
        before = copy.deepcopy(run.slicer.encoder.state_dict()), run.slicer.state_dict()
        own = copy.deepcopy(before[1])
        for _ in range(RECORDED):
            run(self.images().requires_grad_(self.input_gradient)).sum().backward()
            with torch.no_grad():
                run(self.images())
        run.slicer.encoder.load_state_dict(before[0])
        run.slicer.load_state_dict(own)
        for p in (*run.slicer.encoder.parameters(), *run.slicer.parameters()):
            p.grad = None

    @property
    def norms(self) -> int:
        """Those that are fused in passes with gradient."""
        return max(recording.fused_norms for recording in self.recordings)

    @property
    def recordings(self):
        found = [kind.confirmed for kind in self.fused._kinds.values() if kind.confirmed]
        assert len(found) >= 2, "with gradient and without"
        return found

    def exact(self, x):
        with self.slicers[2].mode("mask" if self.mode == "skip" else "dense"):
            return self.encoders[2](x)

    def compare(self) -> None:
        """A pass with gradient and one without, and what they leave behind."""
        runs = (self.fused, self.plain, self.exact)
        results = [
            self.run(run, self.images().to(dtype), encoder, slicer)
            for run, encoder, slicer, dtype in zip(
                runs,
                self.encoders,
                self.slicers,
                (torch.float32, torch.float32, torch.float64),
                strict=True,
            )
        ]
        for name, exact in results[2].items():
            fused, plain = (distance(found[name], exact) for found in results[:2])
            assert fused <= 4 * plain + TOLERANCES[name], (name, fused, plain)

    def run(self, run, x, encoder, slicer):
        out = run(x.requires_grad_(self.input_gradient))
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        (out.square() + weights * out).sum().backward()
        with torch.no_grad():
            again = run(x.detach())
        modules = encoder, slicer
        parameters = [p for m in modules for p in m.parameters()]
        statistics = [b for m in modules for n, b in m.named_buffers() if "running" in n]
        counters = [b for m in modules for n, b in m.named_buffers() if "num_batches" in n]
        found = {
            "outputs": [out.detach(), again],
            "input's gradient": [] if x.grad is None else [x.grad],
            "gradients": [p.grad for p in parameters if p.grad is not None],
            "statistics": [b.clone() for b in statistics],
            "counters": [b.clone() for b in counters],
        }
        for p in parameters:
            p.grad = None
        return found


# Relative, beyond four times that of the pass in float32. A value on the other side of a kink of
# ReLU6 moves gradients by more than rounding does.
TOLERANCES = {
    **{"outputs": 1e-5, "statistics": 1e-5, "counters": 0.0},
    **{"input's gradient": 1e-2, "gradients": 1e-2},
}


def distance(found, exact) -> float:
    assert len(found) == len(exact)
    pairs = [(a.double(), b.double()) for a, b in zip(found, exact, strict=True)]
    off, size = (sum(float(x.square().sum()) for x in xs) for xs in (
        (a - b for a, b in pairs), (b for _, b in pairs)
    ))  # fmt: skip
    return (off / max(size, 1e-30)) ** 0.5


# Encoder -> norms that are fused in a dense pass, of all.
ENCODERS = {
    "mobilenetv1_100": 27,
    "mobilenetv2_100": 52,
    "mobilenetv3_small_100": 34,
    "efficientnet_b0": 49,
    "resnet50": 52,
    "mnasnet_100": 52,
    "regnetx_002": 44,
    "resnet20": 2,
}


@pytest.mark.parametrize("mode", ["whole", "skip"])
@pytest.mark.parametrize("name", ENCODERS)
def test_a_fused_pass_is_as_exact_as_the_encoder(name, mode):
    width = 1.0 if name in ("mnasnet_100", "regnetx_002") else 0.5
    passes = Passes(encoder_of(name, width=width), mode)
    if mode == "whole":
        assert passes.norms == ENCODERS[name]
    passes.compare()


# The same where 1x1 convolutions stay the library's.
AROUND = {"mobilenetv1_100": 26, "mobilenetv3_small_100": 22, "efficientnet_b0": 32}


@pytest.mark.parametrize("mode", ["whole", "skip"])
@pytest.mark.parametrize("name", AROUND)
def test_a_pass_that_is_fused_around_products_is_as_exact(name, mode):
    passes = Passes(encoder_of(name, width=0.5), mode, fused="around")
    if mode == "whole":
        assert passes.norms == AROUND[name]
    passes.compare()


@pytest.mark.parametrize("fused", ["around", "all"])
@pytest.mark.parametrize("mode", ["whole", "skip"])
@pytest.mark.parametrize("n", [2, 5])
def test_odd_sizes(mode, n, fused):
    Passes(encoder_of("mobilenetv3_small_100"), mode, n=n, size=67, fused=fused).compare()


def test_a_single_sample_is_left_as_it_is():
    passes = Passes(encoder_of("mobilenetv1_100"), "whole", n=1, size=64)
    passes.compare()
    assert passes.norms == 0


@pytest.mark.parametrize("batch_norm", ["shared", "separate"])
def test_filters_chosen_anew(batch_norm):
    passes = Passes(encoder_of("mobilenetv1_100"), "skip", batch_norm=batch_norm)
    for change in range(2):
        for encoder, slicer in zip(passes.encoders, passes.slicers, strict=True):
            generator = torch.Generator().manual_seed(change)
            with torch.no_grad():
                for m in encoder.modules():
                    if isinstance(m, nn.Conv2d):
                        order = torch.randperm(m.out_channels, generator=generator)
                        m.weight.copy_(m.weight[order])
            slicer.refresh()
        for run in (passes.fused, passes.plain):
            passes.prepare(run)
        passes.compare()


def test_drop_path():
    passes = Passes(encoder_of("efficientnet_b0", drop_path=0.3), "whole")
    x = images(6, SIZE)
    outputs = []
    for run in (passes.fused, passes.plain):
        torch.manual_seed(3)
        with torch.no_grad():
            run(x)  # recorded
            run(x)
            run(x)
            torch.manual_seed(3)
            outputs.append(run(x))
    torch.testing.assert_close(*outputs, rtol=1e-3, atol=1e-4)


# --- what other models do with a norm ---------------------------------------------------------


def normed(cin, cout, kernel=1, **options) -> nn.Sequential:
    conv = nn.Conv2d(cin, cout, kernel, padding=kernel // 2, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(cout))


class Model(nn.Module):
    """A few convolutions, and a ``middle`` that does something out of the ordinary."""

    def __init__(self, middle) -> None:
        super().__init__()
        self.stem = normed(3, 16, 3, stride=2)
        self.one, self.depthwise = normed(16, 24), normed(24, 24, 3, groups=24)
        self.two, self.other = normed(24, 24), normed(24, 24)
        self.five = normed(24, 24, 5, groups=24, stride=2)
        self.grouped, self.three = normed(24, 24, 3, groups=3), normed(24, 24, 3)
        self.biased = nn.Conv2d(24, 24, 1)
        self.norm = nn.BatchNorm2d(24)
        self.gate = nn.Conv2d(24, 24, 1)
        self.last = normed(24, 12)
        self.middle = middle

    def forward(self, x):
        x = F.relu(self.one(F.relu(self.stem(x))))
        x = F.relu(self.last(self.middle(self, x)))
        return x.mean((2, 3))


MIDDLES = {
    "two convolutions read one norm": lambda m, x: m.two(y := F.relu6(m.depthwise(x))) + m.other(y),
    "a norm is read again later": lambda m, x: m.two(y := F.silu(m.depthwise(x))) * y.sigmoid(),
    "no activation": lambda m, x: m.five(m.two(m.depthwise(x))),
    "a residual sum": lambda m, x: x + m.two(F.relu(m.depthwise(x))),
    "a residual sum with what a product reads": lambda m, x: x + m.two(F.relu(m.other(x))),
    "two residual sums": lambda m, x: (
        (y := x + m.two(F.relu(m.other(x)))) + m.biased(F.relu(m.norm(m.gate(y))))
    ),
    "a sum of two norms": lambda m, x: F.relu(m.two(x) + m.depthwise(x)),
    "a sum in place": lambda m, x: F.relu(m.two(x).add_(x), inplace=True),
    "a sum and what it was before its activation": lambda m, x: F.relu(y := m.two(x) + x) - y,
    "an activation in place": lambda m, x: m.two(F.hardswish(m.depthwise(x), inplace=True)),
    "a parameter in the activation": lambda m, x: m.two(F.leaky_relu(m.depthwise(x), 0.2)),
    "one norm for two convolutions": lambda m, x: m.norm(m.two[0](F.relu(m.norm(m.other[0](x))))),
    "a convolution that two norms read": lambda m, x: m.norm(y := m.two[0](x)) + m.two[1](y),
    "a convolution that more than its norm reads": lambda m, x: m.two[1](y := m.two[0](x)) + y,
    "bias before a norm": lambda m, x: F.relu(m.norm(m.biased(F.relu(m.depthwise(x))))),
    "grouped convolution": lambda m, x: m.two(F.relu(m.grouped(F.relu(m.depthwise(x))))),
    "full convolution": lambda m, x: m.two(F.relu(m.three(F.relu(m.other(x))))),
    "pooling": lambda m, x: m.two(F.max_pool2d(F.relu(m.depthwise(x)), 3, 2, 1)),
    "average of windows": lambda m, x: m.two(F.avg_pool2d(F.relu(m.depthwise(x)), 2)),
    "a gate": lambda m, x: m.two(
        (y := F.relu(m.depthwise(x))) * m.gate(y.mean((2, 3), keepdim=True)).sigmoid()
    ),
    "a gate of another's": lambda m, x: m.two(
        F.relu(m.depthwise(x)) * m.gate(x.mean((2, 3), keepdim=True)).sigmoid()
    ),
    "a gate on a depthwise convolution": lambda m, x: m.five(
        (y := F.relu(m.other(x))) * m.gate(y.mean((2, 3), keepdim=True)).sigmoid()
    ),
    "a gate read by two": lambda m, x: (
        m.two(z := (y := F.relu(m.depthwise(x))) * m.gate(y.mean((2, 3), keepdim=True)).sigmoid())
        + z
    ),
    "a mean beside the image": lambda m, x: (
        m.two(y := F.relu(m.depthwise(x))) + y.mean((2, 3), keepdim=True)
    ),
    "a norm in eval mode": lambda m, x: m.two(F.relu(m.norm.eval()(m.other[0](x)))),
    "a gradient that goes no further": lambda m, x: m.two(F.relu(m.depthwise(x)).detach()),
    "concatenation": lambda m, x: m.two(
        torch.cat([F.relu(m.depthwise(x))[:, ::2], F.relu(m.other(x))[:, 1::2]], 1)
    ),
    "one layer twice": lambda m, x: F.relu(m.depthwise(F.relu(m.depthwise(x)))),
    "a change in place after the norm": lambda m, x: m.two(F.silu(m.depthwise(x)).mul_(2)),
}


@pytest.mark.parametrize("mode", ["whole", "skip"])
@pytest.mark.parametrize("middle", MIDDLES)
@pytest.mark.parametrize("fused", ["around", "all"])
def test_whatever_a_model_does_with_a_norm(middle, mode, fused):
    torch.manual_seed(0)
    passes = Passes(Model(MIDDLES[middle]), mode, ratio=0.6, size=32, fused=fused)
    passes.compare()
    assert passes.norms >= 2 or fused == "around"


@pytest.mark.parametrize("frozen", ["depthwise", "two", "stem", "one"])
def test_frozen_layers(frozen):
    torch.manual_seed(0)
    model = Model(MIDDLES["a residual sum"])
    getattr(model, frozen).requires_grad_(False)
    Passes(model, "whole", size=32).compare()


@pytest.mark.parametrize("mode", ["whole", "skip"])
def test_the_gradient_of_the_images(mode):
    Passes(encoder_of("mobilenetv1_100"), mode, input_gradient=True).compare()


@pytest.mark.parametrize("name", ["mobilenetv2_100", "efficientnet_b0"])
def test_products_give_the_gradients_of_gates_and_add_those_of_residuals(name):
    passes = Passes(encoder_of(name), "whole")
    code = "".join(recording._backward.code for recording in passes.recordings)
    assert "norm_pointwise_backward" in code
    assert "aten.add." not in code and "gate_gradient" not in code
