"""Images per second of the data paths, stage by stage, and how long training waits for them.

    python benchmarks/bench_data.py --preset imagenet1k --data.root imagenet-sample.tar \
        --json benchmarks/results/data_paths_imagenet_cpu.json

=======================  ===========================================================================
row                      who does what
=======================  ===========================================================================
torchvision              worker processes decode by Pillow and augment
Pillow and the operator  worker processes decode by Pillow; the compiled operator augments
DALI alone               DALI decodes and augments
DALI and the operator    DALI decodes; the compiled operator augments
pixels in memory         of images that are pixels (CIFAR); the operator augments
cache, disk              pixels from a file that is made first (not timed); the operator augments
cache, ram               the same, read into memory before
cache, device            the same, in the GPU's memory
kornia, decoded          images of one size, decoded before, lie on the device; kornia augments
=======================  ===========================================================================

Where there is a GPU, DALI decodes on it, and it makes the views of all rows but the first two,
whose views it normalises (with --device cpu, all is on the CPU). One image is one sample of the
batch: read once, two views. The stages add up: decode (or read) alone, with both crops, with flip,
jitter and grayscale, with blur, and all (solarise).

Rows take turns, so that a machine that slows down slows all of them; of each the best round counts.
Each says images/s, the time that cores work for an image (user and system mode, all processes),
and how many times as fast as the baseline it is. With --train, also the share of a training loop's
time that is spent waiting for data.
"""

from __future__ import annotations

import argparse
import gc
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import kornia_views
import matplotlib
import torch
from timing import cpu_seconds

from sacl_fast.bench.figures import device_name, write_json
from sacl_fast.cli import parse_config
from sacl_fast.config import Config, ViewConfig
from sacl_fast.config.choices import Backend, LoaderName, Residence
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import Source, as_packed
from sacl_fast.data.loading.open import dali_obstacle, open_view_loader
from sacl_fast.data.loading.workers import worker_count
from sacl_fast.data.views.operator import why_not_compiled
from sacl_fast.engine.clock import Clock
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method, build_networks
from sacl_fast.engine.step import TrainingStep
from sacl_fast.passes import choose_passes

STAGES = ("decode", "crop", "jitter", "blur", "all")
BASELINE = "torchvision"
CPU = torch.device("cpu")


