"""Gradients through batch norms of constant channels: ``norm_gradient`` and what ``auto`` takes."""

import copy
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.encoders import build_encoder
from sacl_fast.errors import UserError
from sacl_fast.ops import batch_norm_act
from sacl_fast.ops.batch_norm import DAMPED, damped, put_back
from sacl_fast.passes import RecordedEncoder
from sacl_fast.slim import Slicer
from sacl_fast.slim.slicer import Mode
from tests.modules import channels_last
from tests.slim.reparameterised import Reparameterised

EPS = 1e-5


def expected_factor(x: torch.Tensor, eps: float = EPS) -> torch.Tensor:
    """(1, C, ...), by the definition."""
    rows = x.detach().transpose(0, 1).flatten(1).double()  # (C, n)
    variance = ((rows - rows.mean(1, keepdim=True)) ** 2).mean(1)
    return (variance / eps).clamp(max=1).view(1, -1, *[1] * (x.ndim - 2))


# --- one norm -------------------------------------------------------------------------------------

SPREADS = torch.tensor([0.0, 1e-9, 1e-4, 1e-3, 0.0031, 0.0033, 0.1, 3.0], dtype=torch.float64)


@pytest.mark.parametrize("shape", [(6, 8), (2, 8, 5), (3, 8, 4, 5), (1, 8, 7, 3)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_the_factor_of_each_channel(shape, dtype):
    torch.manual_seed(0)
    spread = SPREADS.view(1, -1, *[1] * (len(shape) - 2))
    x = (torch.randn(shape, dtype=torch.float64) * spread).to(dtype).requires_grad_()
    g = torch.randn(shape).to(dtype)
    y, taken = damped(x, EPS)
    varied = (expected_factor(x) == 1).expand(shape)
    expected = torch.where(varied[:1], 0, x)[:1].transpose(0, 1).flatten(1)[:, 0]  # (C,)
    assert torch.equal(taken, expected)
    assert torch.equal(y, x - taken.view(1, -1, *[1] * (x.ndim - 2)))
    (gradient,) = torch.autograd.grad(y, x, g)
    assert gradient.dtype == dtype
    expected = g.double() * expected_factor(x)
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-2, atol=1e-6)
    assert torch.equal(y[varied], x[varied])
    assert torch.equal(gradient[varied], g[varied]) and varied.any()
    assert (gradient[:, 0] == 0).all()


def test_a_large_constant_is_one_however_it_is_rounded():
    for value in (0.1, 1 / 3, -7.7, 123.4):
        x = torch.full((4, 3, 9, 11), value).contiguous(memory_format=torch.channels_last)
        x.requires_grad_()
        norm = nn.BatchNorm2d(3)
        given, taken = damped(x, EPS)
        y = norm(given)
        put_back(norm.running_mean, taken, 0.1)
        (gradient,) = torch.autograd.grad(y, x, torch.randn_like(x))
        assert (gradient == 0).all() and (y == 0).all()
        torch.testing.assert_close(norm.running_mean, torch.full((3,), 0.1 * value))


@pytest.mark.parametrize("spread", [1e-6, 1e-5, 1e-3])
def test_a_norm_of_what_hardly_varies_is_float64_s(spread):
    """Beside a mean of 1 to 8, whose rounding is as large as the smallest spread."""
    torch.manual_seed(0)
    x = (torch.arange(1.0, 9.0).view(1, 8, 1, 1) + spread * torch.randn(4, 8, 9, 7)).float()
    results = []
    for given in (x, x.double()):
        norm = nn.BatchNorm2d(8, dtype=given.dtype)
        values, taken = damped(given, EPS)
        out = norm(values)
        put_back(norm.running_mean, taken, 0.1)
        results.append((out, norm.running_mean, norm.running_var))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got.double(), expected, rtol=1e-6, atol=1e-6 * 316 * spread)
    norm = nn.BatchNorm2d(8)
    with torch.no_grad():
        assert (norm(x).double() - results[1][0]).abs().max() > 1e-5  # what it would be


def test_running_means_of_some_channels():
    running = torch.zeros(5)
    put_back(running, torch.tensor([2.0, 3.0]), 0.5, torch.tensor([4, 1]))
    assert running.tolist() == [0, 1.5, 0, 0, 1]
    put_back(None, torch.ones(2), 0.5)


