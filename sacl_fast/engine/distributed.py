"""Processes and devices: ``torchrun`` starts W ranks, everything else is one rank of one."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sacl_fast.errors import SaidByAnother, UserError

T = TypeVar("T")


@dataclass(frozen=True)
class Ranks:
    """This process's place among the others, and its device."""

    rank: int
    world_size: int
    device: torch.device

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def any(self, flag: bool) -> bool:
        """Whether the flag is set on any rank. All ranks must ask."""
        if self.world_size == 1:
            return flag
        count = torch.tensor(float(flag), device=self.device)
        dist.all_reduce(count)
        return bool(count.item() > 0)

    def from_first(self, value: Any) -> Any:
        """Rank 0's value, on every rank."""
        if self.world_size == 1:
            return value
        box = [value]
        dist.broadcast_object_list(box, src=0)
        return box[0]

    def on_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on rank 0, on every rank.

        Raises:
            UserError: on every rank, where it fails there; one of them says so.
        """
        value, failed = None, None
        if self.first:
            try:
                value = function()
            except UserError as error:
                failed = error
        value, sentence = self.from_first((value, failed and str(failed)))
        _fail_together(failed, sentence)
        return value

    def together(self, function: Callable[[], T]) -> T:
        """What ``function`` returns, on each rank its own.

        Raises:
            UserError: on every rank, where it fails on any; one of them says so.
        """
        value, failed = None, None
        try:
            value = function()
        except UserError as error:
            failed = error
        sentences = self.gather(failed and str(failed))
        told = next((rank for rank, sentence in enumerate(sentences) if sentence), None)
        if told is not None:
            _fail_together(failed if told == self.rank else None, sentences[told])
        return value  # type: ignore[return-value]

    def gather(self, value: Any) -> list[Any]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every rank is here."""
        if self.world_size > 1:
            dist.barrier()


def _fail_together(error: UserError | None, sentence: str | None) -> None:
    if error is not None:
        raise error
    if sentence is not None:
        raise SaidByAnother(sentence)


def pick_device(requested: str) -> torch.device:
    """``auto``, ``cpu`` or ``cuda`` (this rank's GPU) as a device."""
    has_gpu = torch.cuda.is_available()
    if requested == "cuda" and not has_gpu:
        raise UserError("device 'cuda' was asked for, but torch sees no GPU; --device cpu works")
    if requested == "cpu" or not has_gpu:
        return torch.device("cpu")
    index = int(os.environ.get("LOCAL_RANK", "0"))
    if index >= torch.cuda.device_count():
        raise UserError(
            f"local rank {index} has no GPU: this machine has {torch.cuda.device_count()}; start "
            "as many processes per node as there are GPUs"
        )
    return torch.device("cuda", index)


@contextmanager
def process_group(requested_device: str) -> Iterator[Ranks]:
    """Join the process group that ``torchrun`` describes in the environment, if any."""
    device = pick_device(requested_device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    world_size = int(os.environ.get("WORLD_SIZE", "1"))
    if world_size == 1 or dist.is_initialized():
        rank = dist.get_rank() if dist.is_initialized() else 0
        yield Ranks(rank, dist.get_world_size() if dist.is_initialized() else 1, device)
        return
    # Rank 0 evaluates while the others wait, so the patience is in hours.
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timedelta(hours=2))
    try:
        yield Ranks(dist.get_rank(), world_size, device)
    finally:
        dist.destroy_process_group()
