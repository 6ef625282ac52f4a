"""Recalibrated statistics against ones computed by hand, and that nothing is left behind."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import timm
import torch
from timm.layers import BatchNormAct2d
from torch import Tensor, nn

from sacl_fast.encoders.recalibrate import recalibrated
from sacl_fast.errors import UserError


def small_encoder() -> nn.Sequential:
    """A convolution, a batch norm of its raw output, and both kinds of dropout-like layers."""
    torch.manual_seed(0)
    norm = BatchNormAct2d(6, drop_layer=nn.Dropout)
    return nn.Sequential(
        nn.Conv2d(3, 6, 3, stride=2), norm, nn.Dropout(0.5), nn.Flatten(), nn.Linear(6 * 49, 5)
    ).train()


def batches(count: int = 3, size: int = 16) -> list[Tensor]:
    return list(torch.randn(count, 8, 3, size, size, generator=torch.Generator().manual_seed(1)))


def state_of(encoder: nn.Module) -> dict[str, Any]:
    state: dict[str, Any] = {k: v.clone() for k, v in encoder.state_dict().items()}
    for name, module in encoder.named_modules():
        state[f"{name}!"] = (module.training, getattr(module, "momentum", "none"))
    return state


def assert_same_state(before: dict[str, Any], encoder: nn.Module) -> None:
    after = state_of(encoder)
    assert before.keys() == after.keys()
    for key, value in before.items():
        same = torch.equal(value, after[key]) if isinstance(value, Tensor) else value == after[key]
        assert same, key


def test_statistics_are_the_plain_average_over_the_batches():
    encoder, given = small_encoder(), batches()
    conv, norm = encoder[0], encoder[1]
    assert isinstance(norm, BatchNormAct2d)
    norm.get_buffer("running_mean").fill_(7.0)
    norm.get_buffer("num_batches_tracked").fill_(50)
    outputs = [conv(x).detach().transpose(0, 1).flatten(1) for x in given]  # (C, N * H * W) each
    mean = torch.stack([x.mean(1) for x in outputs]).mean(0)
    var = torch.stack([x.var(1) for x in outputs]).mean(0)
    with recalibrated(encoder, given):
        torch.testing.assert_close(norm.running_mean, mean)
        torch.testing.assert_close(norm.running_var, var)
        assert norm.num_batches_tracked == 3
        assert not any(module.training for module in encoder.modules())
        assert torch.equal(encoder(given[0]), encoder(given[0]))


def test_dropout_stays_off_while_estimating():
    """The second norm would see its noise, in its mean over few values."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(4)
    encoder = nn.Sequential(BatchNormAct2d(3, drop_layer=nn.Dropout), nn.Flatten(), nn.Dropout(0.5))
    encoder.append(nn.Linear(3 * 256, 4)).append(norm).train()
    seen = []
    for _ in range(2):
        with recalibrated(encoder, batches()):
            assert norm.running_mean is not None
            seen.append(norm.running_mean.clone())
    assert torch.equal(*seen)


@pytest.mark.parametrize(
    "name", ["mobilenetv1_100", "mobilenetv3_small_050", "vit_tiny_patch16_224"]
)
def test_a_timm_model_is_put_back_bit_for_bit(name: str):
    size: dict[str, Any] = {"img_size": 32} if name.startswith("vit") else {}
    encoder = timm.create_model(name, num_classes=0, drop_path_rate=0.1, **size).train()
    encoder.get_submodule(next(n for n, _ in encoder.named_modules() if "." in n)).eval()
    with torch.no_grad():
        encoder(batches(size=32)[0])
    before, addresses = state_of(encoder), [b.data_ptr() for b in encoder.buffers()]
    with recalibrated(encoder, batches(size=32)):
        assert not any(module.training for module in encoder.modules())
    assert_same_state(before, encoder)
    assert addresses == [b.data_ptr() for b in encoder.buffers()]  # a CUDA graph knows them


def test_put_back_after_an_exception_inside():
    encoder = small_encoder()
    before = state_of(encoder)
    with pytest.raises(KeyError), recalibrated(encoder, batches()):
        raise KeyError
    assert_same_state(before, encoder)


