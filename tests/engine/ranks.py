"""Several gloo ranks on the CPU, for tests."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def in_ranks(world_size: int, function: Callable[..., Any], *arguments: Any) -> None:
    """``function(*arguments)`` in each of so many processes, which are one group."""
    mp.spawn(_run, (world_size, free_port(), function, arguments), nprocs=world_size)


def _run(
    rank: int, world_size: int, port: int, function: Callable[..., Any], arguments: tuple[Any, ...]
) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    try:
        function(*arguments)
    finally:
        dist.destroy_process_group()
