"""What a benchmark writes and counts: memory, launches, and the file of its figures."""

from __future__ import annotations

import json
import os
import platform
import tempfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch

from sacl_fast.engine.environment import environment
from sacl_fast.engine.trace import kernels_of
from sacl_fast.files import write_whole_files


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

    os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else it says that there is no GPU
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
    write_whole_files({path: one_row_a_line(whole).encode()})


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