def test_put_back_after_an_exception_while_estimating():
    encoder = small_encoder()
    before = state_of(encoder)

    def breaking():
        yield batches()[0]
        raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"), recalibrated(encoder, breaking()):
        pytest.fail("not reached")
    assert_same_state(before, encoder)


def test_without_batch_norm_no_batch_is_read():
    encoder = nn.Sequential(nn.Linear(3, 3), nn.Dropout())
    unread = iter(batches())
    with recalibrated(encoder, unread):
        assert not encoder[1].training
    assert encoder[1].training
    assert len(list(unread)) == 3


def chain_of_constants(norms: int, constant: float) -> nn.Sequential:
    """Norms of a channel that is a constant and of one that is not, one after another."""
    first = nn.Conv2d(1, 2, 1)
    with torch.no_grad():
        first.weight.copy_(torch.tensor([0.0, 1.0]).view(2, 1, 1, 1))
        first.bias.copy_(torch.tensor([constant, 0.0]))
    return nn.Sequential(first, *(nn.BatchNorm2d(2) for _ in range(norms)))


@pytest.mark.parametrize("constant", [-0.5461, 0.0, 1234.567])
def test_constant_channels_are_normalised_exactly(constant: float):
    """Where each norm multiplied the rounding of the one before by 316."""
    encoder = chain_of_constants(4, constant)
    given = [torch.randn(7, 1, 9, 9, generator=torch.Generator().manual_seed(i)) for i in range(3)]
    with recalibrated(encoder, given), torch.no_grad():
        features = encoder(given[0])
        first, second = encoder[1], encoder[2]
        mean, var = first.get_buffer("running_mean"), first.get_buffer("running_var")
        assert mean[0].item() == encoder[0].get_parameter("bias")[0].item() and var[0] == 1
        torch.testing.assert_close(mean[1], torch.stack([x.mean() for x in given]).mean())
        torch.testing.assert_close(var[1], torch.stack([x.var() for x in given]).mean())
        assert second.get_buffer("running_mean")[0] == 0
        wide = copy.deepcopy(encoder).double()(given[0].double())
    assert features[:, 0].abs().max() <= 1e-7 * abs(constant)
    torch.testing.assert_close(features.double(), wide, rtol=1e-5, atol=1e-5 + 1e-7 * abs(constant))


def test_a_channel_that_is_constant_in_some_batches_has_plain_averages():
    encoder = nn.Sequential(nn.BatchNorm1d(3))
    given = [torch.randn(8, 3), torch.randn(8, 3)]
    given[0][:, 0] = 5.0  # and another number in each row of the other batch
    given[0][:, 1], given[1][:, 1] = 2.0, 3.0
    given[0][:, 2] = torch.inf
    with recalibrated(encoder, given):
        norm = encoder[0]
        mean, var = norm.get_buffer("running_mean"), norm.get_buffer("running_var")
        torch.testing.assert_close(mean[:2], torch.stack([x.mean(0) for x in given]).mean(0)[:2])
        torch.testing.assert_close(var[:2], torch.stack([x.var(0) for x in given]).mean(0)[:2])
        assert not var[2].isfinite()  # as it would be without us


def test_no_batches_is_an_error_that_says_so():
    encoder = small_encoder()
    before = copy.deepcopy(state_of(encoder))
    with pytest.raises(UserError, match="at least one batch"), recalibrated(encoder, []):
        pytest.fail("not reached")
    assert_same_state(before, encoder)


def test_gradients_are_untouched():
    encoder = small_encoder()
    with recalibrated(encoder, batches()):
        assert torch.is_grad_enabled()
    assert all(p.grad is None for p in encoder.parameters())


def test_one_value_of_a_channel_is_refused():
    encoder = nn.Sequential(nn.Conv2d(3, 6, 16), nn.BatchNorm2d(6), nn.Flatten())
    before = state_of(encoder)
    one = [images[:1] for images in batches()]
    with (
        pytest.raises(UserError, match=r"\(1, 6, 1, 1\) have one value.*at least two images"),
        recalibrated(encoder, one),
    ):
        pass
    assert_same_state(before, encoder)
    larger = nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.Flatten())
    with recalibrated(larger, one):
        assert larger(one[0]).isfinite().all()
