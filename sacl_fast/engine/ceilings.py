"""Times of single calls, and what a device can do at best: copy, multiply, launch.

Bytes a second of a large copy, FLOP a second of a large product of random matrices (zeros would be
faster than real data), seconds of the host for the smallest operator. What a step needs, divided by
these, is the time that it cannot fall below.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from functools import cache, partial
from statistics import quantiles
from typing import Any

import torch


def machine_load() -> float:
    """Processes that ran or waited for a core, on average over the last minute."""
    return os.getloadavg()[0] if hasattr(os, "getloadavg") else 0.0


def copy_bandwidth(device: torch.device, *, seconds: float = 1.0) -> float:
    """Bytes read and written a second by copying 256 MiB."""
    source = torch.empty(2**28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    copy = partial(target.copy_, source)
    return 2 * source.numel() / time_ms(copy, device, seconds=seconds)["p20"] * 1e3


def product_rate(device: torch.device, dtype: torch.dtype, *, seconds: float = 1.0) -> float:
    """FLOP a second of one large product of random matrices."""
    size = 8192 if device.type == "cuda" else 1024
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = partial(torch.matmul, a, b)
    return 2 * size**3 / time_ms(product, device, seconds=seconds)["p20"] * 1e3


@torch.no_grad()
def launch_cost(device: torch.device) -> float:
    """Seconds of the host for one call of an operator on a tensor of one value."""
    x = torch.zeros(1, device=device)
    calls, times = 200, []  # fewer than a GPU's queue holds
    for _ in range(20):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for _ in range(calls):
            x.add_(1)
        times.append((time.perf_counter() - start) / calls)
    return percentiles(times)["p50"]


def time_ms(
    function: Callable[[], Any], device: torch.device, *, seconds: float = 1.0, graph: bool = False
) -> dict[str, float]:
    """Milliseconds of a call at the 20th, 50th and 80th percentile of at least 5 runs, after
    warming up. On a GPU by events, each run with a cold L2 cache; ``graph``: replayed as a CUDA
    graph, without the launch costs of the CPU."""
    function()
    if device.type == "cuda":
        if graph:
            function = captured(function)
        for _ in range(3):
            function()
    return percentiles(_repeat(lambda: once_ms(function, device), seconds))


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    tenths = quantiles(values, n=10, method="inclusive")
    return {"p20": tenths[1], "p50": tenths[4], "p80": tenths[7]}


def captured(function: Callable[[], Any]) -> Callable[[], None]:
    """``function`` as a CUDA graph."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            function()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        function()
    return graph.replay


def _repeat(once: Callable[[], float], seconds: float) -> list[float]:
    values: list[float] = []
    stop = time.perf_counter() + seconds
    while len(values) < 5 or time.perf_counter() < stop:
        values.append(once())
        if len(values) >= 3 and sum(values) > 30_000:  # half a minute says enough
            break
    return values


def once_ms(function: Callable[[], Any], device: torch.device) -> float:
    """Milliseconds of one call."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return 1e3 * (time.perf_counter() - start)
    _flush().zero_()
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    function()
    stop.record()
    stop.synchronize()
    return start.elapsed_time(stop)


@cache
def _flush() -> torch.Tensor:
    """As large as no L2 cache is."""
    return torch.empty(256 * 2**20, dtype=torch.int8, device="cuda")
