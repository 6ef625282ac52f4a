"""What a trace of some steps says: time by region, launches, how busy the device is, what is dear.

A trace is what ``torch.profiler`` exports as JSON, times in microseconds. Regions (``regions.py``)
are ranges of the host's thread that runs the steps. On a GPU, kernels and copies belong to the
region in which that thread, or autograd's, launched them, whenever they ran. On the CPU a region's
time is the host's, and an operator's own time is without that of the operators it calls.
"""

from __future__ import annotations

from bisect import bisect_right
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from sacl_fast.engine.regions import REGIONS

Trace = dict[str, Any]
Span = tuple[float, float]
"""Begin and end."""

_DEAREST = 10
_ON_DEVICE = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True)
class Dear:
    """A kernel, or on the CPU an operator."""

    name: str
    milliseconds: float
    """A step, of the device or of the CPU."""
    calls: float
    """A step."""


@dataclass(frozen=True)
class Figures:
    """Of one step, on average over those in the trace. Times are in milliseconds."""

    steps: int
    step: float
    """From the first region of a step to that of the next, by the host."""
    regions: dict[str, float]
    """Of the device; without a GPU, of the host. Regions that do not occur are left out."""
    rest: float
    """What ran outside of all regions."""
    busy: float
    """Of the step: the device computes or copies; without a GPU, the host is within operators."""
    launches: float
    """Of the host, a CUDA graph being one; without a GPU, operators that Python or autograd
    calls."""
    kernels: float
    """0 without a GPU."""
    dearest: list[Dear]
    on_gpu: bool


def kernels_of(trace: Trace) -> list[str]:
    """The names of the kernels in a trace: no copies, no annotations."""
    return [event["name"] for event in trace["traceEvents"] if event.get("cat") == "kernel"]


def figures_of(trace: Trace, steps: int) -> Figures:
    """What a trace says of ``steps`` steps, of which the first region begins with the first.

    Raises:
        ValueError: it holds no region.
    """
    events = [event for event in trace["traceEvents"] if event.get("ph") == "X"]
    regions = [e for e in events if e.get("cat") == "user_annotation" and e["name"] in REGIONS]
    if not regions:
        raise ValueError("the trace has no region of a step")
    regions.sort(key=lambda e: e["ts"])
    thread = regions[0]["tid"]
    begin = regions[0]["ts"]
    device = [e for e in events if e.get("cat") in _ON_DEVICE]
    operators = [e for e in events if e.get("cat") == "cpu_op" and e["ts"] >= begin]
    end = max(map(_end, (*regions, *device, *operators)))
    if device:
        times, rest = _by_launch(events, device, regions)
        busy = _covered(map(_span, device))
        dear = [(e["name"], e["dur"]) for e in device]
        launches = len({e.get("args", {}).get("correlation") for e in device})
    else:
        own = [e for e in operators if e["tid"] == thread]
        times = dict.fromkeys((e["name"] for e in regions), 0.0)
        for e in regions:
            times[e["name"]] += e["dur"]
        rest = end - begin - sum(times.values())
        busy = _covered(_span(e) for e in own if _is_operator(e))
        dear = list(_own_times(own))
        launches = sum(1 for _ in _outermost(e for e in own if _is_operator(e)))
    each = 1e3 * steps
    return Figures(
        steps=steps,
        step=(end - begin) / each,
        regions={name: times[name] / each for name in REGIONS if name in times},
        rest=rest / each,
        busy=busy / (end - begin),
        launches=launches / steps,
        kernels=len(kernels_of(trace)) / steps,
        dearest=_dearest(dear, steps),
        on_gpu=bool(device),
    )


def _by_launch(
    events: list[Any], device: list[Any], regions: list[Any]
) -> tuple[dict[str, float], float]:
    """The device's time by the region in which it was launched, and that of the rest."""
    # Loaders launch from threads of their own.
    threads = {e["tid"] for e in events if e["name"].startswith("autograd::engine")}
    threads.add(regions[0]["tid"])
    launched = {
        e["args"]["correlation"]: e["ts"]
        for e in events
        if e.get("cat") in ("cuda_runtime", "cuda_driver")
        and e["tid"] in threads
        and "correlation" in e.get("args", {})
    }
    starts = [e["ts"] for e in regions]
    times, rest = dict.fromkeys((e["name"] for e in regions), 0.0), 0.0
    for e in device:
        when = launched.get(e.get("args", {}).get("correlation"))
        place = -1 if when is None else bisect_right(starts, when) - 1
        if when is not None and place >= 0 and when <= _end(regions[place]):
            times[regions[place]["name"]] += e["dur"]
        else:
            rest += e["dur"]
    return times, rest


