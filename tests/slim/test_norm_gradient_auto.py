"""What ``slim.norm_gradient auto`` takes, by the architecture."""

import math

import pytest
import torch

from sacl_fast.config import (
    Config,
    EncoderConfig,
    LossConfig,
    ProjectorConfig,
    SlimConfig,
    ViewsConfig,
)
from sacl_fast.engine.method import build_method, build_networks
from sacl_fast.losses import SaclXdLoss
from sacl_fast.optim import build_optimizer
from sacl_fast.passes import Passes
from sacl_fast.slim import Slicer
from sacl_fast.slim.constant_channels import constant_norms_in_a_row
from tests.slim.reparameterised import Reparameterised


def configured(name: str, **slim) -> Config:
    return Config(
        views=ViewsConfig(size=32),
        encoder=EncoderConfig(name=name),
        projector=ProjectorConfig(hidden=32, out=32),
        slim=SlimConfig(**slim),
    )


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("resnet20", "exact"),
        ("mobilenetv3_small_050", "exact"),
        ("vit_tiny_patch16_224", "exact"),
        ("repvit_m0_9", "damped"),
        ("fastvit_t8", "damped"),
        ("ghostnet_050", "damped"),
    ],
)
def test_auto_goes_by_the_architecture(name, expected):
    assert build_networks(configured(name)).slicer.norm_gradient == expected


def test_auto_changes_no_ordinary_encoder_and_no_random_number():
    states = []
    for choice in ("auto", "exact"):
        torch.manual_seed(0)
        method = build_method(configured("mobilenetv3_small_050", norm_gradient=choice), Passes())
        x_a, x_b = torch.randn(2, 4, 3, 32, 32)
        loss, _ = SaclXdLoss(LossConfig())(*method(x_a, x_b))
        loss.backward()
        states.append({**method.state_dict(), **{n: p.grad for n, p in method.named_parameters()}})
    for name, value in states[0].items():
        other = states[1][name]
        assert value is other is None or torch.equal(value, other), name
    networks = build_networks(configured("repvit_m0_9", norm_gradient="exact"))
    assert networks.slicer.norm_gradient == "exact"


def test_norms_in_a_row_are_counted():
    torch.manual_seed(0)
    for blocks in (1, 2, 3):
        slicer = Slicer(Reparameterised(16, blocks), 0.5)
        # A block's outer norm and the one of its larger filters.
        before = torch.get_rng_state()
        with torch.no_grad():
            assert constant_norms_in_a_row(slicer, 32) == pytest.approx(2 * blocks, abs=0.1)
        assert torch.equal(before, torch.get_rng_state())
    assert constant_norms_in_a_row(Slicer(Reparameterised(), 1.0), 32) == 0
    separate = Slicer(Reparameterised(16, 2), 0.5, batch_norm="separate")
    assert constant_norms_in_a_row(separate, 32) == pytest.approx(4, abs=0.1)


class Choosy(Reparameterised):
    """Runs at one size, and not in float64."""

    def __init__(self, side: int, dtype: torch.dtype | None = None) -> None:
        super().__init__(16, 2)
        self.side, self.dtype = side, dtype

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if x.shape[2] != self.side or self.dtype not in (None, x.dtype):
            raise RuntimeError("not like this")
        return super().forward(x)


def test_encoders_that_do_not_run_as_they_are_asked_to(caplog):
    torch.manual_seed(0)
    assert constant_norms_in_a_row(Slicer(Choosy(80)), 80) == pytest.approx(4, abs=0.1)
    assert constant_norms_in_a_row(Slicer(Choosy(80, torch.float32)), 80) == 0
    assert "float64 (not like this); slim.norm_gradient damped" in caplog.text


def test_repvit_survives_the_stock_recipe():
    """LARS at rate 0.3 leaves one-dimensional parameters unscaled."""
    torch.manual_seed(0)
    config = configured("repvit_m0_9", norm_gradient="damped")
    method = build_method(config, Passes())
    optimizer = build_optimizer(method.parameters(), config.optim)
    for group in optimizer.param_groups:
        group["lr"] = 0.3
    criterion = SaclXdLoss(config.loss)
    for _ in range(3):
        x_a, x_b = torch.randn(2, 8, 3, 32, 32)
        loss, _ = criterion(*method(x_a, x_b))
        assert math.isfinite(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert all(p.isfinite().all() for p in method.parameters())