def test_values_do_not_depend_on_gradients():
    x = torch.randn(2, 3, 4, 4) * torch.tensor([1.0, 1e-4, 0.0]).view(3, 1, 1) + 5
    values, taken = damped(x, EPS)
    x.requires_grad_()
    with torch.no_grad():
        assert all(map(torch.equal, damped(x, EPS), (values, taken)))
    assert torch.equal(damped(x, EPS)[0], values)
    assert damped(x, 0.0)[0] is x


def test_the_host_reads_no_value():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.randn(2, 3, 4, 4, requires_grad=True)
        damped(x, EPS)[0].sum().backward()


# --- slim encoders --------------------------------------------------------------------------------


class ReferenceNorm(_BatchNorm):
    """Train-mode batch norm written out, with the gradient that is defined."""

    def _check_input_dim(self, input):
        pass

    def forward(self, x):
        shape = [1, -1, *[1] * (x.ndim - 2)]
        dims = [0, *range(2, x.ndim)]
        factor = expected_factor(x, self.eps)
        x = x.view_as(x)
        x.register_hook(lambda gradient: gradient * factor)
        mean, variance = x.mean(dims), x.var(dims, correction=0)
        out = (x - mean.view(shape)) / (variance + self.eps).sqrt().view(shape)
        assert self.momentum is not None and self.num_batches_tracked is not None
        with torch.no_grad():
            self.running_mean.lerp_(mean, self.momentum)
            self.running_var.lerp_(x.var(dims), self.momentum)
            self.num_batches_tracked += 1
        return out * self.weight.view(shape) + self.bias.view(shape)


def with_reference_norms(module: nn.Module) -> nn.Module:
    for name, child in module.named_children():
        setattr(module, name, with_reference_norms(child))
    if not isinstance(module, _BatchNorm):
        return module
    twin = ReferenceNorm(module.num_features, eps=module.eps, momentum=module.momentum)
    twin.load_state_dict(module.state_dict())
    return twin.double()


def with_bias(encoder: nn.Module, std: float) -> nn.Module:
    """Norms as after some training: constants that are not 0, maps that vary a little."""
    for norm in encoder.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=std)
    return encoder


def observe(encoder, x, *around, run=None) -> dict[str, torch.Tensor]:
    x = x.clone().requires_grad_()
    torch.manual_seed(1)
    with around[0] if around else torch.enable_grad():
        out = (run or encoder)(x)
    (
        out.square() + torch.linspace(-1, 1, out.numel()).to(out).view(out.shape) * out
    ).sum().backward()
    return {
        "out": out.detach(),
        "x": x.grad,
        **{f"grad.{n}": p.grad for n, p in encoder.named_parameters() if p.grad is not None},
        **{n: b.double() for n, b in encoder.named_buffers()},
    }


def assert_equal(got, expected, tolerance: float = 1e-9) -> None:
    """Gradients relative to the largest: those of a bias before a norm are rounding noise."""
    assert got.keys() == expected.keys()
    largest = largest_gradient(expected)
    for name, value in expected.items():
        scale = largest if name.startswith("grad.") else value.abs().max().clamp(min=1e-3)
        error = (got[name] - value).abs().max() / scale
        assert error < tolerance, f"{name}: {error:.1e}"


def largest_gradient(seen) -> float:
    return max(v.abs().max().item() for name, v in seen.items() if name.startswith("grad."))


@pytest.mark.parametrize("std", [0.0, 1e-5, 1e-3, 0.5])
def test_masked_skipped_and_defined_gradients_are_one(std):
    torch.manual_seed(0)
    # Two blocks: rounding of a constant grows over its norms as well, in values.
    encoder = with_bias(Reparameterised(blocks=2), std).double()
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    reference = with_reference_norms(copy.deepcopy(encoder))
    results = []
    ways: list[tuple[Mode, nn.Module]] = [
        ("mask", reference),
        ("mask", encoder),
        ("skip", copy.deepcopy(encoder)),
    ]
    for mode, own in ways:
        gradient = "exact" if own is reference else "damped"
        slicer = Slicer(own, 0.4, norm_gradient=gradient)
        results.append(observe(own, x, slicer.mode(mode)))
    assert_equal(results[1], results[0])
    assert_equal(results[2], results[0])
    assert not DAMPED.get() and not any(m._forward_pre_hooks for m in encoder.modules())


