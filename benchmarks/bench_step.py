"""Images per second of a whole training step, and where the time goes.

    python benchmarks/bench_step.py --preset cifar10 --encoder.name mobilenetv1_100 --steps 20
    python benchmarks/bench_step.py --waterfall --preset imagenet100 --json a.json --plot a.png

Synthetic images, which lie on the device before the clock starts; any preset, encoder and device.

Without ``--waterfall``: our step, and its phases one after the other with the device synchronised
in between, so that their sum is a little more than the step, which is timed without.

With it, what ``sacl-fast bench`` measures (``sacl_fast/bench/waterfall.py``), on the whole batch.

One image is one sample of the batch, that is two views and (with distillation) four passes.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from sacl_fast.bench.figures import write_json
from sacl_fast.bench.waterfall import described, peak_memory, plot, prepared, variants, waterfall
from sacl_fast.cli import parse_config
from sacl_fast.config import Config
from sacl_fast.engine.ceilings import percentiles
from sacl_fast.engine.convolutions import tried_algorithms
from sacl_fast.engine.determinism import deterministic
from sacl_fast.engine.distributed import pick_device
from sacl_fast.engine.profiling import synchronize

PHASES = ("four_passes", "loss", "backward", "optimiser")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--waterfall", action="store_true", help="baselines and features in turn")
    parser.add_argument("--variants", nargs="+", help="of the waterfall: only these")
    parser.add_argument("--trace", type=Path, help="write a Chrome trace of one step here")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw the waterfall here")
    own, options = parser.parse_known_args()
    config = parse_config("train", [own.preset, *options])
    device = pick_device(config.device)
    with deterministic(config.deterministic), tried_algorithms(device):  # as training does
        if own.waterfall:
            found = variants(config)
            if unknown := set(own.variants or ()) - set(found):
                parser.error(f"unknown variants {', '.join(unknown)}; there are {', '.join(found)}")
            result = waterfall(
                config,
                {name: make for name, make in found.items() if name in (own.variants or found)},
                steps=own.steps,
                warmup=own.warmup,
                json=own.json,
            )
            if own.plot:
                plot(result, own.plot)
            return
        result = measure(config, steps=own.steps, warmup=own.warmup)
        print_table(result)
        if own.trace:
            trace(config, own.trace)
    if own.json:
        write_json(own.json, result)


# --- phases --------------------------------------------------------------------------------------


def measure(config: Config, *, steps: int, warmup: int) -> dict[str, Any]:
    """The figures of one configuration, milliseconds at the 20th, 50th and 80th percentile."""
    step, view_a, view_b = prepared(config)
    device = step.device

    def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
        synchronize(device)
        start = time.perf_counter()
        value = function(*args)
        synchronize(device)
        return 1e3 * (time.perf_counter() - start), value

    phases: dict[str, list[float]] = {name: [] for name in PHASES}
    whole: list[float] = []
    for i in range(warmup + steps):
        t_passes, embeddings = timed(step.four_passes, view_a, view_b)
        t_loss, (loss, _) = timed(step.criterion, *embeddings)
        t_backward, _ = timed(step.backward, loss)
        step.set_step(i)
        t_update, _ = timed(step.update)
        del embeddings, loss
        t_whole, _ = timed(step, view_a, view_b, i)
        if i >= warmup:
            for name, t in zip(PHASES, (t_passes, t_loss, t_backward, t_update), strict=True):
                phases[name].append(t)
            whole.append(t_whole)
    return {
        **described(config, step),
        "steps": steps,
        "images_per_second": config.batch_size / percentiles(whole)["p50"] * 1e3,
        "step_ms": percentiles(whole),
        "phases_ms": {name: percentiles(times) for name, times in phases.items()},
        "peak_memory_bytes": peak_memory(device),
    }


def print_table(result: dict[str, Any]) -> None:
    print(
        f"{result['encoder']} x {result['width']:g}, {result['image_size']} px, batch "
        f"{result['batch_size']}, {result['precision']}, {result['device']}"
    )
    total = sum(t["p50"] for t in result["phases_ms"].values())
    for name, t in result["phases_ms"].items():
        share = t["p50"] / total
        print(f"  {name:12} {t['p50']:10.2f} ms  {share:6.1%}  ({t['p20']:.2f} .. {t['p80']:.2f})")
    t = result["step_ms"]
    print(f"  {'step':12} {t['p50']:10.2f} ms          ({t['p20']:.2f} .. {t['p80']:.2f})")
    print(f"  {result['images_per_second']:,.1f} images/s")


def trace(config: Config, path: Path) -> None:
    """A Chrome trace of one step, after three."""
    step, view_a, view_b = prepared(config)
    for i in range(3):
        step(view_a, view_b, i)
    with torch.profiler.profile() as profiler:
        step(view_a, view_b, 3)
        synchronize(step.device)
    path.parent.mkdir(parents=True, exist_ok=True)
    profiler.export_chrome_trace(str(path))


if __name__ == "__main__":
    sys.exit(main())
