"""The health of embeddings on spectra that are known, and when the alarm sounds."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from sacl_fast.engine.collapse import CollapseAlarm, effective_rank, embedding_std


def with_spectrum(s: list[float], n: int, d: int) -> Tensor:
    """(N, D) float64, centred, with these singular values."""
    g = torch.Generator().manual_seed(0)
    u = torch.randn(n, len(s), generator=g, dtype=torch.float64)
    u = torch.linalg.qr(u - u.mean(0)).Q
    v = torch.linalg.qr(torch.randn(d, len(s), generator=g, dtype=torch.float64)).Q
    return (u * torch.tensor(s, dtype=torch.float64)) @ v.T


def entropy_rank(s: list[float]) -> float:
    p = torch.tensor(s, dtype=torch.float64)
    p = p / p.sum()
    return float((-(p * p.log()).sum()).exp())


@pytest.mark.parametrize("shape", [(64, 256), (256, 64), (64, 64)])
@pytest.mark.parametrize("offset", [0.0, 3.0])
@pytest.mark.parametrize("s", [[1.0] * 10, [5.0, 1.0, 0.2], [2.0], [1 / i for i in range(1, 41)]])
def test_rank_of_a_known_spectrum(shape: tuple[int, int], offset: float, s: list[float]):
    z = with_spectrum(s, *shape) + offset  # the centre does not count
    rank = effective_rank(z)
    assert rank.shape == ()
    assert rank.dtype == torch.float32
    torch.testing.assert_close(rank.item(), entropy_rank(s), rtol=1e-5, atol=0)
    torch.testing.assert_close(effective_rank(z.float()).item(), entropy_rank(s), rtol=1e-3, atol=0)


def test_few_directions_of_many_have_no_noise_floor():
    """Rank 2 in 2048 dimensions: 254 values of float32 noise would add up to a rank above 3."""
    z = with_spectrum([1.0, 1.0], 256, 2048).float()
    torch.testing.assert_close(effective_rank(z).item(), 2.0, rtol=1e-3, atol=0)


def test_white_embeddings_fill_the_space():
    z = torch.randn(4096, 16, generator=torch.Generator().manual_seed(0))
    assert 15.9 < effective_rank(z) <= 16
    assert embedding_std(z) == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("n", [1, 2, 77, 256])
def test_constant_embeddings(dtype: torch.dtype, n: int):
    z = torch.randn(1, 33, generator=torch.Generator().manual_seed(0)).to(dtype).expand(n, 33)
    assert effective_rank(z) == 0
    assert embedding_std(z) == pytest.approx(0, abs=1e-6)
    assert effective_rank(torch.zeros(n, 33, dtype=dtype)) == 0
    assert embedding_std(torch.zeros(n, 33, dtype=dtype)) == 0


def test_constant_up_to_rounding_has_no_rank():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(1, 128, generator=g) * (1 + 1e-8 * torch.randn(256, 128, generator=g).double())
    assert effective_rank(z.float()) == 0


def test_std_ignores_length_and_sees_collapse():
    g = torch.Generator().manual_seed(0)
    z = torch.randn(512, 32, generator=g)
    lengths = 10 ** torch.randn(512, 1, generator=g)
    torch.testing.assert_close(embedding_std(z), embedding_std(z * lengths))
    assert embedding_std(z + 100) < 0.02


def test_std_by_hand():
    """Unit vectors +-(1, 0): std 1 and 0 over the two dimensions, times sqrt(2), mean."""
    z = torch.tensor([[2.0, 0.0], [-3.0, 0.0]])
    assert embedding_std(z) == pytest.approx(2**0.5 / 2)


def test_values_that_are_not_finite_give_nan_and_no_error():
    z = torch.randn(8, 4)
    z[3, 1] = torch.inf
    assert effective_rank(z).isnan()


def test_gradient_is_not_tracked():
    z = torch.randn(8, 4, requires_grad=True)
    assert not effective_rank(z).requires_grad
    assert not embedding_std(z).requires_grad


def sounded(readings: list[tuple[float, float]]) -> list[int]:
    """The indices at which an alarm of (0.02, 2) sounds."""
    alarm = CollapseAlarm(min_std=0.02, min_rank=2.0)
    return [i for i, (std, rank) in enumerate(readings) if alarm.check(std, rank, step=i)]


FINE, LOW_STD, LOW_RANK = (0.9, 50.0), (0.001, 50.0), (0.9, 1.2)


@pytest.mark.parametrize(
    ("readings", "expected"),
    [
        ([FINE] * 5, []),
        ([FINE, LOW_STD, FINE, LOW_STD, FINE], []),
        ([FINE, LOW_STD, LOW_STD, FINE], [2]),
        ([LOW_RANK] * 6, [1]),
        ([LOW_RANK, LOW_STD, LOW_STD], [1]),
        ([LOW_STD, LOW_STD, FINE, LOW_STD, LOW_STD, LOW_STD], [1, 4]),
        ([(0.02, 2.0)] * 3, []),
        ([], []),
    ],
)
def test_alarm(readings: list[tuple[float, float]], expected: list[int]):
    assert sounded(readings) == expected


def test_the_sentence_names_what_is_wrong():
    alarm = CollapseAlarm(min_std=0.02, min_rank=2.0)
    alarm.check(0.001, 1.2, 90)
    sentence = alarm.check(0.0012, 1.31, 100)
    assert sentence is not None
    for part in ("step 100", "0.0012", "0.02", "1.31", "below 2"):
        assert part in sentence
    assert "\n" not in sentence


def test_thresholds_of_0_switch_the_alarm_off():
    alarm = CollapseAlarm(min_std=0.0, min_rank=0.0)
    assert [alarm.check(0.0, 0.0, i) for i in range(3)] == [None] * 3
