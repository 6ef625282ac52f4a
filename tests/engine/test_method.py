"""The four passes against a transcription with ``functional_call``: order, widths, views."""

import copy

import pytest
import torch
from torch.func import functional_call

from sacl_fast.config import Config, EncoderConfig, LossConfig, ProjectorConfig, SlimConfig
from sacl_fast.data.views.tables import CIFAR
from sacl_fast.engine.method import build_method
from sacl_fast.passes import Passes


def config(**changes) -> Config:
    defaults = dict(
        views=CIFAR,
        encoder=EncoderConfig(name="resnet20"),
        projector=ProjectorConfig(hidden=16, out=24),
    )
    return Config(**{**defaults, **changes})


def test_passes_are_those_of_the_paper_in_the_stated_order():
    torch.manual_seed(0)
    method = build_method(config(slim=SlimConfig(ratio=0.4)), Passes()).double()
    twin = copy.deepcopy(method)
    x_a, x_b = torch.randn(2, 6, 3, 32, 32, dtype=torch.float64)
    slim_weights = {
        f"{name}.weight": twin.encoder.get_parameter(f"{name}.weight") * mask.view(-1, 1, 1, 1)
        for name, mask in twin.slicer.masks.items()
    }

    def slim(x):
        return twin.projector(functional_call(twin.encoder, slim_weights, (x,)))

    def dense(x):
        return twin.projector(twin.encoder(x))

    expected = dense(x_a), slim(x_b), dense(x_b).detach(), slim(x_a).detach()
    got = method(x_a, x_b)
    for name, ours, theirs in zip(got._fields, got, expected, strict=False):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, msg=name)
    assert [z.requires_grad for z in got[:4]] == [True, True, False, False]
    # The running statistics have seen the four passes in this order.
    for ours, theirs in zip(method.buffers(), twin.buffers(), strict=True):
        assert torch.equal(ours, theirs)


def test_without_distillation_there_are_two_passes():
    method = build_method(config(loss=LossConfig(distillation="none")), Passes())
    z1, z2, z1_t, z2_t, _ = method(*torch.randn(2, 4, 3, 32, 32))
    assert z1.requires_grad and z2.requires_grad and z1_t is None and z2_t is None
    assert method.encoder.get_buffer("bn1.num_batches_tracked") == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_all_weights_learn_under_autocast(dtype):
    """Autocast caches weights; cached by a pass without gradient, they would not learn."""
    method = build_method(config(), Passes())
    with torch.autocast("cpu", dtype):
        z1, z2, *_ = method(*torch.randn(2, 4, 3, 32, 32))
    (z1.float().square().mean() + z2.float().square().mean()).backward()
    assert all(p.grad is not None for p in method.parameters())


def test_state_dict_is_stable():
    """Names that checkpoints rely on: timm's under ``encoder.``, masks under ``slicer.``."""
    method = build_method(config(slim=SlimConfig(batch_norm="separate")), Passes())
    names = list(method.state_dict())
    assert "encoder.layer1.0.conv1.weight" in names
    assert "slicer.layer1/0/conv1" in names
    assert "slicer.slim_norms.layer1/0/bn1.weight" in names
    assert "projector.0.weight" in names
