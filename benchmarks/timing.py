"""How the benchmarks of operators time them."""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from sacl_fast.engine.ceilings import once_ms, percentiles, time_ms
from sacl_fast.ops import compiled


def operator_options(parser: argparse.ArgumentParser) -> argparse.Namespace:
    """Those of a benchmark of a compiled operator. Ends the program where it cannot run."""
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default="float32")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    on_gpu = options.device.type == "cuda"
    obstacle = compiled.cuda_obstacle(options.device) if on_gpu else compiled.obstacle()
    if obstacle:
        parser.exit(1, f"the compiled operators cannot run: {obstacle}\n")
    return options


def beside_torch(
    calls: dict[str, Callable[[], Any]],
    moved: float,
    bandwidth: float,
    device: torch.device,
    *,
    seconds: float,
) -> dict[str, Any]:
    """Milliseconds of ``ours``, ``torch`` and others; of ours the share of a copy's bandwidth,
    where at least ``moved`` bytes must move, and how many times as fast as PyTorch it is. On a GPU
    calls are replayed as CUDA graphs."""
    graph = device.type == "cuda"
    times = {
        name: time_ms(call, device, seconds=seconds, graph=graph) for name, call in calls.items()
    }
    own = times["ours"]["p50"]
    return {
        **times,
        "bytes": moved,
        "bandwidth_share": moved / own * 1e3 / bandwidth,
        "times_as_fast": times["torch"]["p50"] / own,
    }


def told(name: str, figures: dict[str, Any]) -> str:
    """A few words of what ``beside_torch`` gave."""
    others = (
        f"{other} {times['p50']:6.3f}"
        for other, times in figures.items()
        if isinstance(times, dict) and other != "ours"
    )
    share = figures["bandwidth_share"]
    return f"  {name} {figures['ours']['p50']:6.3f} ms ({share:.0%}), {', '.join(others)}"


def time_in_turns(
    functions: dict[str, Callable[[], Any]], device: torch.device, *, seconds: float
) -> dict[str, dict[str, float]]:
    """``time_ms`` of several, one run of each after another, so that what slows the machine down
    for a while slows all of them."""
    values: dict[str, list[float]] = {name: [] for name in functions}
    for function in functions.values():
        function()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(values.values()))) < 5:
        for name, function in functions.items():
            values[name].append(once_ms(function, device))
    return {name: percentiles(v) for name, v in values.items()}


def cpu_seconds() -> float:
    """What this process, those that descend from it and those of them that ended have worked, in
    user and system mode, on all cores."""
    parents, worked = {}, {}
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended
            fields = stat.read_text().rpartition(")")[2].split()
            process = int(stat.parent.name)
            parents[process], worked[process] = int(fields[1]), sum(map(int, fields[11:15]))

    def descends(process: int) -> bool:
        while process and process != os.getpid():
            process = parents.get(process, 0)
        return bool(process)

    ticks = sum(ticks for process, ticks in worked.items() if descends(process))
    return ticks / os.sysconf("SC_CLK_TCK")
