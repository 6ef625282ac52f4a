"""What the figures of ``doctor --measure`` mean: a screen for a person.

Each limit is what a step needs of something, divided by the rate that was measured of it: less time
the step cannot take. What bounds a step is the limit that comes nearest to its time.
"""

from __future__ import annotations

from collections.abc import Iterator
from textwrap import wrap
from typing import NamedTuple

from sacl_fast.checks import counted
from sacl_fast.config import Config
from sacl_fast.data.loading.workers import worker_count
from sacl_fast.engine.measure import Measured, measure

_BINDS = 0.5
"""Share of a step's time from which on a limit is said to bound it."""
_WAITS = 0.1  # share of the time waited for data, likewise
_BUSY = 0.5  # processes a core, from which on other work counts
_WORTH = 0.95  # of a step's time: a plan that takes no more is worth naming


class Limit(NamedTuple):
    """Something that a step needs."""

    name: str
    need: str
    rate: str
    milliseconds: float


def print_verdict(config: Config) -> None:
    """Measure a configuration's step and print what bounds it."""
    print("measuring for half a minute ...", flush=True)
    print("\n".join(screen(measure(config))))


def screen(m: Measured) -> Iterator[str]:
    """Lines of at most 100 letters, about 40 of them."""
    config = m.config
    yield ""
    yield (
        f"{config.preset}: {config.encoder.name} x {config.encoder.width:g}, {config.views.size} "
        f"px, batch {config.batch_size}, {m.dtype}, {m.device}, plan {m.plan}"
    )
    if config.batch_size < m.asked:
        yield (
            f"(one of {m.asked}, as asked for, takes too long to measure, or too much memory: "
            f"some {m.step_as_asked:,.0f} ms)"
        )
    yield ""
    yield from _phases(m)
    yield ""
    yield f"{'limit':12}{'a step needs':>22}{'measured here':>40}{'ms':>10}{'share':>8}"
    for name, need, rate, ms in limits(m):
        yield f"{name:12}{need:>22}{rate:>40}{ms:10.1f}{ms / m.step:8.0%}"
    yield ""
    data = m.data
    yield (
        f"images/s: {_figure(_rate(m))} by the step alone, {_figure(data.alone)} by the loader "
        f"alone, {_figure(data.training)} together"
    )
    yield from wrap(f"loader: {data.loader}, {data.images}", width=100)
    if m.plans:
        tried = ", ".join(f"{plan} {ms:.1f}" for plan, ms in m.plans.items())
        yield f"ms by other plans: {tried}"
    yield ""
    yield from wrap(" ".join(verdict(m)), width=100)
    if doubt := _doubt(m):
        yield from wrap(doubt, width=100)


def _phases(m: Measured) -> Iterator[str]:
    figures = m.figures
    of = "the device's time" if figures.on_gpu else "the CPU's time"
    yield f"{'phase':14}{'ms':>10}{'share':>8}   of {of}, while a profiler looks"
    for name, ms in {**figures.regions, "the rest": figures.rest}.items():
        yield f"{name:14}{ms:10.2f}{ms / figures.step:8.0%}"
    inside = "of the device" if figures.on_gpu else "within operators"
    yield f"{'step':14}{m.step:10.2f}{figures.busy:8.0%}   {inside}; the step without profiler"


def other_work(load: float) -> str:
    """That a machine of such a load was busy; "" of one that was not."""
    cores = worker_count(-1)
    if load <= _BUSY * cores:
        return ""
    return (
        f"Other work ran beside it (a load of {load:.1f} on {counted(cores, 'core')} before): "
        "measure again when the machine is quiet."
    )


def _doubt(m: Measured) -> str:
    """Why the figures may be wrong."""
    if busy := other_work(m.load):
        return busy
    if m.few > m.step:
        return (
            f"A step on {m.few_images} images took longer than one on {m.config.batch_size}, so the"
            " machine was not steady: measure again."
        )
    return ""


def _figure(rate: float) -> str:
    return f"{rate:,.0f}" if rate >= 10 else f"{rate:.2f}"


