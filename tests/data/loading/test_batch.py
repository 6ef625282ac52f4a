"""Which images are in a batch, and how pixels become what an encoder takes."""

from __future__ import annotations

from itertools import islice

import pytest
import torch

from sacl_fast.config import ViewsConfig
from sacl_fast.data.loading.batch import Normalise, Plan
from sacl_fast.data.views.draw import epoch_order
from sacl_fast.errors import UserError
from tests.data.loading.cases import CPU, config_of


def test_normalise() -> None:
    views = ViewsConfig()
    pixels = torch.arange(2 * 5 * 5 * 3, dtype=torch.uint8).view(2, 5, 5, 3)
    mean, std = (torch.tensor(v).view(1, 3, 1, 1) for v in (views.mean, views.std))
    expected = (pixels.permute(0, 3, 1, 2) / 255 - mean) / std
    for channels_last, layout in ((True, torch.channels_last), (False, torch.contiguous_format)):
        found = Normalise(views, CPU, channels_last)(pixels)
        torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)
        assert found.is_contiguous(memory_format=layout)


def tasks(start: int, count: int, **ranks: int) -> list[tuple[int, list[int]]]:
    plan = Plan(config_of(), 37, **ranks)
    return [(epoch, found.tolist()) for epoch, found in islice(plan.tasks(start), count)]


def test_a_plan_goes_through_epochs_in_the_order_that_is_drawn() -> None:
    assert Plan(config_of(), 37).steps_per_epoch == 4
    orders = [epoch_order(config_of().seed, epoch, 37).tolist() for epoch in (0, 1)]
    expected = [(e, orders[e][8 * step :][:8]) for e in (0, 1) for step in range(4)]
    assert tasks(0, 8) == expected
    assert tasks(5, 3) == expected[5:]


def test_ranks_share_the_plan_of_one_process() -> None:
    shares = [tasks(3, 2, rank=rank, world_size=2) for rank in (0, 1)]
    joined = [(epoch, a + b) for (epoch, a), (_, b) in zip(*shares, strict=True)]
    assert joined == tasks(3, 2)


@pytest.mark.parametrize(
    ("batch_size", "world_size", "said"),
    [
        (8, 3, ["8 over 3", "multiple of 3", "such as 6"]),
        (4, 4, ["4 over 4", "2 or more images each", "batch_size 8"]),
        (64, 1, ["64", "only 37 training images", "at most 37"]),
    ],
)
def test_batch_sizes_that_cannot_be(batch_size: int, world_size: int, said: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        Plan(config_of(batch_size=batch_size), 37, world_size=world_size)
    assert all(words in str(caught.value) for words in said)
