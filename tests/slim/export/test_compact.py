"""The exported module equals the slim encoder in eval mode, is smaller, and stands alone."""

import copy
import io
import itertools
import subprocess
import sys
from typing import Any

import pytest
import safetensors.torch
import timm
import torch
import torch.nn.functional as F
from timm.layers import ScaledStdConv2d
from torch import nn

from sacl_fast.config import Config, EncoderConfig, ViewsConfig
from sacl_fast.encoders import build_encoder, load_encoder
from sacl_fast.encoders.file import encoder_metadata, save_encoder
from sacl_fast.encoders.recalibrate import recalibrated
from sacl_fast.errors import UserError
from sacl_fast.slim import Slicer
from sacl_fast.slim.export import compact, compact_zeroed, cost, load_compact
from tests.slim.test_skip import ENCODERS, encoder_of


def slim_output(encoder, slicer, x, mode="mask"):
    with torch.no_grad(), slicer.mode(mode):
        return encoder(x)


def compacted(encoder, slicer, sizes=(33, 64)):
    """The compact module, after comparing it at several image sizes and batch sizes."""
    module = compact(encoder, slicer.masks, statistics="encoder")
    assert not module.training
    for n, size in enumerate(sizes, start=1):
        x = torch.randn(n, 3, size, size, dtype=torch.float64)
        before = x.clone()
        expected = slim_output(encoder, slicer, x)
        with torch.no_grad():
            torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)
        assert torch.equal(x, before)
    return module


@pytest.mark.parametrize(("name", "width", "ratio"), ENCODERS)
def test_equal_and_smaller(name, width, ratio):
    encoder = encoder_of(name, width).eval()
    state = copy.deepcopy(encoder.state_dict())
    module = compacted(encoder, Slicer(encoder, ratio))
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())
    ours, theirs = cost(module, 64), cost(encoder, 64)
    if ratio == 1:
        assert ours == theirs
    else:
        assert ours.parameters < theirs.parameters and ours.flops < theirs.flops
        assert not {type(m).__module__ for m in module.modules()} & {
            "sacl_fast.slim.export.compact"
        }


@pytest.mark.parametrize(
    ("name", "smaller"),
    [
        ("convnext_atto", True),
        ("ghostnet_050", True),
        ("densenet121", True),
        ("seresnet18", True),
        ("skresnet18", True),
        ("nf_regnet_b0", False),  # standardised weights
        ("mobilevit_xxs", True),
    ],
)
def test_other_structures_stay_right(name, smaller):
    encoder = encoder_of(name).eval()
    module = compacted(encoder, Slicer(encoder, 0.5), sizes=(64,))
    assert (cost(module, 64).flops < cost(encoder, 64).flops) == smaller


def test_in_place_gates_padded_averages_and_per_sample_constants():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU())
            self.gate = nn.Conv2d(8, 8, 1)
            self.body = nn.Conv2d(8, 8, 3, padding=1)
            self.deep = nn.Conv2d(8, 16, 3, stride=2, padding=1, groups=8)
            self.pool = nn.AvgPool2d(3, 1, 1)
            self.last = nn.Conv2d(16, 8, 1)
            self.scale = nn.Parameter(torch.randn(8, 1, 1))

        def forward(self, x):
            x = self.stem(x)
            same = x
            x += 1
            x = x * self.gate(same.mean((2, 3), keepdim=True)).sigmoid()
            x = x * self.gate(x.mean((2, 3), keepdim=True)).sigmoid() * self.scale
            x = self.body(x) + 2 * x
            x.clamp_(-1, 1)
            return self.last(self.pool(self.deep(x))).relu().amax((2, 3))

    torch.manual_seed(0)
    encoder = Odd().double().eval()
    nn.init.normal_(encoder.get_parameter("stem.1.bias"))
    compacted(encoder, Slicer(encoder, 0.4, exclude=(r"gate",)))


