"""Images per second of the data paths, stage by stage, and how long training waits for them.

    python benchmarks/bench_data.py --preset imagenet1k --data.root imagenet-sample.tar \
        --json benchmarks/results/data_imagenet_cpu.json --plot docs/data.png

torchvision with worker processes; DALI on the CPU with as many threads, which decodes, while the
compiled operator augments (with --backend torch, DALI does all of it); and, where there is a GPU,
DALI on it. One image is one sample of the batch: decoded once, two views. The stages add up: decode
alone, with both crops, with flip, jitter and grayscale, with blur, and all (solarise).

With --train, the share of a training loop's time that is spent waiting for data, per loader.
Loaders take turns, so that a machine that slows down slows all of them.
"""

from __future__ import annotations

import argparse
import gc
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib
import torch
from timing import write_json

from sacl_fast.cli import parse_config
from sacl_fast.config import Config, ViewConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import Source
from sacl_fast.data.loading.open import dali_obstacle, open_view_loader
from sacl_fast.data.loading.view_loader import ViewLoader
from sacl_fast.data.loading.workers import worker_count
from sacl_fast.data.views.operator import are_compiled
from sacl_fast.engine.clock import Clock
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep
from sacl_fast.passes import choose_passes

STAGES = ("decode", "crop", "jitter", "blur", "all")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="imagenet1k")
    parser.add_argument(
        "--images", type=int, default=512, help="images timed at a stage, per round"
    )
    parser.add_argument(
        "--rounds", type=int, default=3, help="turns of every loader; the best counts"
    )
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="steps of training")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    own, options = parser.parse_known_args()
    config = parse_config("train", [own.preset, *options])
    result = measure(config, own.stages, images=own.images, rounds=own.rounds, train=own.train)
    print_table(result)
    if own.json:
        write_json(own.json, result)
    if own.plot:
        plot(result, own.plot)


def contenders(config: Config) -> dict[str, tuple[Config, torch.device]]:
    """Name to configuration and the device of the views."""
    gpu = torch.cuda.is_available()
    workers = worker_count(config.data.workers)
    threads = worker_count(config.data.dali.threads)

    def by(loader: str) -> Config:
        return replace(config, data=replace(config.data, loader=loader))

    device = torch.device("cuda", 0) if gpu and config.device != "cpu" else torch.device("cpu")
    found = {f"torchvision, {workers} workers": (by("torchvision"), device)}
    if are_compiled(config, torch.device("cpu")):
        found[f"Pillow and the operator, {workers} workers"] = (by("pillow"), device)
    if (obstacle := dali_obstacle()) is not None:
        print(obstacle)
        return found
    found[f"DALI CPU, {threads} threads"] = (by("dali"), torch.device("cpu"))
    if device.type == "cuda":
        found["DALI GPU"] = (by("dali"), device)
    return found


def staged(config: Config, stage: str) -> Config:
    """The configuration with the operations up to ``stage``."""
    if stage == "all":
        return config
    off: dict[str, Any] = {"solarize": 0.0}
    if stage != "blur":
        off["blur"] = 0.0
    if stage in ("decode", "crop"):
        off |= {"jitter": 0.0, "grayscale": 0.0, "flip": 0.0}
    if stage == "decode":  # what is left is a crop of next to nothing
        off |= {"crop_scale": (1e-3, 1e-3)}

    def cut(view: ViewConfig) -> ViewConfig:
        return replace(view, **off)

    views = replace(config.views, a=cut(config.views.a), b=cut(config.views.b))
    return replace(config, views=replace(views, size=4) if stage == "decode" else views)


