"""Both views of images that lie in one buffer of 8-bit pixels, as the presets draw them.

    python benchmarks/bench_augment.py --device cuda --dtype bfloat16 --batch 256

Images per second (two views each), and the share of a large copy's bandwidth in the same run at
which the least bytes move: crops read once, views written once. Images of noise of one size; draws
as in training. On a GPU calls are replayed as a CUDA graph. On a CPU the views are float32 and
``--threads`` share the work.
"""

from __future__ import annotations

import argparse
from typing import Any

import numpy as np
import torch
from timing import operator_options

from sacl_fast.bench.figures import device_name, write_json
from sacl_fast.config import ViewsConfig
from sacl_fast.data.views.draw import draw_view, sample_rng
from sacl_fast.data.views.operator import pack_rows
from sacl_fast.data.views.tables import CIFAR, IMAGENET, TINY_IMAGENET
from sacl_fast.engine.ceilings import copy_bandwidth, time_ms
from sacl_fast.ops.augment import augment_packed

# What is drawn, height and width of the images.
CASES: dict[str, tuple[ViewsConfig, int, int]] = {
    "cifar10": (CIFAR, 32, 32),
    "tiny-imagenet": (TINY_IMAGENET, 64, 64),
    "imagenet, 256 px": (IMAGENET, 256, 299),
    "imagenet, full size": (IMAGENET, 401, 468),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--threads", type=int, default=1)
    options = operator_options(parser)
    device = options.device
    dtype = getattr(torch, options.dtype) if device.type == "cuda" else torch.float32
    bandwidth = copy_bandwidth(device)
    print(f"{device_name(device)}, batch {options.batch}, {dtype}, {bandwidth / 1e9:.0f} GB/s")
    rows = []
    for name, case in CASES.items():
        row = measure(*case, options.batch, device, dtype, options.threads, options.seconds)
        row = {"case": name, **row, "bandwidth_share": row["bytes_per_second"] / bandwidth}
        print(
            f"{name:20} {row['ms']['p50']:8.3f} ms  {row['images_per_second']:9,.0f} images/s  "
            f"{row['bytes_per_second'] / 1e9:6.1f} GB/s ({row['bandwidth_share']:.1%})",
            flush=True,
        )
        rows.append(row)
    if options.json:
        result = {
            "benchmark": "bench_augment",
            "device": device_name(device),
            "dtype": str(dtype).removeprefix("torch."),
            "batch": options.batch,
            "bytes_per_s": bandwidth,
        }
        write_json(options.json, {**result, "rows": rows})


def measure(
    views: ViewsConfig,
    height: int,
    width: int,
    batch: int,
    device: torch.device,
    dtype: torch.dtype,
    threads: int,
    seconds: float,
) -> dict[str, Any]:
    """Milliseconds of a batch, images and bytes per second."""
    rng = np.random.default_rng(0)
    size = 3 * height * width
    pixels = torch.from_numpy(rng.integers(0, 256, batch * size, np.uint8)).to(device)
    images = torch.tensor([(i * size, height, width) for i in range(batch)], device=device)
    rows = []
    for which, view in enumerate((views.a, views.b)):
        draws = (draw_view(view, sample_rng(0, 0, i, which), width, height) for i in range(batch))
        rows.append(pack_rows(draws, batch, views, view))
    drawn = torch.from_numpy(np.stack(rows))
    mean, std = (255 * torch.tensor(values, device=device) for values in (views.mean, views.std))
    out = torch.empty(2 * batch, 3, views.size, views.size, dtype=dtype, device=device)
    out = out.to(memory_format=torch.channels_last)
    there = drawn.to(device)

    def call() -> None:
        augment_packed(
            *(pixels, images, there),
            window=views.blur_window,
            mean=mean,
            std=std,
            out=out,
            threads=threads,
        )

    ms = time_ms(call, device, seconds=seconds, graph=device.type == "cuda")
    crops = 3 * (drawn[..., 2] * drawn[..., 3]).sum().item()
    moved = crops + out.numel() * out.element_size()
    return {
        "size": views.size,
        "ms": ms,
        "images_per_second": 1e3 * batch / ms["p50"],
        "bytes": moved,
        "bytes_per_second": 1e3 * moved / ms["p50"],
    }


if __name__ == "__main__":
    main()