@pytest.mark.parametrize("shares", [*itertools.product((0.5, 1, 0.2, 0), repeat=2)])
def test_any_filters_may_be_kept(shares):
    """All, some or none of each second convolution: whole depthwise ones read constants, too."""
    torch.manual_seed(0)
    convolutions = (
        nn.Conv2d(3, 6, 3, 2, 1),
        nn.Conv2d(6, 12, 3, 1, 1, groups=6, bias=False),
        nn.Conv2d(12, 8, 3, 1, 1, groups=2),
        nn.Conv2d(8, 8, 3, 1, 1, groups=8),
        nn.Conv2d(8, 4, 5, 1, 2),
    )
    norms, masks = [nn.BatchNorm2d(c.out_channels) for c in convolutions], {}
    encoder = nn.Sequential(*itertools.chain(*zip(convolutions, norms, strict=True)))
    with torch.no_grad():
        for number, (conv, norm) in enumerate(zip(convolutions, norms, strict=True)):
            nn.init.normal_(norm.bias)
            masks[str(2 * number)] = torch.rand(conv.out_channels) < shares[number % 2]
        x, encoder = torch.randn(2, 3, 16, 16).double(), encoder.double().eval()
        module = compact(encoder, masks, statistics="encoder")
        for name, mask in masks.items():
            for p in encoder.get_submodule(name).parameters():
                p.mul_(mask.view(-1, *[1] * (p.ndim - 1)))
        torch.testing.assert_close(module(x), encoder(x), rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(compact_zeroed(encoder)(x), encoder(x), rtol=1e-9, atol=1e-9)


class Branching(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)

    def forward(self, x):
        x = self.conv(x)
        return x if x.sum() > 0 else -x


class Large(nn.Sequential):
    """Takes images of at least 400 px."""

    def __init__(self):
        super().__init__(nn.AvgPool2d(40), nn.Conv2d(3, 8, 10), nn.Flatten())


def warnings(caplog):
    return [record for record in caplog.records if record.levelname == "WARNING"]


OBSTACLES = {
    "code": (Branching, "its code cannot be followed: symbolically traced"),
    "size": (Large, "it takes no image tried"),
    "kind": (
        lambda: nn.Sequential(ScaledStdConv2d(3, 8, 3), nn.ReLU()),
        "its slim convolutions are of kind ScaledStdConv2d; Conv2d and Conv2dSame can be cut",
    ),
    "padding": (
        lambda: nn.Sequential(nn.Conv2d(3, 8, 3, padding_mode="circular", padding=1)),
        "its slim convolutions are grouped or padded with other than zeros",
    ),
}


@pytest.mark.parametrize("obstacle", OBSTACLES)
def test_what_stays_at_full_size_says_why(obstacle, caplog):
    build, reason = OBSTACLES[obstacle]
    torch.manual_seed(0)
    encoder = build().double().eval()
    slicer = Slicer(encoder, 0.5)
    module = compacted(encoder, slicer, sizes=(400,) if obstacle == "size" else (33, 64))
    (warning,) = warnings(caplog)
    assert warning.getMessage().startswith(f"the slim encoder keeps its full size, since {reason}")
    full, ours = ([p.numel() for p in m.parameters()] for m in (encoder, module))
    assert sum(ours) == sum(full)
    with pytest.raises(UserError) as raised:
        compact(encoder, slicer.masks, statistics="encoder", strict=True)
    assert str(raised.value).startswith(f"the slim encoder cannot be made smaller, since {reason}")


def test_where_nothing_stays_nothing_is_said(caplog, capfd):
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()).double().eval()
    for ratio in (0.5, 1.0):
        compact(encoder, Slicer(encoder, ratio).masks, statistics="encoder", strict=True)
    moved = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3)).double().eval()
    compact(moved, Slicer(moved, 0.5).masks, statistics="encoder", strict=True)
    assert not warnings(caplog) and not capfd.readouterr().err
    wrong: Any = "yes"
    with pytest.raises(UserError, match="strict"):
        compact(encoder, Slicer(encoder, 0.5).masks, statistics="encoder", strict=wrong)


def test_a_file_whose_encoder_stays_at_full_size(tmp_path, caplog):
    path = saved_slim_encoder(tmp_path, "nf_regnet_b0")
    load_compact(path)
    assert "keeps its full size, since its slim convolutions" in caplog.text
    with pytest.raises(UserError, match="cannot be made smaller, since its slim convolutions"):
        load_compact(path, strict=True)