def test_separate_norms():
    torch.manual_seed(0)
    encoder = with_bias(Reparameterised(blocks=2), 1e-3).double()
    x = torch.randn(4, 3, 12, 12, dtype=torch.float64)
    results = []
    for mode in ("mask", "skip"):
        own = copy.deepcopy(encoder)
        slicer = Slicer(own, 0.4, batch_norm="separate", norm_gradient="damped").double()
        seen = observe(own, x, slicer.mode(mode))
        seen |= {f"grad.{n}": p.grad for n, p in slicer.named_parameters()}
        seen |= {n: b.double() for n, b in slicer.named_buffers()}
        results.append(seen)
    shared = Slicer(encoder, 0.4, norm_gradient="damped")
    expected = observe(encoder, x, shared.mode("mask"))
    assert_equal(results[1], results[0])
    torch.testing.assert_close(results[0]["x"], expected["x"])


@pytest.mark.parametrize("name", ["repvit_m0_9", "ghostnet_050", "efficientvit_m0"])
def test_encoders_in_which_it_compounds(name):
    """No gradient is far from the dense encoder's (RepViT: else 1e28 times), and skipped equals
    masked, before training and once the norms have biases."""
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=32).double().train()
    x = torch.randn(6, 3, 32, 32, dtype=torch.float64)
    for std in (0.0, 0.01):
        if std:
            with_bias(encoder, std)
        results = {}
        for mode in ("dense", "mask", "skip"):
            own = copy.deepcopy(encoder)
            results[mode] = observe(own, x, Slicer(own, norm_gradient="damped").mode(mode))
        for mode in ("mask", "skip"):
            assert largest_gradient(results[mode]) < 1e3 * largest_gradient(results["dense"])
        assert_equal(results["skip"], results["mask"], 1e-7)
    assert all(map(torch.equal, results["dense"].values(), observe(encoder, x).values()))


def gradients(seen) -> torch.Tensor:
    return torch.cat([v.double().flatten() for k, v in seen.items() if k.startswith("grad.")])


def test_autocast():
    torch.manual_seed(0)
    encoder = with_bias(Reparameterised(24), 0.2)
    x = torch.randn(8, 3, 24, 24)
    exact = copy.deepcopy(encoder).double()
    truth = observe(exact, x.double(), Slicer(exact, norm_gradient="damped").mode("mask"))
    errors = {}
    for mode in ("mask", "skip"):
        own = copy.deepcopy(encoder)
        slicer = Slicer(own, norm_gradient="damped")
        with torch.autocast("cpu", torch.bfloat16):
            seen = observe(own, x, slicer.mode(mode))
        got, wanted = map(gradients, (seen, truth))
        assert got.isfinite().all()
        errors[mode] = ((got - wanted).norm() / wanted.norm()).item()
    assert errors["skip"] < 1.5 * errors["mask"] and errors["mask"] < 0.5, errors


@pytest.mark.skipif(not batch_norm_act.is_compiled(), reason="the compiled module is not built")
@pytest.mark.parametrize("std", [0.0, 1e-3, 0.5])
def test_the_compiled_operators(std):
    """In float32, as near to float64 as the masked encoder is."""
    torch.manual_seed(0)
    encoder = channels_last(with_bias(Reparameterised(24), std))
    x = torch.randn(8, 3, 24, 24).contiguous(memory_format=torch.channels_last)
    seen = {}
    ways: list[tuple[str, Mode, str, torch.dtype]] = [
        ("exact", "mask", "torch", torch.float64),
        ("masked", "mask", "torch", torch.float32),
        ("skipped", "skip", "auto", torch.float32),  # maps are not all channels-last
    ]
    for name, mode, backend, dtype in ways:
        own = copy.deepcopy(encoder).to(dtype)
        slicer = Slicer(own, norm_gradient="damped")
        slicer.backend = backend
        results = observe(own, x.to(dtype), slicer.mode(mode))
        seen[name] = gradients(results)
    norm = seen["exact"].norm()
    errors = {n: ((seen[n] - seen["exact"]).norm() / norm).item() for n in ("masked", "skipped")}
    assert errors["skipped"] < 3 * max(errors["masked"], 1e-6), errors


