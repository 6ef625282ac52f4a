"""Images per second of a whole training step, and where the time goes.

    python benchmarks/bench_step.py --preset cifar10 --encoder.name mobilenetv1_100 --steps 20

Synthetic images, any preset, encoder and device. The phases are timed one after the other with
the device synchronised in between, so their sum is a little more than the step, which is timed
without. This is the baseline that faster parts of the engine are measured against.

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
from timing import device_name, percentiles, write_json

from sacl_fast.cli import parse_config
from sacl_fast.config import Config
from sacl_fast.data.loading.batch import Normalise
from sacl_fast.engine.distributed import Ranks, pick_device
from sacl_fast.engine.memory import keep_freed_memory
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep

PHASES = ("data", "four_passes", "loss", "backward", "optimiser")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="cifar10")
    parser.add_argument("--steps", type=int, default=20, help="timed steps")
    parser.add_argument("--warmup", type=int, default=3, help="steps before them")
    parser.add_argument("--json", type=Path, help="write the figures here")
    own, options = parser.parse_known_args()
    config = parse_config("train", [own.preset, *options])
    result = measure(config, steps=own.steps, warmup=own.warmup)
    print_table(result)
    if own.json:
        write_json(own.json, result)


def measure(config: Config, *, steps: int, warmup: int) -> dict[str, Any]:
    """The figures of one configuration, milliseconds at the 20th, 50th and 80th percentile."""
    device = pick_device(config.device)
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    torch.manual_seed(config.seed)
    step = TrainingStep(build_method(config), config, Ranks(0, 1, device), steps_per_epoch=100)
    size = config.views.size
    pixels = torch.randint(0, 256, (2, config.batch_size, size, size, 3), dtype=torch.uint8)
    normalise = Normalise(config.views, device, config.channels_last)

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)

    def data() -> tuple[torch.Tensor, torch.Tensor]:
        view_a, view_b = (normalise(view) for view in pixels)
        return view_a, view_b

    def timed(function: Callable[..., Any], *args: Any) -> tuple[float, Any]:
        synchronize()
        start = time.perf_counter()
        value = function(*args)
        synchronize()
        return 1e3 * (time.perf_counter() - start), value

    phases: dict[str, list[float]] = {name: [] for name in PHASES}
    whole: list[float] = []
    for i in range(warmup + steps):
        t_data, (view_a, view_b) = timed(data)
        t_passes, embeddings = timed(step.four_passes, view_a, view_b)
        t_loss, (loss, _) = timed(step.criterion, *embeddings)
        t_backward, _ = timed(step.backward, loss)
        t_update, _ = timed(step.update, i)
        del embeddings, loss
        t_whole, _ = timed(lambda i=i: step(*data(), i))
        if i >= warmup:
            for name, t in zip(
                PHASES, (t_data, t_passes, t_loss, t_backward, t_update), strict=True
            ):
                phases[name].append(t)
            whole.append(t_whole)
    return {
        "benchmark": "bench_step",
        "preset": config.preset,
        "encoder": config.encoder.name,
        "width": config.encoder.width,
        "image_size": size,
        "batch_size": config.batch_size,
        "embedding": config.projector.out,
        "slim_ratio": config.slim.ratio,
        "precision": str(step.amp_dtype or torch.float32),
        "device": device_name(device),
        "steps": steps,
        "images_per_second": config.batch_size / percentiles(whole)["p50"] * 1e3,
        "step_ms": percentiles(whole),
        "phases_ms": {name: percentiles(times) for name, times in phases.items()},
        "peak_memory_bytes": (
            torch.cuda.max_memory_allocated(device) if device.type == "cuda" else None
        ),
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


if __name__ == "__main__":
    sys.exit(main())
