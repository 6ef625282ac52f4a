"""The exported module equals the slim encoder in eval mode, is smaller, and stands alone."""

import copy
import io
import subprocess
import sys

import pytest
import safetensors.torch
import timm
import torch
from torch import nn

from sacl_fast.config import Config, EncoderConfig, ViewsConfig
from sacl_fast.encoders import build_encoder, load_encoder
from sacl_fast.encoders.file import encoder_metadata, save_encoder
from sacl_fast.encoders.recalibrate import recalibrated
from sacl_fast.errors import UserError
from sacl_fast.slim import Slicer
from sacl_fast.slim.export import compact, cost, load_compact
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
    nn.init.normal_(encoder.stem[1].bias)
    compacted(encoder, Slicer(encoder, 0.4, exclude=(r"gate",)))


def test_code_that_cannot_be_followed_stays_dense():
    class Branching(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 3)

        def forward(self, x):
            x = self.conv(x)
            return x if x.sum() > 0 else -x

    encoder = Branching().double().eval()
    compacted(encoder, Slicer(encoder, 0.5))


def test_separate_batch_norm():
    encoder = encoder_of("resnet20").eval()
    slicer = Slicer(encoder, 0.5, batch_norm="separate").double()
    for norm in slicer.slim_norms.values():
        nn.init.normal_(norm.bias)
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
        nn.init.uniform_(norm.weight)
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