def _is_operator(event: Any) -> bool:
    """Not one of autograd's nodes, which call operators."""
    name = event["name"]
    return "::" in name and not name.startswith(("autograd::", "torch::autograd"))


def _own_times(events: list[Any]) -> Iterator[tuple[str, float]]:
    """(name, time without that of the operators it calls) of the operators of one thread."""
    open_: list[tuple[Any, list[float]]] = []
    for e in sorted(filter(_is_operator, events), key=lambda e: (e["ts"], -e["dur"])):
        while open_ and _end(open_[-1][0]) <= e["ts"]:
            done, inner = open_.pop()
            yield done["name"], done["dur"] - sum(inner)
        if open_:
            open_[-1][1].append(e["dur"])
        open_.append((e, []))
    for done, inner in open_:
        yield done["name"], done["dur"] - sum(inner)


def _outermost(events: Iterable[Any]) -> Iterator[Any]:
    """Of one thread, those within no other."""
    until = float("-inf")
    for e in sorted(events, key=lambda e: (e["ts"], -e["dur"])):
        if e["ts"] >= until:
            until = _end(e)
            yield e


def _dearest(times: list[tuple[str, float]], steps: int) -> list[Dear]:
    total: defaultdict[str, float] = defaultdict(float)
    for name, time in times:
        total[name] += time
    calls = Counter(name for name, _ in times)
    return [
        Dear(name, total[name] / 1e3 / steps, calls[name] / steps)
        for name in sorted(total, key=total.__getitem__, reverse=True)[:_DEAREST]
    ]


def _span(event: Any) -> Span:
    return event["ts"], _end(event)


def _end(event: Any) -> float:
    return event["ts"] + event["dur"]


def _covered(spans: Iterable[Span]) -> float:
    """How long at least one of them lasts."""
    total, until = 0.0, float("-inf")
    for begin, end in sorted(spans):
        total += max(0.0, end - max(begin, until))
        until = max(until, end)
    return total


# --- for a person ---------------------------------------------------------------------------------


def table(figures: Figures, *, data_wait: float | None = None) -> str:
    """The figures as lines of at most 100 letters.

    Args:
        data_wait: the share of the time in which the device waits for data, where it was measured.
    """
    of_device = figures.on_gpu
    inside = "the device computes or copies" if of_device else "the CPU is within operators"
    lines = [
        f"{'':14}{'ms a step':>10}{'share':>8}   of {'the device' if of_device else 'the CPU'}"
    ]
    rest = "outside these" if of_device else "the rest"
    rows = {**figures.regions, rest: figures.rest}
    for name, ms in rows.items():
        lines.append(f"{name:14}{ms:10.2f}{_share(ms, figures.step)}")
    lines.append(f"{'step':14}{figures.step:10.2f}{figures.busy:8.0%}   {inside}")
    calls = f"of {figures.kernels:,.0f} kernels" if of_device else "operators called"
    lines.append(f"{'launches':14}{figures.launches:10,.0f}           {calls}, a step")
    if "replay" in figures.regions:
        lines.append(
            "(replay: a whole step as one CUDA graph; --engine.cuda-graph off shows its parts)"
        )
    if data_wait is not None:
        whose = "the device's" if of_device else "the host's"
        lines.append(f"{'waiting':14}{'':10}{data_wait:8.1%}   for data, by {whose} clock")
    lines += ["", f"{'dearest':58}{'calls':>7}{'ms a step':>12}{'share':>8}"]
    for dear in figures.dearest:
        name = dear.name if len(dear.name) <= 56 else f"{dear.name[:40]}...{dear.name[-13:]}"
        share = _share(dear.milliseconds, figures.step)
        lines.append(f"{name:58}{dear.calls:7,.0f}{dear.milliseconds:12.2f}{share}")
    return "\n".join(lines)


def _share(part: float, whole: float) -> str:
    return f"{part / whole:8.0%}"
