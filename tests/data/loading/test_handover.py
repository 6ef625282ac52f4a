"""Batches arrive as they were sent, in memory that is theirs."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import pytest
import torch

from sacl_fast.data.loading.handover import receive_batch, receive_task, send_batch, send_task
from sacl_fast.data.loading.waiting import Abandoned, Patience

Ends = tuple[socket.socket, socket.socket]


@pytest.fixture
def ends() -> Iterator[Ends]:
    one, other = socket.socketpair()
    with one, other:
        yield one, other


class Mixed(NamedTuple):
    pixels: torch.Tensor
    index: torch.Tensor
    draws: dict[str, np.ndarray]
    bad: list[tuple[int, str]]


def mixed(count: int) -> Mixed:
    pixels = torch.arange(count * 75, dtype=torch.uint8).view(count, 5, 5, 3)
    return Mixed(pixels, torch.arange(count), {"sigma": np.arange(3.0)}, [(count, "gone")])


def test_what_is_sent_arrives(ends: Ends) -> None:
    for count in (0, 1, 7, 50_000):
        sent = mixed(count)
        send_batch(ends[0], sent)
        found = receive_batch(ends[1])
        assert torch.equal(found.pixels, sent.pixels) and torch.equal(found.index, sent.index)
        assert found.index.dtype == torch.int64
        assert np.array_equal(found.draws["sigma"], sent.draws["sigma"])
        assert found.bad == sent.bad


def test_tensors_that_are_not_contiguous_arrive(ends: Ends) -> None:
    sent = torch.arange(12.0).view(3, 4).T[1:]
    send_batch(ends[0], [sent, sent])
    for found in receive_batch(ends[1]):
        assert torch.equal(found, sent)


def test_a_batch_is_its_owners(ends: Ends) -> None:
    """It may be written to, and outlives the batches after it."""
    kept = []
    for value in range(5):
        send_batch(ends[0], torch.full((1000,), value))
        kept.append(receive_batch(ends[1]).add_(1))
    assert [int(batch[0]) for batch in kept] == [1, 2, 3, 4, 5]


def test_no_file_stays_open(ends: Ends) -> None:
    gc.collect()  # which closes what others left, and not in between
    before = len(os.listdir("/proc/self/fd"))
    for _ in range(20):
        send_batch(ends[0], mixed(9))
        receive_batch(ends[1])
    assert len(os.listdir("/proc/self/fd")) <= before


def test_the_end_of_the_other_is_seen(ends: Ends) -> None:
    ends[0].close()
    with pytest.raises(EOFError):
        receive_batch(ends[1])
    with pytest.raises(EOFError):
        receive_task(ends[1])
    with pytest.raises(ConnectionError):
        send_batch(ends[1], mixed(1))


def test_tasks_arrive_in_order(ends: Ends) -> None:
    tasks = [(3, np.arange(200)), (4, np.arange(0)), (5, np.arange(7))]
    for task in tasks:
        send_task(ends[0], task, Patience())
    for epoch, indices in tasks:
        found = receive_task(ends[1])
        assert found[0] == epoch and np.array_equal(found[1], indices)


def test_a_task_that_nobody_takes_does_not_hold_up_the_end(ends: Ends) -> None:
    patience = Patience()
    patience.over = True
    with pytest.raises(Abandoned):
        send_task(ends[0], np.zeros(10_000_000), patience)
