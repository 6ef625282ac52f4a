"""What is computed again in backward: to the bit what it was, and statistics are left alone."""

from __future__ import annotations

from typing import Any

import pytest
import timm
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from sacl_fast.encoders import build_encoder
from sacl_fast.errors import UserError
from sacl_fast.slim import Slicer
from sacl_fast.slim.checkpointing import blocks_of
from sacl_fast.slim.slicer import Mode

SIZE = 32
ENCODERS = {
    "mobilenetv1_100": {"width": 0.25},
    "efficientnet_b0": {"width": 0.25, "drop_path": 0.3},
    "resnet18": {},
    "resnet20": {"width": 0.5, "drop_path": 0.3},
    "vit_tiny_patch16_224": {"drop_path": 0.3},
}
MODES: tuple[Mode, ...] = ("dense", "mask", "skip", "whole")


def built(name: str, **options: Any) -> tuple[nn.Module, Slicer]:
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=SIZE, **ENCODERS[name]).double().train()
    for module in encoder.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            nn.init.normal_(module.bias)
    return encoder, Slicer(encoder, 0.5, **options)


def step(encoder: nn.Module, slicer: Slicer, mode: Mode) -> tuple[dict[str, Tensor | None], int]:
    """Output, gradients and buffers of a pass, and the bytes that it kept for backward."""
    torch.manual_seed(1)
    x, kept = torch.randn(4, 3, SIZE, SIZE, dtype=torch.float64), dict[int, int]()
    weights = {p.untyped_storage().data_ptr() for p in encoder.parameters()}

    def note(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor), slicer.mode(mode):
        out = encoder(x)
    out.square().mean().backward()
    found: dict[str, Tensor | None] = {"out": out.detach()}
    for module in (encoder, slicer):
        found |= {f"grad.{name}": p.grad for name, p in module.named_parameters()}
        found |= {f"buffer.{name}": b for name, b in module.named_buffers()}
    return found, sum(kept.values())


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, value in expected.items():
        own = found[name]
        if own is None or value is None:
            assert own is value, name
        else:
            assert torch.equal(own, value), name


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ENCODERS)
def test_the_same_to_the_bit_and_less_kept(name, mode):
    expected, plain = step(*built(name), mode)
    encoder, slicer = built(name)
    slicer.checkpointing = True
    found, kept = step(encoder, slicer, mode)
    assert_same(found, expected)
    assert kept < 0.55 * plain
    assert not any("forward" in vars(module) for module in encoder.modules())


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("options", [{"batch_norm": "separate"}, {"norm_gradient": "damped"}])
def test_norms_of_their_own_and_damped_ones(options, mode):
    name = "mobilenetv1_100"
    encoder, slicer = built(name, **options)
    slicer.checkpointing = True
    assert_same(step(encoder, slicer, mode)[0], step(*built(name, **options), mode)[0])


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", ["efficientnet_b0", "resnet18", "vit_tiny_patch16_224"])
def test_timm_s_own_way_is_taken_over(name, mode):
    """It would compute again with all filters, and update running statistics a second time."""
    encoder, slicer = built(name)
    encoder.set_grad_checkpointing(True)  # type: ignore[operator]
    assert_same(step(encoder, slicer, mode)[0], step(*built(name), mode)[0])
    assert encoder.grad_checkpointing is True


class Own(nn.Module):
    """An encoder that checkpoints by itself."""

    slicer: Slicer | None = None

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv = nn.Conv2d(6, 8, 3, padding=1)

    def body(self, x: Tensor) -> Tensor:
        return self.conv(self.norm(x).relu()).relu()

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        if self.slicer is None:
            return self.body(x).mean((2, 3))
        context_fn = self.slicer.contexts
        kept = checkpoint(self.body, x, use_reentrant=False, context_fn=context_fn)
        assert isinstance(kept, Tensor)
        return kept.mean((2, 3))


@pytest.mark.parametrize("within", [False, True])
def test_what_an_encoder_checkpoints_itself(within):
    results = []
    for own in (False, True):
        torch.manual_seed(0)
        encoder = Own().double()
        slicer = Slicer(encoder, 0.5, exclude=())
        x = torch.randn(4, 3, 6, 6, dtype=torch.float64)
        vars(encoder)["slicer"] = slicer if own else None
        with slicer.mode("mask"):
            out = encoder(x).square().sum()
            if within:
                out.backward(retain_graph=True)
        out.backward()
        state = {n: p.grad for n, p in encoder.named_parameters()} | dict(encoder.named_buffers())
        results.append(state)
    assert_same(*results)


def test_passes_without_gradient_are_left_alone():
    encoder, slicer = built("resnet18")
    slicer.checkpointing = True
    with torch.no_grad(), slicer.mode("mask"):
        assert not any("forward" in vars(module) for module in encoder.modules())


@pytest.mark.parametrize(
    ("name", "count"),
    [
        ("mobilenetv3_small_100", 12),
        ("resnet50", 16),
        ("convnext_atto", 12),
        ("densenet121", 9),
        ("mobileone_s0", 42),
    ],
)
def test_blocks(name, count):
    with torch.device("meta"):
        assert len(blocks_of(timm.create_model(name))) == count


def test_an_encoder_without_lists_of_blocks():
    encoder = nn.Module()
    encoder.add_module("stem", nn.Conv2d(3, 4, 3))
    encoder.add_module("first", Own())
    encoder.add_module("second", Own())
    assert blocks_of(encoder) == [encoder.first, encoder.second]
    with pytest.raises(UserError, match="Own has no blocks"):
        blocks_of(Own())