def measure(
    config: Config, stages: tuple[str, ...], *, images: int, rounds: int, train: int
) -> dict[str, Any]:
    source = open_sources(config.data, config.seed).train
    steps = max(2, images // config.batch_size)
    speeds: dict[str, dict[str, float]] = {}
    for stage in stages:
        for _ in range(rounds):
            for name, (given, device) in contenders(config).items():
                speed = images_per_second(source, staged(given, stage), device, steps)
                best = speeds.setdefault(name, {})
                best[stage] = max(best.get(stage, 0.0), speed)
    waiting = {}
    if train:
        for name, (given, device) in contenders(config).items():
            if device.type == "cuda" or not torch.cuda.is_available():
                waiting[name] = data_wait(source, given, device, train)
    gpu = torch.cuda.is_available() and config.device != "cpu"
    return {
        "benchmark": "bench_data",
        "preset": config.preset,
        "root": Path(config.data.root or config.data.source).name,
        "image_size": config.views.size,
        "batch_size": config.batch_size,
        "device": torch.cuda.get_device_name(0) if gpu else "cpu",
        "images": steps * config.batch_size,
        "rounds": rounds,
        "images_per_second": speeds,
        "ratio_to_torchvision": {
            name: {stage: speed / next(iter(speeds.values()))[stage] for stage, speed in of.items()}
            for name, of in speeds.items()
        },
        "encoder": config.encoder.name if train else None,
        "data_wait": waiting,
    }


@contextmanager
def opened(source: Source, config: Config, device: torch.device) -> Iterator[ViewLoader]:
    loader = open_view_loader(source, config, device=device)
    try:
        yield loader
    finally:
        loader.close()
        gc.collect()


def endless(loader: ViewLoader) -> Iterator[Any]:
    epoch = 0
    while True:
        yield from loader.epoch(epoch)
        epoch += 1


def images_per_second(source: Source, config: Config, device: torch.device, steps: int) -> float:
    """In the steady state: what was prepared ahead is taken before the clock starts."""
    ahead = max(config.data.prefetch * worker_count(config.data.workers), config.data.dali.prefetch)
    ahead = min(ahead, 2 * steps)
    with opened(source, config, device) as loader:
        batches = endless(loader)
        for _ in range(1 + ahead):
            next(batches)
        start = time.perf_counter()
        for _ in range(steps):
            next(batches)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        return steps * config.batch_size / (time.perf_counter() - start)


def data_wait(source: Source, config: Config, device: torch.device, steps: int) -> dict[str, float]:
    """Images per second of training and the share of its time spent waiting for batches."""
    torch.manual_seed(config.seed)
    with opened(source, config, device) as loader:
        passes = choose_passes(config, device, steps_per_epoch=steps)
        method = build_method(config, passes)
        step = TrainingStep(method, config, Ranks(0, 1, device), steps_per_epoch=steps)
        clock = Clock(config.batch_size, device)
        warmup = 3
        for i, batch in enumerate(clock.waiting(endless(loader))):
            loss, *_ = step(batch.view_a, batch.view_b, i % steps)
            if i + 1 == warmup:
                loss.item()
                clock.read()
            if i + 1 == warmup + steps:
                loss.item()
                return clock.read()
    raise AssertionError("epochs have no end")


def print_table(result: dict[str, Any]) -> None:
    speeds = result["images_per_second"]
    stages = list(next(iter(speeds.values())))
    print(
        f"{result['root']}, {result['image_size']} px, preset {result['preset']}, batch "
        f"{result['batch_size']}, {result['device']}: images/s (of torchvision's)"
    )
    print(f"{'':28}" + "".join(f"{stage:>18}" for stage in stages))
    for name, of in speeds.items():
        ratios = result["ratio_to_torchvision"][name]
        cells = (f"{of[stage]:,.0f} ({ratios[stage]:.2f}x)" for stage in stages)
        print(f"{name:28}" + "".join(f"{cell:>18}" for cell in cells))
    for name, of in result["data_wait"].items():
        figures = ", ".join(f"{key} {value:.3g}" for key, value in of.items())
        print(f"training {result['encoder']}, {name}: {figures}")


def plot(result: dict[str, Any], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    speeds = result["images_per_second"]
    stages = list(next(iter(speeds.values())))
    figure, axes = pyplot.subplots(figsize=(7, 3.4), layout="constrained")
    width = 0.8 / len(speeds)
    for i, (name, of) in enumerate(speeds.items()):
        centres = [j + (i - (len(speeds) - 1) / 2) * width for j in range(len(stages))]
        bars = axes.bar(centres, [of[stage] for stage in stages], width, label=name)
        axes.bar_label(bars, fmt="%.0f", fontsize=8)
    titles = {"decode": "decode", "crop": "+ crops", "jitter": "+ colours", "blur": "+ blur"}
    axes.set_xticks(range(len(stages)), [titles.get(stage, "all") for stage in stages])
    axes.set_ylabel("images/s, two views each")
    axes.set_title(f"{result['image_size']} px, preset {result['preset']}, {result['device']}")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    sys.exit(main())
