"""The exported module equals the slim encoder in eval mode, is smaller, and stands alone."""

import copy
import io
import subprocess
import sys

import pytest
import torch
from test_skip import ENCODERS, encoder_of
from torch import nn

from sacl_fast.slim import Slicer
from sacl_fast.slim.compact import compact, cost


def slim_output(encoder, slicer, x, mode="mask"):
    with torch.no_grad(), slicer.mode(mode):
        return encoder(x)


def compacted(encoder, slicer, sizes=(33, 64)):
    """The compact module, after comparing it at several image sizes and batch sizes."""
    module = compact(encoder, slicer.masks)
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
        assert not {type(m).__module__ for m in module.modules()} & {"sacl_fast.slim.compact"}


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
    module = compact(encoder, Slicer(encoder, 0.5).masks)
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
