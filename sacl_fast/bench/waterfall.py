"""A step of this engine against the supplement's pseudocode, in one process.

One variant after another makes steps from the same weights on the same random views, which lie on
the device before the clock starts:

==========  =====================================================================================
pseudocode  the supplement's, in eager PyTorch (``pseudocode.py``)
plain       ours by plain PyTorch: the loss without D x D matrices, LARS in multi-tensor calls
kernels     the same with our kernels
trial       the same, and cuDNN chooses algorithms by trial (on a GPU, unless deterministic)
skip        the same, and slim passes skip
dense       the same, and dense passes are recorded on our operators
fused       the same, and batch norms are fused into the convolutions around them
graph       the same, and a step is one CUDA graph (on a GPU)
run         what a run with the given settings does: its plan, its slim mode
compiled    the pseudocode by torch.compile
==========  =====================================================================================

On the CPU each step of a variant is timed next to one of the first, and the ratio is the
median of theirs, so that what slows the machine down for a while slows both.

One image is one sample of the batch, that is two views and (with distillation) four passes.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sacl_fast.bench.figures import device_name, kernel_launches, peak_bytes, write_json
from sacl_fast.bench.pseudocode import pseudocode_step
from sacl_fast.config import Backend, Config
from sacl_fast.config.choices import BenchVariant, Plan, SlimMode, Switch
from sacl_fast.engine.ceilings import percentiles
from sacl_fast.engine.convolutions import are_tried
from sacl_fast.engine.distributed import Ranks, pick_device
from sacl_fast.engine.memory import keep_freed_memory
from sacl_fast.engine.method import build_method, build_networks
from sacl_fast.engine.plan import take_plan
from sacl_fast.engine.profiling import synchronize
from sacl_fast.engine.step import TrainingStep
from sacl_fast.engine.traffic import Traffic
from sacl_fast.passes import choose_passes, plan_obstacle

Run = Callable[[Tensor, Tensor, int], Any]
Make = Callable[[], tuple[Run, Tensor, Tensor]]

WARM_UP = 6  # steps until passes are recorded and the step is captured


def prepared(config: Config, *, chosen: bool = False) -> tuple[TrainingStep, Tensor, Tensor]:
    """A step of ours, and two batches of views on its device. ``chosen``: by the plan that a run
    takes, which on a GPU is found by trial."""
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    torch.manual_seed(config.seed)
    networks = build_networks(config)
    encoder = networks.encoder if chosen else None
    passes = choose_passes(config, device, steps_per_epoch=100, encoder=encoder)
    method = build_method(config, passes, networks)
    step = TrainingStep(method, config, Ranks(0, 1, device), steps_per_epoch=100)
    if chosen:
        take_plan(config, step, None)
    shape = (2, config.batch_size, 3, config.views.size, config.views.size)
    view_a, view_b = torch.randn(shape, device=device)
    if config.channels_last:
        view_a, view_b = (v.contiguous(memory_format=torch.channels_last) for v in (view_a, view_b))
    return step, view_a, view_b


def described(config: Config, step: TrainingStep) -> dict[str, Any]:
    """What a file of results says of what was measured."""
    return {
        "benchmark": "bench_step",
        "preset": config.preset,
        "encoder": config.encoder.name,
        "width": config.encoder.width,
        "image_size": config.views.size,
        "batch_size": config.batch_size,
        "embedding": config.projector.out,
        "slim_ratio": config.slim.ratio,
        "precision": str(step.amp_dtype or torch.float32),
        "device": device_name(step.device),
    }


def variants(config: Config) -> dict[BenchVariant, Make]:
    """Of those that run here: name -> what makes that step and its views, in the order in which
    features are added."""
    device = pick_device(config.device)
    tried = are_tried(device)

    def baseline(*, compiled: bool) -> tuple[Run, Tensor, Tensor]:
        torch.backends.cudnn.benchmark = compiled and tried
        step, view_a, view_b = prepared(replace(config, backend="torch"))
        run = pseudocode_step(step.method, config, step.amp_dtype, compiled=compiled)
        return run, view_a, view_b

    def ours(
        backend: Backend,
        mode: SlimMode,
        *,
        trial: bool = tried,
        plan: Plan = "eager",
        graph: Switch = "off",
    ) -> Any:
        torch.backends.cudnn.benchmark = trial
        slim = replace(config.slim, mode=mode)
        engine = replace(config.engine, plan=plan, cuda_graph=graph)
        return prepared(replace(config, backend=backend, slim=slim, engine=engine))

    def run() -> Any:
        torch.backends.cudnn.benchmark = tried
        return prepared(config, chosen=True)

    found: dict[BenchVariant, Make] = {
        "pseudocode": lambda: baseline(compiled=False),
        "plain": lambda: ours("torch", "mask", trial=False),
        "kernels": lambda: ours("auto", "mask", trial=False),
        "trial": lambda: ours("auto", "mask"),
        "skip": lambda: ours("auto", "skip"),
        "dense": lambda: ours("auto", "skip", plan="dense+skip"),
        "fused": lambda: ours("auto", "skip", plan="fused"),
        "graph": lambda: ours("auto", "skip", plan="fused", graph="on"),
        "run": run,
        "compiled": lambda: baseline(compiled=True),  # last, since compiling takes minutes
    }
    left_out = set[BenchVariant]()
    if not tried:
        left_out |= {"trial"}
    if device.type != "cuda":
        left_out |= {"graph"}
    if plan_obstacle("fused", replace(config, backend="auto"), device):
        left_out |= {"fused", "graph"}
    if config.backend == "torch":
        left_out |= set(found) - {"pseudocode", "plain", "run", "compiled"}
    return {name: make for name, make in found.items() if name not in left_out}


def waterfall(
    config: Config, chosen: dict[BenchVariant, Make], *, steps: int, warmup: int, json: Path | None
) -> dict[str, Any]:
    """Milliseconds, images/s, launches and peak memory of each variant; ``json`` is written after
    each, so that what was measured stays. One that fails says why and ends no other."""
    result: dict[str, Any] = {}
    rows: list[dict[str, Any]] = []
    first: Callable[[], object] | None = None
    for name, make in chosen.items():
        row: dict[str, Any] = {"name": name}
        try:
            run, view_a, view_b = make()
            if not result:
                result = {**described(config, prepared(config)[0]), "steps": steps, "rows": rows}
            row |= timed_steps(run, view_a, view_b, config.batch_size, steps, warmup, first)
            if view_a.device.type == "cpu" and first is None:
                first = partial(run, view_a, view_b, 0)
            if isinstance(run, TrainingStep):
                row |= {"plan": run.method.passes.plan, "slim_mode": run.method.passes.mode}
        except (RuntimeError, torch.OutOfMemoryError, ImportError) as error:
            row["error"] = f"{type(error).__name__}: {error}".split("\n")[0]
        rows.append(row)
        print_row(row, rows[0], on_gpu=pick_device(config.device).type == "cuda")
        if json:
            write_json(json, result or {"benchmark": "bench_step", "rows": rows})
        run = view_a = view_b = None
        torch.compiler.reset()
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return result


def timed_steps(
    run: Run,
    view_a: Tensor,
    view_b: Tensor,
    batch: int,
    steps: int,
    warmup: int,
    first: Callable[[], object] | None = None,
) -> dict[str, Any]:
    """``first``: a step of the first variant, to be timed next to each of these."""
    device = view_a.device
    for i in range(max(warmup, WARM_UP)):
        run(view_a, view_b, i)
    synchronize(device)
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    times, ratios = [], []
    for i in range(steps):
        beside = wall_ms(first, device) if first else 0.0
        times.append(wall_ms(lambda: run(view_a, view_b, i), device))  # noqa: B023
        ratios.append(beside / times[-1])
    ms = percentiles(times)
    row = {"step_ms": ms, "images_per_second": batch / ms["p50"] * 1e3}
    if first:
        row["of_first"] = percentiles(ratios)
    once = partial(run, view_a, view_b, steps)
    row["launches"] = launches(once, device)
    row["peak_memory_bytes"] = peak_memory(device) or peak_bytes(once, device)
    return row


def wall_ms(function: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    function()
    synchronize(device)
    return 1e3 * (time.perf_counter() - start)


def launches(function: Callable[[], Any], device: torch.device) -> int | None:
    """How many kernels a call launches; on the CPU how many operators, views aside."""
    if device.type == "cuda":
        return len(kernel_launches(function))
    with Traffic() as traffic:
        function()
    return traffic.launches


def peak_memory(device: torch.device) -> int | None:
    """Bytes that were allocated at once; None where PyTorch does not count them."""
    return torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None


def print_row(row: dict[str, Any], first: dict[str, Any], *, on_gpu: bool) -> None:
    if "error" in row:
        print(f"  {row['name']:12} failed: {row['error'][:100]}", flush=True)
        return
    ms = row["step_ms"]
    line = f"  {row['name']:12} {ms['p50']:9.2f} ms ({ms['p20']:.2f} .. {ms['p80']:.2f})"
    line += f"  {row['images_per_second']:10,.1f} images/s"
    if "of_first" in row:
        line += f"  {row['of_first']['p50']:.2f}x"
    elif row is not first and "step_ms" in first:
        line += f"  {first['step_ms']['p50'] / ms['p50']:.2f}x"
    line += f"  {row['launches']:,} {'launches' if on_gpu else 'operators'}"
    line += f", {row['peak_memory_bytes'] / 2**30:.2f} GiB"
    if row["name"] == "run":
        line += f" (plan {row['plan']}, slim.mode {row['slim_mode']})"
    print(line, flush=True)


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars, one a variant: images/s, or, where steps were paired, how many times the first's."""
    from matplotlib.figure import Figure

    rows = [row for row in result["rows"] if "step_ms" in row]
    figure = Figure(figsize=(7, 0.5 * len(rows) + 1.2), layout="constrained")
    axes = figure.subplots()
    names = [row["name"] for row in rows]
    paired = any("of_first" in row for row in rows)
    lengths = [
        row.get("of_first", {"p50": 1.0})["p50"] if paired else row["images_per_second"]
        for row in rows
    ]
    bars = axes.barh(names, lengths)
    axes.bar_label(bars, fmt="{:.2f}x" if paired else "{:,.0f}", padding=3, fontsize=8)
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel(
        f"images/s, times those of {names[0]}" if paired else "images/s, two views each"
    )
    axes.set_title(
        f"{result['encoder']}, {result['image_size']} px, batch {result['batch_size']}, "
        f"{result['precision'].removeprefix('torch.')}, {result['device']}",
        fontsize=9,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)
