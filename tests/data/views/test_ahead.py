"""Batches made in the background, on the CPU and on a GPU."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from itertools import count

import pytest
import torch
from torch import Tensor

from sacl_fast.data.views.ahead import Ahead

CPU, GPU = torch.device("cpu"), torch.device("cuda")


def numbers(device: torch.device, made: list[int]) -> Callable[[], Tensor]:
    turn = count()

    def make() -> Tensor:
        made.append(next(turn))
        return torch.full((4,), made[-1], device=device)

    return make


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 30
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


@pytest.mark.parametrize("ahead", [1, 3])
def test_so_many_are_made_before_they_are_taken_and_no_more(ahead: int) -> None:
    made: list[int] = []
    before = set(threading.enumerate())
    batches = Ahead(numbers(CPU, made), ahead=ahead, device=CPU)
    for taken in range(4):
        until(lambda taken=taken: len(made) == ahead + taken)
        assert batches.take()[0] == taken
    batches.close()
    assert len(made) <= 4 + ahead
    assert set(threading.enumerate()) <= before


def test_what_fails_is_raised_where_it_is_taken() -> None:
    turn = count()

    def make() -> Tensor:
        if next(turn) == 1:
            raise ValueError("no more")
        return torch.zeros(1)

    batches = Ahead(make, ahead=2, device=CPU)
    batches.take()
    with pytest.raises(ValueError, match="no more"):
        batches.take()
    batches.close()


@pytest.mark.gpu
def test_a_stream_of_its_own_is_ordered_before_the_step_and_after_it() -> None:
    """A slow maker and a slow step: every batch is whole when it is read, and stays so."""
    turn, size = count(), 1 << 20

    def make() -> Tensor:
        assert torch.cuda.current_stream() != torch.cuda.default_stream()
        batch = torch.empty(size, device=GPU)
        torch.cuda._sleep(20_000_000)
        return batch.fill_(next(turn))

    batches = Ahead(make, ahead=2, device=torch.device("cuda", 0))
    sums = []
    for i in range(12):
        batch = batches.take()
        if i % 2:
            torch.cuda._sleep(40_000_000)
        sums.append(batch.double().sum())
        del batch  # its memory is free for the next ones while the step is not done
    batches.close()
    assert torch.stack(sums).tolist() == [i * size for i in range(12)]


@pytest.mark.gpu
def test_the_host_does_not_run_far_ahead_of_the_gpu() -> None:
    made: list[int] = []
    batches = Ahead(numbers(GPU, made), ahead=2, device=torch.device("cuda", 0))
    batches.take()
    torch.cuda._sleep(2_000_000_000)  # a step of a second
    batches.take()
    until(lambda: len(made) == 3)
    time.sleep(0.1)
    assert len(made) == 3  # the fourth waits for that step
    torch.cuda.synchronize()
    until(lambda: len(made) == 4)
    batches.close()


@pytest.mark.gpu
def test_nothing_waits_for_the_gpu_where_batches_are_taken() -> None:
    batches = Ahead(numbers(GPU, []), ahead=2, device=torch.device("cuda", 0))
    for _ in range(3):
        batches.take()
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(6):
            batches.take().mul_(2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    batches.close()