class Row(NamedTuple):
    """A data path."""

    name: str
    config: Config
    source: Source
    device: torch.device
    """that of the views"""
    missing: str | None = None
    """why it cannot be measured here"""

    @property
    def is_kornia(self) -> bool:
        return self.name.startswith("kornia")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--preset", default="imagenet1k")
    parser.add_argument(
        "--images", type=int, default=512, help="images timed at a stage, per round"
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of every row; the best counts")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=STAGES)
    parser.add_argument("--rows", nargs="+", metavar="NAME", help="only those that begin so")
    parser.add_argument("--cache", type=Path, help="a cache of the images; made if missing")
    parser.add_argument("--cache-size", type=int, default=0, help="to which it is shrunk (0: not)")
    parser.add_argument("--train", type=int, default=0, metavar="STEPS", help="steps of training")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw them here")
    own, options = parser.parse_known_args()
    config = parse_config("train", [own.preset, *options])
    with tempfile.TemporaryDirectory() as folder:
        cache = own.cache or Path(folder) / "images.pixels"
        chosen = [
            row
            for row in all_rows(config, cache, own.cache_size)
            if row.name.startswith(tuple(own.rows or [""])) or row.name == BASELINE
        ]
        result = measure(config, chosen, own.stages, own.images, own.rounds, own.train)
    print_table(result)
    if own.json:
        write_json(own.json, result)
    if own.plot:
        plot(result, own.plot)


def all_rows(config: Config, cache: Path, size: int) -> list[Row]:
    """``cache``: a file of decoded images, shrunk to ``size`` where it is still to be made."""
    source = open_sources(config.data, config.seed).train
    on_gpu = torch.cuda.is_available() and config.device != "cpu"
    device = torch.device("cuda", 0) if on_gpu else CPU

    def row(
        name: str,
        loader: LoaderName,
        missing: str | None = None,
        backend: Backend = config.backend,
    ) -> Row:
        data = replace(config.data, loader=loader)
        return Row(name, replace(config, data=data, backend=backend), source, device, missing)

    no_dali = dali_obstacle()
    rows = [
        row(BASELINE, "torchvision"),
        row("Pillow and the operator", "pillow", why_not_compiled(config, CPU)),
        row("DALI alone", "dali", no_dali, "torch"),
        row("DALI and the operator", "dali", no_dali or why_not_compiled(config, device)),
    ]
    if as_packed(source) is not None:
        missing = why_not_compiled(config, CPU)
        rows.append(row("pixels in memory", "compiled", missing))
    if config.data.root is not None and config.data.source != "cache":
        rows += cached(row("cache", "compiled", why_not_compiled(config, device)), cache, size)
    return [*rows, row("kornia, decoded", "auto", kornia_views.obstacle())]


def cached(row: Row, file: Path, size: int) -> Iterator[Row]:
    """The same of a cache of its images, shrunk to ``size``, which is made where it is missing:
    from all places where it can be."""
    data = row.config.data
    if not file.exists():
        command = [sys.executable, "-m", "sacl_fast", "cache", str(data.root), str(file)]
        command += ["--data.source", data.source, "--data.labels", data.labels]
        command += ["--data.limit", str(data.limit), "--seed", str(row.config.seed)]
        command += ["--size", str(size)]
        command += ["--data.cache-dir", data.cache_dir] if data.cache_dir else []
        subprocess.run(command, check=True)
    data = replace(data, source="cache", root=str(file), limit=0)
    source = open_sources(data, row.config.seed).train
    places: tuple[Residence, ...] = ("disk", "ram", "device")
    for residence in places[: 3 if row.device.type == "cuda" else 2]:
        config = replace(row.config, data=replace(data, residence=residence))
        yield row._replace(name=f"{row.name}, {residence}", config=config, source=source)


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
    config: Config, chosen: list[Row], stages: list[str], images: int, rounds: int, train: int
) -> dict[str, Any]:
    steps = max(2, images // config.batch_size)
    found: dict[tuple[str, str], dict[str, float]] = {}
    for stage in stages:
        for _ in range(rounds):
            for row in chosen:
                if row.missing or (row.is_kornia and stage == "decode"):
                    continue
                figures = speed(row, stage, steps)
                best = found.setdefault((row.name, stage), figures)
                if figures["images_per_second"] > best["images_per_second"]:
                    found[row.name, stage] = figures
    training = {}
    if train:
        for row in chosen:
            if not (row.missing or row.is_kornia):
                training[row.name] = data_wait(row, config, train)
    (device,) = {row.device for row in chosen if row.name == BASELINE}
    return {
        "benchmark": "bench_data",
        "preset": config.preset,
        "root": Path(config.data.root or config.data.source).name,
        "image_size": config.views.size,
        "batch_size": config.batch_size,
        "device": device_name(device),
        "workers": worker_count(config.data.workers),
        "dali_threads": worker_count(config.data.dali.threads),
        "images": steps * config.batch_size,
        "rounds": rounds,
        "baseline": BASELINE,
        "rows": [
            {"name": name, "stage": stage, **of, "ratio": ratio(of, found[BASELINE, stage])}
            for (name, stage), of in found.items()
        ],
        "missing": {row.name: row.missing for row in chosen if row.missing},
        "encoder": config.encoder.name if train else None,
        "training": [
            {"name": name, **of, "ratio": ratio(of, training[BASELINE])}
            for name, of in training.items()
        ],
    }


def ratio(figures: dict[str, float], baseline: dict[str, float]) -> float:
    return figures["images_per_second"] / baseline["images_per_second"]


@contextmanager
def batches_of(row: Row) -> Iterator[Iterator[Any]]:
    """Batches without end."""
    if row.is_kornia:
        yield kornia_views.batches(row.source, row.config, row.device)
        return
    loader = open_view_loader(row.source, row.config, device=row.device)

    def endless() -> Iterator[Any]:
        epoch = 0
        while True:
            yield from loader.epoch(epoch)
            epoch += 1

    try:
        yield endless()
    finally:
        loader.close()
        gc.collect()


def speed(row: Row, stage: str, steps: int) -> dict[str, float]:
    """In the steady state: what was prepared ahead is taken before the clock starts."""
    data = row.config.data
    ahead = max(data.prefetch * worker_count(data.workers), data.dali.prefetch)
    with batches_of(row._replace(config=staged(row.config, stage))) as batches:
        for _ in range(1 + min(ahead, 2 * steps)):
            next(batches)
        wait(row.device)
        start, worked = time.perf_counter(), cpu_seconds()
        for _ in range(steps):
            next(batches)
        wait(row.device)
        seconds, worked = time.perf_counter() - start, cpu_seconds() - worked
    images = steps * row.config.batch_size
    return {"images_per_second": images / seconds, "core_ms_per_image": 1e3 * worked / images}


def wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def data_wait(row: Row, config: Config, steps: int) -> dict[str, float]:
    """Images per second of training as ``config`` says and the share of its time spent waiting for
    the row's batches."""
    device, warmup = row.device, 3
    torch.manual_seed(config.seed)
    with batches_of(row) as batches:
        networks = build_networks(config)
        passes = choose_passes(config, device, steps_per_epoch=steps, encoder=networks.encoder)
        method = build_method(config, passes, networks)
        step = TrainingStep(method, config, Ranks(0, 1, device), steps_per_epoch=steps)
        clock = Clock(config.batch_size, device)
        for i, batch in enumerate(clock.waiting(batches)):
            loss, *_ = step(batch.view_a, batch.view_b, i % steps)
            if i + 1 == warmup:
                loss.item()
                clock.read()
            if i + 1 == warmup + steps:
                loss.item()
                return clock.read()
    raise AssertionError("epochs have no end")


def by_name(result: dict[str, Any]) -> dict[str, dict[str, dict[str, float]]]:
    """Name to stage to figures."""
    found: dict[str, dict[str, dict[str, float]]] = {}
    for row in result["rows"]:
        found.setdefault(row["name"], {})[row["stage"]] = row
    return found


def print_table(result: dict[str, Any]) -> None:
    rows = by_name(result)
    stages = list(rows[BASELINE])
    print(
        f"{result['root']}, {result['image_size']} px, preset {result['preset']}, batch "
        f"{result['batch_size']}, {result['device']}: images/s (of {BASELINE}'s), ms of a core an "
        "image"
    )
    print(f"{'':36}" + "".join(f"{stage:>24}" for stage in stages))
    for name, of in rows.items():
        cells = (
            f"{f['images_per_second']:,.0f} ({f['ratio']:.2f}x) {f['core_ms_per_image']:.2f}"
            if (f := of.get(stage))
            else ""
            for stage in stages
        )
        print(f"{name:36}" + "".join(f"{cell:>24}" for cell in cells))
    for name, why in result["missing"].items():
        print(f"{name:36}  {why}")
    for row in result["training"]:
        print(
            f"training {result['encoder']}, {row['name']}: {row['images_per_second']:,.0f} images/s"
            f" ({row['ratio']:.2f}x), waiting {row['data_wait']:.1%}"
        )


def plot(result: dict[str, Any], path: Path) -> None:
    matplotlib.use("Agg")
    from matplotlib import pyplot

    rows = by_name(result)
    stages = list(rows[BASELINE])
    figure, axes = pyplot.subplots(figsize=(8, 3.8), layout="constrained")
    width = 0.8 / len(rows)
    for i, (name, of) in enumerate(rows.items()):
        centres = [j + (i - (len(rows) - 1) / 2) * width for j in range(len(stages))]
        speeds = [of[s]["images_per_second"] if s in of else 0.0 for s in stages]
        bars = axes.bar(centres, speeds, width, label=name)
        axes.bar_label(bars, fmt=lambda speed: f"{speed:,.0f}" if speed else "", fontsize=7)
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
