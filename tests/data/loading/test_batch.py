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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("layout", [torch.channels_last, torch.contiguous_format], ids=str)
def test_one_pass_is_the_same_up_to_a_rounding(
    dtype: torch.dtype, layout: torch.memory_format
) -> None:
    """All values of all channels, on the CPU; the streams are for the test on a GPU."""
    views = ViewsConfig()
    pixels = torch.arange(256, dtype=torch.uint8).view(1, 16, 16, 1).expand(2, 16, 16, 3)
    normalise = Normalise(views, CPU, layout == torch.channels_last, dtype)
    found = normalise.in_one_pass(pixels.contiguous().permute(0, 3, 1, 2))
    assert found.dtype == dtype and found.is_contiguous(memory_format=layout)
    mean, std = (torch.tensor(v).double().view(1, 3, 1, 1) for v in (views.mean, views.std))
    exact = (pixels.permute(0, 3, 1, 2) / 255.0 - mean) / std
    unit = torch.finfo(dtype).eps
    torch.testing.assert_close(found.double(), exact, rtol=unit, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_batches_follow_one_another_on_a_gpu(dtype: torch.dtype) -> None:
    """Each is read late by the step's stream, while the next ones are copied."""
    device, views = torch.device("cuda", torch.cuda.current_device()), ViewsConfig()
    normalise = Normalise(views, device, True, dtype)
    batches = [torch.full((4, 32, 32, 3), 50 * i, dtype=torch.uint8) for i in range(5)]
    sums = []
    for pixels in batches:
        images = normalise(pixels.pin_memory())
        assert images.dtype == dtype
        torch.cuda._sleep(10**7)
        sums.append(images.float())
        del images
    for found, pixels in zip(sums, batches, strict=True):
        expected = Normalise(views, CPU, True)(pixels)
        torch.testing.assert_close(found.cpu(), expected, rtol=2e-2, atol=2e-2)


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