def saved_slim_encoder(folder, name):
    encoder = build_encoder(name, image_size=64)
    config = Config(encoder=EncoderConfig(name=name), views=ViewsConfig(size=64))
    slicer = Slicer(encoder, 0.5)
    slicer.recalibrate([torch.randn(2, 3, 64, 64)])
    metadata = encoder_metadata(config, epochs=1, steps=2, images=3, knn={}, slim=True)
    save_encoder(folder / "encoder_slim.safetensors", slicer.slim_state(), metadata)
    return folder / "encoder_slim.safetensors"


FUNCTIONS = {
    "abs": torch.abs,
    "exp": lambda x: x.exp(),
    "square": torch.square,
    "clip": lambda x: x.clip(-0.5, 0.5),
    "softsign": torch.nn.functional.softsign,
    "pow": lambda x: x**2,
    "subtract": lambda x: torch.subtract(x, 0.5),
    "reversed": lambda x: 2.0 / (x.exp() + 1),
    "maximum": lambda x: torch.maximum(x, x * 0.5),
    "in place": lambda x: (x + 0).mul_(2).sub_(1),
    "module": nn.Softshrink(0.1),
}


class Between(nn.Sequential):
    """A function between two convolutions."""

    def __init__(self, function):
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 4, 3, padding=1))
        self.function = function

    def forward(self, x):
        return self[2](self.function(self[1](self[0](x))))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_what_has_a_rule_keeps_constants_constant(name):
    """One list of operations is for training and export."""
    torch.manual_seed(0)
    encoder = Between(FUNCTIONS[name]).double().eval()
    nn.init.normal_(encoder.get_parameter("1.bias"))
    module = compacted(encoder, Slicer(encoder, 0.5))
    convolutions = [m for m in module.modules() if isinstance(m, nn.Conv2d)]
    assert {m.in_channels for m in convolutions} == {3, 4, 1}  # 1: of the border


def test_separate_batch_norm():
    encoder = encoder_of("resnet20").eval()
    slicer = Slicer(encoder, 0.5, batch_norm="separate").double()
    for norm in slicer.slim_norms.values():
        nn.init.normal_(norm.get_parameter("bias"))
    x = torch.randn(2, 3, 32, 32, dtype=torch.float64)
    with slicer.mode("mask"):
        expected = encoder(x)
    module = compact(encoder, slicer.masks, slicer.norms)
    torch.testing.assert_close(module(x), expected)


def test_it_loads_where_sacl_fast_is_not_installed(tmp_path):
    encoder = encoder_of("mobilenetv3_small_100", 0.5).eval()
    module = compact(encoder, Slicer(encoder, 0.5).masks, statistics="encoder")
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    torch.save((module, x, module(x)), tmp_path / "module.pt")
    code = f"""
import sys, torch
sys.modules["sacl_fast"] = None
module, x, expected = torch.load({str(tmp_path / "module.pt")!r}, weights_only=False)
torch.testing.assert_close(module(x), expected)
"""
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, timeout=120)
    state = io.BytesIO()
    torch.save(module.state_dict(), state)
    twin = copy.deepcopy(module)
    state.seek(0)
    twin.load_state_dict(torch.load(state))


def test_stating_the_cost_changes_nothing():
    encoder = encoder_of("mobilenetv2_100", 0.5).train()
    before = copy.deepcopy(encoder.state_dict())
    cost(encoder, 32)
    assert encoder.training
    assert all(torch.equal(before[name], value) for name, value in encoder.state_dict().items())


def images(n=3):
    return [torch.randn(8, 3, 33, 33, dtype=torch.float64) for _ in range(n)]


