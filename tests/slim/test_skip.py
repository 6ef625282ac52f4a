"""Mode ``skip`` against mode ``mask``: whole encoders, float64, everything that training sees."""

import copy
import logging

import pytest
import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.config import Config, EncoderConfig, LossConfig, ProjectorConfig, SlimConfig
from sacl_fast.data.views.tables import CIFAR
from sacl_fast.encoders import build_encoder
from sacl_fast.encoders.resnet20 import ResNet20
from sacl_fast.engine.method import build_method
from sacl_fast.losses import SaclXdLoss
from sacl_fast.passes import Passes
from sacl_fast.slim import Slicer
from sacl_fast.slim.tensor import _already_logged
from tests.modules import channels_last

# (encoder, width, ratio). Small widths where the family has them; each ratio at least once.
ENCODERS = [
    ("mobilenetv1_100", 0.5, 0.25),
    ("mobilenetv1_100", 0.5, 1.0),
    ("mobilenetv2_100", 0.5, 0.5),
    ("mobilenetv3_large_100", 0.5, 0.5),
    ("mobilenetv3_large_100", 0.5, 0.001),  # one filter in every layer
    ("efficientnet_b0", 0.5, 0.75),
    ("tf_efficientnet_b0", 1.0, 0.25),  # dynamic padding
    ("resnet18", 0.25, 0.167),
    ("resnet50", 0.25, 0.5),
    ("regnety_002", 1.0, 0.25),
    ("resnet20", 6 / 16, 0.5),
    ("resnet20", 6 / 16, 0.167),
]
SIZE = 33


def encoder_of(name: str, width: float = 1.0, **options) -> nn.Module:
    """In float64, with batch norms that are not those of an untrained network."""
    torch.manual_seed(0)
    if name == "resnet20":
        encoder: nn.Module = ResNet20(width, **options)
    else:
        encoder = build_encoder(name, width=width, image_size=SIZE, **options)
    for norm in encoder.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.uniform_(norm.weight, 0.5, 1.5)
            nn.init.normal_(norm.bias, std=0.5)
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return encoder.double()


def observe(encoder, slicer, mode, x, refreshes=1, unused=()) -> dict[str, torch.Tensor]:
    """Output, input gradient, parameter gradients and buffers after forward and backward.

    Every parameter has a gradient, but for those in modules named ``unused``.
    """
    x = x.clone().requires_grad_()
    seen = {}
    torch.manual_seed(1)
    for _ in range(refreshes):
        with slicer.mode(mode):
            out = encoder(x)
        weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
        (out.square() + weights * out).sum().backward()
        with torch.no_grad():
            for p in encoder.parameters():
                p += 0.05 * torch.randn_like(p) * p.std().nan_to_num()
        slicer.refresh()
        seen[f"out.{_}"] = out.detach()
    gradients = {
        n: p.grad for n, p in encoder.named_parameters() if n.partition(".")[0] not in unused
    }
    assert all(type(g) is torch.Tensor for g in gradients.values())
    buffers = {n: b.double() for n, b in encoder.named_buffers()}
    return {
        **seen,
        "x.grad": x.grad,
        **{f"grad.{n}": g for n, g in gradients.items()},
        **{f"buffer.{n}": b for n, b in buffers.items()},
        **{f"buffer.{n}": b.double() for n, b in slicer.named_buffers()},
    }


def assert_equal(got, expected, tolerance=1e-7) -> None:
    """Gradients relative to the largest of the model: one that is rounding noise says nothing."""
    assert got.keys() == expected.keys()
    largest = max(v.abs().max() for k, v in expected.items() if k.startswith("grad."))
    for name, value in expected.items():
        scale = largest if name.startswith("grad.") else value.abs().max().clamp(min=1e-3)
        error = (got[name] - value).abs().max() / scale
        assert error < tolerance, f"{name}: {error:.1e}"