def _rate(m: Measured) -> float:
    return 1e3 * m.config.batch_size / m.step


def limits(m: Measured) -> list[Limit]:
    """The least time of a step by each of them, in milliseconds."""
    batch, rates = m.config.batch_size, m.rates
    return [
        Limit(
            "bytes",
            f"{m.bytes / 1e9:,.2f} GB",
            f"{rates.copy / 1e9:,.1f} GB/s in a large copy",
            1e3 * m.bytes / rates.copy,
        ),
        Limit(
            "products",
            f"{m.flops / 1e9:,.1f} GFLOP",
            f"{rates.product / 1e9:,.0f} GFLOP/s in a large product",
            1e3 * m.flops / rates.product,
        ),
        Limit(
            "launches",
            f"{m.launches:,}" + (" in 1 graph" if m.captured else ""),
            f"{1e6 * rates.launch:.1f} us for the least operator",
            1e3 * rates.launch * (1 if m.captured else m.launches),
        ),
        Limit("fixed", "what needs no images", f"a step on {m.few_images} images", m.few),
        Limit(
            "data",
            f"{batch:,} images",
            f"{m.data.alone:,.0f} images/s by the loader",
            1e3 * batch / m.data.alone,
        ),
    ]


def verdict(m: Measured) -> Iterator[str]:
    """What bounds the step, and what to change: sentences with the figures they rest on."""
    of = {limit.name: limit.milliseconds / m.step for limit in limits(m)}
    if m.data.wait >= _WAITS:
        yield f"Data bounds training: {m.data.wait:.0%} of the time the step waits for a batch."
        yield _data_remedy(m)
        return
    of["fixed"] = m.few / m.step_as_asked
    name = max(("bytes", "products", "fixed"), key=of.__getitem__)
    if of[name] < _BINDS:
        dear = m.figures.dearest[0]
        share = dear.milliseconds / m.figures.step
        yield (
            f"No limit explains the step: bytes are {of['bytes']:.0%} of it, products "
            f"{of['products']:.0%}, what needs no images {of['fixed']:.0%}. The dearest is "
            f"{dear.name[:40]} ({share:.0%}, {dear.calls:,.0f} calls)."
        )
    elif name == "fixed":
        yield (
            f"What needs no images bounds the step, {of['fixed']:.0%} of it: Python, "
            f"{m.launches:,} launches, weights and their update."
        )
    elif name == "bytes":
        yield f"Memory bounds the step: its bytes alone take {of['bytes']:.0%} of it."
    else:
        yield f"Arithmetic bounds the step: its products alone take {of['products']:.0%} of it."
    yield _remedy(m, name if of[name] >= _BINDS else "")


def _remedy(m: Measured, bound: str) -> str:
    fastest = min(((ms, plan) for plan, ms in m.plans.items()), default=(m.step, m.plan))
    if fastest[0] <= _WORTH * m.step:
        return f"--engine.plan {fastest[1]} took {fastest[0]:.1f} ms in place of {m.step:.1f}."
    others = f"No other plan was faster ({len(m.plans)} tried)" if m.plans else "No plan was tried"
    if bound == "fixed":
        return f"{others}: a larger --batch-size shares those {m.few:.1f} ms among more images."
    if bound == "bytes" and m.dtype == "float32" and m.figures.on_gpu:
        return f"{others}: --precision bf16 halves most of the {m.bytes / 1e9:,.1f} GB."
    return f"{others}: what is left is fewer pixels (--views.size) or fewer filters (--slim.ratio)."


def _data_remedy(m: Measured) -> str:
    data = m.data
    start = (
        f"The loader makes {data.alone:,.0f} images/s alone and the step takes {_rate(m):,.0f}: "
    )
    now = f"now {data.workers}" if data.workers >= 0 else "now -1, as many as the cores suit"
    more = f"more --{data.setting} ({now})"
    return start + (f"{more}, or a faster loader: {data.faster}." if data.faster else f"{more}.")
