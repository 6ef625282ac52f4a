"""What the benchmarks share: timing, memory, the file they write."""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, partial
from pathlib import Path
from statistics import quantiles
from typing import Any

import torch

from sacl_fast.engine.environment import environment
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


def copy_bandwidth(device: torch.device) -> float:
    """Bytes read and written a second by copying 256 MiB."""
    source = torch.empty(2**28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    return 2 * source.numel() / time_ms(lambda: target.copy_(source), device)["p20"] * 1e3


def product_rate(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP a second of one large product of random matrices."""
    size = 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    return 2 * size**3 / time_ms(lambda: a @ b, device)["p20"] * 1e3


def percentiles(values: list[float]) -> dict[str, float]:
    if len(values) < 2:
        return dict.fromkeys(("p20", "p50", "p80"), values[0])
    tenths = quantiles(values, n=10, method="inclusive")
    return {"p20": tenths[1], "p50": tenths[4], "p80": tenths[7]}


def time_ms(
    function: Callable[[], Any], device: torch.device, *, seconds: float = 1.0, graph: bool = False
) -> dict[str, float]:
    """Milliseconds of a call at the 20th, 50th and 80th percentile of at least 5 runs, after
    warming up. On a GPU by events, each run with a cold L2 cache; ``graph``: replayed as a CUDA
    graph, without the launch costs of the CPU."""
    function()
    if device.type != "cuda":
        return percentiles(_repeat(lambda: _wall_ms(function), seconds))
    if graph:
        function = captured(function)
    for _ in range(3):
        function()
    return percentiles(_repeat(lambda: _timed_on_gpu(function), seconds))


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


def _timed_on_gpu(function: Callable[[], Any]) -> float:
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


def time_in_turns(
    functions: dict[str, Callable[[], Any]], device: torch.device, *, seconds: float
) -> dict[str, dict[str, float]]:
    """``time_ms`` of several, one run of each after another, so that what slows the machine down
    for a while slows all of them."""
    values: dict[str, list[float]] = {name: [] for name in functions}
    once = _timed_on_gpu if device.type == "cuda" else _wall_ms
    for function in functions.values():
        function()
    stop = time.perf_counter() + seconds
    while time.perf_counter() < stop or len(next(iter(values.values()))) < 5:
        for name, function in functions.items():
            values[name].append(once(function))
    return {name: percentiles(v) for name, v in values.items()}


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


def _wall_ms(function: Callable[[], Any]) -> float:
    start = time.perf_counter()
    function()
    return 1e3 * (time.perf_counter() - start)


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


def kernels_of(trace: dict[str, Any]) -> list[str]:
    """The names of the kernels in a trace as the profiler exports it."""
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") == "kernel"]


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