def compare(name, width, ratio, *, training=True, refreshes=1, n=4, size=SIZE, **options) -> None:
    encoder = encoder_of(name, width).train(training)
    twin = copy.deepcopy(encoder)
    x = torch.randn(n, 3, size, size, dtype=torch.float64)
    skipped, masked = (
        observe(e, Slicer(e, ratio, **options), mode, x, refreshes)
        for e, mode in ((encoder, "skip"), (twin, "mask"))
    )
    assert_equal(skipped, masked)


@pytest.mark.parametrize(("name", "width", "ratio"), ENCODERS)
def test_training_equals_the_masked_encoder(name, width, ratio):
    compare(name, width, ratio)


@pytest.mark.parametrize(("name", "width", "ratio"), ENCODERS[::3])
def test_eval_mode(name, width, ratio):
    compare(name, width, ratio, training=False)


def test_masks_that_are_chosen_anew():
    compare("mobilenetv3_large_100", 0.5, 0.4, refreshes=3)


def test_separate_and_cumulative_batch_norm():
    encoder = encoder_of("mobilenetv2_100", 0.5).train()
    for norm in encoder.modules():
        if isinstance(norm, _BatchNorm):
            norm.momentum = None
    twin = copy.deepcopy(encoder)
    x = torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64)
    slicers = [Slicer(e, 0.3, batch_norm="separate").double() for e in (encoder, twin)]
    results = []
    for e, slicer, mode in zip((encoder, twin), slicers, ("skip", "mask"), strict=True):
        with slicer.mode(mode):
            e(x)
            e(2 * x).square().sum().backward()
        norms = dict(slicer.slim_norms.named_parameters())
        results.append(
            {
                **{f"grad.{n}": p.grad for n, p in norms.items()},  # each has one
                **{f"buffer.{n}": b.double() for n, b in slicer.named_buffers()},
            }
        )
    assert_equal(*results)


def test_a_single_image_and_channels_last():
    compare("efficientnet_b0", 0.5, 0.5, n=1, training=False)
    encoder = channels_last(encoder_of("mobilenetv1_100", 0.25))
    x = torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64).to(memory_format=torch.channels_last)
    slicer = Slicer(encoder, 0.5)
    twin = copy.deepcopy((encoder, slicer))
    skipped, masked = (
        observe(e, s, mode, x) for (e, s), mode in (((encoder, slicer), "skip"), (twin, "mask"))
    )
    assert_equal(skipped, masked)


@pytest.mark.parametrize("name", ["mobilenetv1_100", "mobilenetv3_small_100"])
def test_bfloat16_is_as_good_as_the_masked_encoder_s(name):
    """Both against float64: ``skip`` may round differently, but not worse."""
    encoder = encoder_of(name, 0.5).train()
    x = torch.randn(16, 3, 64, 64, dtype=torch.float64)
    outputs = {}
    for mode in ("mask", "skip"):
        own = copy.deepcopy(encoder).float()
        with Slicer(own, 0.5).mode(mode), torch.autocast("cpu", torch.bfloat16):
            outputs[mode] = own(x.float())
        outputs[mode].float().square().sum().backward()
        assert all(p.grad.isfinite().all() for p in own.parameters())
    with Slicer(encoder, 0.5).mode("mask"):
        exact = encoder(x)
    error = {m: (out.double() - exact).norm() / exact.norm() for m, out in outputs.items()}
    assert outputs["skip"].dtype == outputs["mask"].dtype
    assert error["skip"] < 1.5 * error["mask"]


@pytest.mark.parametrize(
    ("name", "operation"), [("convnext_atto", "permute"), ("ghostnet_050", "getitem")]
)
def test_an_operation_outside_the_algebra(name, operation, caplog):
    _already_logged.clear()
    with caplog.at_level(logging.INFO, logger="sacl_fast"):
        compare(name, 1.0, 0.5, size=64)
    assert any(operation in r.message for r in caplog.records)
    assert len({r.message for r in caplog.records}) == len(caplog.records)