def test_statistics_are_the_slim_encoder_s_own():
    torch.manual_seed(0)
    encoder = encoder_of("mobilenetv2_100", 0.25).train()
    slicer, batches = Slicer(encoder, 0.5), images()
    before = copy.deepcopy(encoder.state_dict())
    with pytest.raises(UserError, match="batch-norm statistics are not known"):
        compact(encoder, slicer.masks)
    slicer.recalibrate(batches)
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    x = batches[0][:2]
    with torch.no_grad(), slicer.mode("mask"), recalibrated(encoder, batches):
        expected = encoder(x)
        inside = compact(encoder, slicer.masks, statistics="encoder")
    with slicer.mode("mask"), recalibrated(encoder, batches):  # with gradient, too
        also_inside = compact(encoder, slicer.masks, statistics="encoder")
    again = Slicer(copy.deepcopy(encoder), 0.5)
    again.load_state_dict(slicer.state_dict())
    modules = (compact(encoder, slicer.masks), compact(again.encoder, again.masks))
    with torch.no_grad():
        for module in (*modules, inside, also_inside):
            assert cost(module, 33).parameters < cost(encoder, 33).parameters
            torch.testing.assert_close(module(x), expected, rtol=1e-9, atol=1e-9)
    slicer.refresh()
    with pytest.raises(UserError, match="batch-norm statistics are not known"):
        compact(encoder, slicer.masks)


def test_a_checkpoint_from_before_statistics_were_kept_is_read():
    slicer = Slicer(encoder_of("resnet20"), 0.5)
    state = slicer.state_dict()
    del state["_extra_state"]
    slicer.load_state_dict(state)
    assert slicer.statistics is None


@pytest.mark.parametrize("batch_norm", ["shared", "separate"])
def test_a_slim_encoder_from_its_file(tmp_path, batch_norm):
    torch.manual_seed(0)
    encoder = build_encoder("mobilenetv3_small_050", image_size=64)
    config = EncoderConfig(name="mobilenetv3_small_050")
    slicer = Slicer(encoder, 0.5, batch_norm=batch_norm)
    for norm in slicer.slim_norms.values():
        nn.init.uniform_(norm.get_parameter("weight"))
    slicer.recalibrate([torch.randn(8, 3, 64, 64) for _ in range(3)])
    metadata = encoder_metadata(
        Config(encoder=config, views=ViewsConfig(size=64)),
        epochs=1,
        steps=2,
        images=3,
        knn={},
        slim=True,
    )
    path = tmp_path / "encoder_slim.safetensors"
    save_encoder(path, slicer.slim_state(), metadata)
    small, full = load_compact(path), load_encoder(path)
    assert cost(small, 64).parameters < 0.8 * cost(encoder, 64).parameters
    x = torch.randn(2, 3, 64, 64)
    ours = compact(encoder, slicer.masks, slicer.norms)
    plain = timm.create_model("mobilenetv3_small_050", num_classes=0).eval()
    plain.load_state_dict(safetensors.torch.load_file(path))
    with torch.no_grad():
        for other in (full(x), ours(x), plain(x)):
            torch.testing.assert_close(small(x), other, rtol=1e-4, atol=1e-4)


class ReadsTwice(nn.Module):
    """Changes an activation in place, and reads it again under its old name."""

    def __init__(self, change) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8)
        self.change = change

    def forward(self, x):
        y = self.norm(self.conv(x))
        return (self.change(y) + y).mean((2, 3))


@pytest.mark.parametrize(
    "change",
    [
        lambda y: F.relu(y, True),
        lambda y: F.relu(y, inplace=True),
        lambda y: F.leaky_relu(y, 0.3, True),
        lambda y: F.hardtanh(y, 0.0, 1.0, True),
        lambda y: F.leaky_relu(y, 0.3),
    ],
)
def test_what_is_changed_in_place_is_so_under_every_name(change):
    encoder = ReadsTwice(change).double().eval()
    nn.init.normal_(encoder.norm.bias)
    compacted(encoder, Slicer(encoder, 0.5))


def test_a_norm_without_constant_channels():
    """RepViT's gates and sums make all channels live before a norm."""
    torch.manual_seed(0)
    encoder = build_encoder("repvit_m0_9", image_size=32).double().eval()
    slicer = Slicer(encoder)
    slicer.recalibrate([torch.rand(4, 3, 32, 32, dtype=torch.float64)])
    encoder.load_state_dict(slicer.slim_state())
    x = torch.rand(2, 3, 32, 32, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(compact_zeroed(encoder)(x), encoder(x), rtol=1e-6, atol=1e-6)