@pytest.mark.parametrize("way", ["mask", "skip", "recorded", "fused"])
@pytest.mark.parametrize(
    ("name", "tolerance"), [(None, 1e-4), ("repvit_m0_9", 0.05)], ids=["small", "repvit"]
)
def test_float32_is_float64_before_training(name, tolerance, way):
    """No norm of a constant makes a signal of rounding; RepViT's features were all noise, in
    float64 too. Filters of one channel have biases, so constants are not 0."""
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=32) if name else Reparameterised(24, blocks=8)
    x = torch.randn(6, 3, 32, 32)
    encoder = channels_last(encoder.train())
    x = x.contiguous(memory_format=torch.channels_last)
    seen = []
    for dtype in (torch.float64, torch.float32):
        own = copy.deepcopy(encoder).to(dtype)
        slicer = Slicer(own, norm_gradient="damped")
        if dtype == torch.float64 or way == "mask":
            seen.append(observe(own, x.to(dtype), slicer.mode("mask")))
            continue
        if way == "skip":
            seen.append(observe(own, x, slicer.mode("skip")))
            continue
        recorded = RecordedEncoder(slicer, fused="all" if way == "fused" else "none")
        fresh = copy.deepcopy(own.state_dict())
        results = {}
        for _ in range(3):
            own.load_state_dict(fresh)
            own.zero_grad()
            results = observe(own, x, run=recorded)
        assert [kind.confirmed is not None for kind in recorded._kinds.values()] == [True]
        seen.append(results)
    for key, of in (("out", lambda s: s["out"].double()), ("gradient", gradients), ("mean", means)):
        got, expected = of(seen[1]), of(seen[0])
        error = ((got - expected).norm() / expected.norm()).item()
        assert error < tolerance, (key, error)


def means(seen) -> torch.Tensor:
    return torch.cat([v.flatten() for k, v in seen.items() if k.endswith("running_mean")])


@pytest.mark.parametrize("backend", ["torch", "auto"])
def test_recorded_passes(backend):
    torch.manual_seed(0)
    encoder = channels_last(with_bias(Reparameterised(), 1e-3))
    twin = copy.deepcopy(encoder)
    slicer, twins = (Slicer(e, 0.4, norm_gradient="damped") for e in (encoder, twin))
    slicer.backend = twins.backend = backend
    recorded = RecordedEncoder(slicer)
    batches = torch.randn(3, 4, 3, 12, 12).unbind()
    batches = [x.contiguous(memory_format=torch.channels_last) for x in batches]
    for step, x in enumerate(batches):
        for run, around in ((recorded, torch.enable_grad()), (twin, twins.mode("skip"))):
            with around:
                run(x).square().sum().backward()
        for (name, p), q in zip(encoder.named_parameters(), twin.parameters(), strict=True):
            assert p.grad is not None and q.grad is not None, (step, name)
            assert torch.equal(p.grad, q.grad), (step, name)
    own = next(iter(recorded._kinds.values()))
    assert own.confirmed is not None
    slicer.norm_gradient = twins.norm_gradient = "exact"  # is another kind of pass
    for run, around in ((recorded, torch.enable_grad()), (twin, twins.mode("skip"))):
        with around:
            run(batches[-1]).square().sum().backward()
    for (name, p), q in zip(encoder.named_parameters(), twin.parameters(), strict=True):
        assert p.grad is not None and q.grad is not None, name
        assert torch.equal(p.grad, q.grad), name


@pytest.mark.parametrize("name", ["resnet18", "regnety_002"])
def test_where_norms_vary_damped_is_exact_to_the_bit(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=64).train()
    x = torch.randn(4, 3, 64, 64)
    results = []
    for gradient in ("exact", "damped"):
        own = copy.deepcopy(encoder)
        results.append(observe(own, x, Slicer(own, norm_gradient=gradient).mode("mask")))
    for key, value in results[0].items():
        assert torch.equal(value, results[1][key]), key


def test_recalibrated_statistics_do_not_depend_on_it():
    torch.manual_seed(0)
    encoder = with_bias(Reparameterised(blocks=2), 1e-3).double().train()
    batches = torch.randn(3, 4, 3, 12, 12, dtype=torch.float64).unbind()
    found = []
    for gradient in ("exact", "damped"):
        slicer = Slicer(copy.deepcopy(encoder), norm_gradient=gradient)
        slicer.recalibrate(batches)
        found.append(slicer.statistics)
    for name, expected in found[0].items():
        torch.testing.assert_close(found[1][name], expected, rtol=1e-9, atol=1e-9, msg=name)


@pytest.mark.parametrize("unknown", ["dampened", "auto"])
def test_unknown_choices(unknown: Any):
    with pytest.raises(UserError, match="damped"):
        Slicer(nn.Sequential(nn.Conv2d(3, 4, 1)), norm_gradient=unknown)
