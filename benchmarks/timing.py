"""What the benchmarks share: timing, memory, the file they write."""

from __future__ import annotations

import argparse
import json
import os
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sacl_fast.engine.ceilings import once_ms, percentiles, time_ms
from sacl_fast.engine.environment import environment
from sacl_fast.engine.trace import kernels_of
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


def peak_bytes(function: Callable[[], Any], device: torch.device) -> int:
    """The most memory a call holds at once beyond what was allocated before it."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        function()
        torch.cuda.synchronize(device)
        return torch.cuda.max_memory_allocated(device) - before
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU]
    with profile(activities=activities, profile_memory=True, acc_events=True) as profiler:
        function()
    held = peak = 0
    assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()  # pyright: ignore[reportAttributeAccessIssue]
            peak = max(peak, held)
    return peak


def kernel_launches(function: Callable[[], Any]) -> list[str]:
    """The names of the kernels that a call launches on the GPU: no copies, no annotations."""
    from torch.profiler import ProfilerActivity, profile

    with profile(activities=[ProfilerActivity.CUDA]) as profiler:
        function()
        torch.cuda.synchronize()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(trace))
        return kernels_of(json.loads(trace.read_text()))


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


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu"


def processor() -> str | None:
    """Its name, where Linux knows it."""
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or None


def write_json(path: Path, result: dict[str, Any]) -> None:
    """The result with the machine, versions and commit it was measured with."""
    path.parent.mkdir(parents=True, exist_ok=True)
    measured_on = {"processor": processor(), "threads": torch.get_num_threads()}
    whole = {**result, **measured_on, "environment": environment()}
    path.write_text(one_row_a_line(whole))


def one_row_a_line(result: dict[str, Any]) -> str:
    """JSON that changes by a line for each row that is measured anew: each field has a line, and so
    have each row of a field that is a list of rows and each entry of one that is a dictionary."""
    return (
        _lines([f"{json.dumps(key)}: {_field(value)}" for key, value in result.items()], 0) + "\n"
    )


def _field(value: Any) -> str:
    compact = partial(json.dumps, default=str)
    if isinstance(value, dict) and value:
        return _lines([f"{json.dumps(key)}: {compact(entry)}" for key, entry in value.items()], 1)
    if isinstance(value, list) and value and all(isinstance(row, dict) for row in value):
        return _lines([compact(row) for row in value], 1, "[]")
    return compact(value)


def _lines(entries: list[str], depth: int, brackets: str = "{}") -> str:
    outer, inner = "  " * depth, "  " * (depth + 1)
    between = f",\n{inner}"
    return f"{brackets[0]}\n{inner}{between.join(entries)}\n{outer}{brackets[1]}"