@pytest.mark.parametrize("batch_norm", ["shared", "separate"])
def test_the_method_and_its_loss(batch_norm):
    results = []
    for mode in ("skip", "mask"):
        torch.manual_seed(0)
        config = Config(
            views=CIFAR,
            encoder=EncoderConfig(name="resnet20", width=6 / 16, drop_path=0.3),
            projector=ProjectorConfig(hidden=16, out=24),
            slim=SlimConfig(ratio=0.4, batch_norm=batch_norm),
            loss=LossConfig(),
        )
        method = build_method(config, Passes(mode)).double()
        x_a, x_b = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64)
        loss, _ = SaclXdLoss(config.loss)(*method(x_a, x_b))
        loss.backward()
        results.append(
            {
                "loss": loss.detach(),
                **{f"grad.{n}": p.grad for n, p in method.named_parameters()},
                **{f"buffer.{n}": b.double() for n, b in method.named_buffers()},
            }
        )
    assert_equal(*results)


@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18"])
def test_drop_path(name):
    encoder = encoder_of(name, 0.25, drop_path=0.5)
    twin = copy.deepcopy(encoder)
    x = torch.randn(6, 3, SIZE, SIZE, dtype=torch.float64)
    assert_equal(
        observe(encoder, Slicer(encoder, 0.5), "skip", x),
        observe(twin, Slicer(twin, 0.5), "mask", x),
    )


def test_the_state_does_not_depend_on_the_mode():
    encoder = encoder_of("resnet20")
    slicer = Slicer(encoder, 0.5)
    keys, own = list(encoder.state_dict()), list(encoder.parameters())
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    with slicer.mode("skip"):
        out = encoder(x)
    assert type(out) is torch.Tensor
    assert list(encoder.state_dict()) == keys
    assert all(p is q for p, q in zip(own, encoder.parameters(), strict=True))
    # Masks that are loaded are those that count, in a copy too.
    encoder.eval()
    encoder_2, slicer_2 = copy.deepcopy((encoder, slicer))
    for mask in slicer.masks.values():
        mask.copy_(mask.flip(0))
    slicer_2.load_state_dict(slicer.state_dict())
    with slicer_2.mode("skip"):
        skipped = encoder_2(x)
    with slicer.mode("mask"):
        torch.testing.assert_close(skipped, encoder(x))


def test_masks_made_in_inference_mode_serve_training():
    encoder = encoder_of("mobilenetv1_100", 0.25)
    slicer = Slicer(encoder, 0.45)
    x = torch.randn(2, 3, SIZE + 4, SIZE + 4, dtype=torch.float64)
    with torch.inference_mode(), slicer.mode("skip"):
        encoder(x)
    with slicer.mode("skip"):
        encoder(x).sum().backward()


def test_not_yet_slim_is_dense():
    encoder = encoder_of("resnet20").eval()
    slicer = Slicer(encoder, 0.5)
    slicer.enabled = False
    x = torch.randn(2, 3, SIZE, SIZE, dtype=torch.float64)
    with slicer.mode("skip"):
        assert torch.equal(encoder(x), encoder(x))


class Reuses(nn.Module):
    """Takes a norm's output with and without activation, and changes its input in between."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
        self.norm, self.last = nn.BatchNorm2d(8), nn.BatchNorm2d(4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.first(x)
        normed = self.norm(x)
        active = torch.nn.functional.relu(normed)
        with torch.no_grad():
            x.mul_(3).add_(1)
        # Its statistics count, though nobody takes the result.
        torch.nn.functional.dropout(self.last(self.second(active)), 0.0)
        return torch.cat([active, normed, active * normed], 1)


def test_what_a_norm_leaves_undone_is_done_in_time():
    torch.manual_seed(0)
    model, results = Reuses().double(), []
    x = torch.randn(3, 3, 5, 5, dtype=torch.float64)
    for mode in ("mask", "skip"):
        copied = copy.deepcopy(model)
        with torch.no_grad(), Slicer(copied, 0.5).mode(mode):
            out = copied(x)
        results.append([out, *copied.buffers()])
    for masked, skipped in zip(*results, strict=True):
        torch.testing.assert_close(skipped, masked)
