"""Which filters the slim encoder keeps, and that a masked one is gone exactly."""

import copy
from typing import Any

import pytest
import torch
from torch import nn

from sacl_fast.encoders import build_encoder
from sacl_fast.errors import UserError
from sacl_fast.slim import Slicer
from sacl_fast.slim.slicer import strongest_filters


@pytest.mark.parametrize(
    ("ratio", "filters", "kept"),
    [(0.5, 8, 4), (0.5, 7, 3), (0.167, 96, 16), (0.01, 10, 1), (1.0, 5, 5)],
)
def test_counts_are_exact(ratio, filters, kept):
    assert strongest_filters(torch.randn(filters, 3, 3, 3), ratio).sum() == kept


def test_largest_l1_norm_wins_and_ties_go_to_the_lower_index():
    weight = torch.zeros(6, 1, 1, 1)
    weight[:, 0, 0, 0] = torch.tensor([1.0, -5.0, 2.0, 2.0, -2.0, 0.5])
    assert strongest_filters(weight, 0.5).tolist() == [False, True, True, True, False, False]
    assert strongest_filters(torch.ones(6, 2, 1, 1), 0.5).tolist() == [True] * 3 + [False] * 3


@pytest.mark.parametrize(
    "name",
    [
        "mobilenetv1_100",
        "mobilenetv3_small_100",
        "resnet18",
        "regnety_002",
        "seresnet18",
        "nf_regnet_b0",
    ],
)
def test_every_convolution_but_squeeze_excite_and_shortcuts(name):
    encoder = build_encoder(name, image_size=64)
    convs = {n for n, m in encoder.named_modules() if isinstance(m, nn.Conv2d)}
    spared = {n for n in convs if ".se." in n or ".attn." in n or "downsample" in n}
    assert set(Slicer(encoder).masks) == convs - spared


def test_vision_transformers_and_stage_transitions():
    assert not Slicer(build_encoder("vit_tiny_patch16_224")).active
    convnext = build_encoder("convnext_atto", image_size=64)
    assert "stages.1.downsample.1" in Slicer(convnext).masks  # not on a residual shortcut


@pytest.mark.parametrize("name", ["resnet20", "mobilenetv3_small_100"])
def test_mask_mode_equals_an_encoder_with_zeroed_weights(name):
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=32).double().train()
    slicer = Slicer(encoder, 0.3)
    zeroed = copy.deepcopy(encoder)
    for conv_name, mask in slicer.masks.items():
        conv = zeroed.get_submodule(conv_name)
        assert isinstance(conv, nn.Conv2d)
        conv.weight.data *= mask.view(-1, 1, 1, 1)
        if conv.bias is not None:
            conv.bias.data *= mask
    x = torch.randn(4, 3, 32, 32, dtype=torch.float64)
    with slicer.mode("mask"):
        out = encoder(x)
    expected = zeroed(x)
    torch.testing.assert_close(out, expected, rtol=0, atol=0)
    out.square().sum().backward()
    expected.square().sum().backward()
    for (key, p), q in zip(encoder.named_parameters(), zeroed.parameters(), strict=True):
        mask = slicer.masks.get(key.rpartition(".")[0])
        expected_grad = q.grad if mask is None else q.grad * mask.view(-1, *[1] * (q.ndim - 1))
        torch.testing.assert_close(p.grad, expected_grad, rtol=0, atol=0, msg=key)
    for (key, b), c in zip(encoder.named_buffers(), zeroed.buffers(), strict=True):
        torch.testing.assert_close(b, c, rtol=0, atol=0, msg=key)


def test_a_masked_filter_outputs_zero_and_leaves_the_encoder_as_it_was():
    encoder = nn.Sequential(nn.Conv2d(3, 8, 3, bias=True))
    nn.init.normal_(encoder.get_parameter("0.bias"))
    slicer = Slicer(encoder, 0.25)
    before = dict(encoder.named_parameters())
    x = torch.randn(2, 3, 5, 5)
    dense = encoder(x)
    with slicer.mode("mask"):
        slim = encoder(x)
    mask = slicer.masks["0"]
    assert (slim[:, ~mask] == 0).all()
    torch.testing.assert_close(slim[:, mask], dense[:, mask])
    assert list(before) == [name for name, _ in encoder.named_parameters()]
    assert all(before[name] is p for name, p in encoder.named_parameters())
    with pytest.raises(ZeroDivisionError), slicer.mode("mask"):
        raise ZeroDivisionError
    assert encoder[0].weight is before["0.weight"]


def test_refresh_follows_the_weights():
    encoder = nn.Sequential(nn.Conv2d(3, 4, 1))
    slicer = Slicer(encoder, 0.5)
    weakest = int((~slicer.masks["0"]).nonzero()[0])
    encoder.get_parameter("0.weight").data[weakest] = 100.0
    assert not slicer.masks["0"][weakest]
    slicer.refresh()
    assert slicer.masks["0"][weakest] and slicer.masks["0"].sum() == 2


def test_state_restores_the_masks():
    encoder = build_encoder("resnet20", image_size=32)
    slicer = Slicer(encoder, 0.5)
    other = Slicer(build_encoder("resnet20", image_size=32), 0.5)
    other.load_state_dict(slicer.state_dict())
    assert all(torch.equal(m, other.masks[n]) for n, m in slicer.masks.items())


def test_separate_batch_norm_keeps_two_sets():
    torch.manual_seed(0)
    encoder = build_encoder("resnet20", image_size=32)
    names = set(encoder.state_dict())
    slicer = Slicer(encoder, 0.5, batch_norm="separate")
    x = torch.randn(8, 3, 32, 32)
    dense_before = encoder.get_buffer("bn1.running_mean").clone()
    with slicer.mode("mask"):
        encoder(x).sum().backward()
    assert torch.equal(encoder.get_buffer("bn1.running_mean"), dense_before)
    slim_norm = slicer.slim_norms["bn1"]
    assert not torch.equal(slim_norm.get_buffer("running_mean"), dense_before)
    assert encoder.get_parameter("bn1.weight").grad is None
    assert slim_norm.get_parameter("weight").grad is not None
    assert set(encoder.state_dict()) == names  # timm's keys
    with slicer.mode("mask"):
        encoder.eval()
        assert not encoder.get_submodule("bn1").training
    encoder.train()
    with slicer.mode("mask"):
        assert encoder.get_submodule("bn1").training


def test_ratio_one_and_warm_up_are_dense():
    encoder = build_encoder("resnet20", image_size=32)
    x = torch.randn(4, 3, 32, 32)
    dense = encoder(x)
    assert not Slicer(encoder, 1.0).active
    slicer = Slicer(encoder, 0.5)
    slicer.enabled = False
    assert not slicer.active
    with slicer.mode("mask"):
        torch.testing.assert_close(encoder(x), dense, rtol=0, atol=0)


@pytest.mark.parametrize("ratio", [0, -0.1, 1.01])
def test_impossible_ratios(ratio):
    with pytest.raises(UserError, match="above 0 and at most 1"):
        Slicer(nn.Sequential(nn.Conv2d(3, 4, 1)), ratio)


def test_unknown_and_nested_modes():
    slicer = Slicer(nn.Sequential(nn.Conv2d(3, 4, 1)))
    unknown: Any = "maks"
    with pytest.raises(UserError, match="mask"), slicer.mode(unknown):
        pass
    with pytest.raises(RuntimeError), slicer.mode("mask"), slicer.mode("dense"):
        pass
    with slicer.mode("dense"):
        pass
