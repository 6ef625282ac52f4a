"""Slim encoders: milliseconds of dense, mask and skip, forward and backward, against their FLOPs.

    python benchmarks/bench_slim.py --encoders mobilenetv1_100 resnet50 --size 112 --batch 32

``ideal`` is the ratio of the FLOPs that skipping leaves, forward, to the dense ones: what the ratio
of the times would be if the convolutions were all and as efficient. ``compact`` is the same for
the exported module, which does not compute what only running statistics need.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from timing import device_name, time_ms, write_json
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sacl_fast.encoders import build_encoder
from sacl_fast.slim import Slicer
from sacl_fast.slim.compact import compact, cost
from sacl_fast.slim.slicer import Mode

ENCODERS = ("mobilenetv1_100", "mobilenetv3_large_100", "efficientnet_b0", "resnet50")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--encoders", nargs="+", default=ENCODERS)
    parser.add_argument("--ratios", nargs="+", type=float, default=(0.5, 0.25))
    parser.add_argument("--size", type=int, default=112)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--contiguous", action="store_true", help="not channels-last")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed, for each figure")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    rows = [row for name in options.encoders for row in measure(name, options)]
    if options.json:
        settings = {k: v for k, v in vars(options).items() if k not in ("json", "encoders")}
        device = device_name(torch.device(options.device))
        write_json(options.json, {"device": device, **settings, "rows": rows})


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=options.size).to(device)
    images = torch.randn(options.batch, 3, options.size, options.size, device=device)
    if not options.contiguous:
        encoder = encoder.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        images = images.to(memory_format=torch.channels_last)

    def step(slicer: Slicer, mode: Mode) -> None:
        with torch.autocast(device.type, dtype, enabled=dtype is not torch.float32):
            with slicer.mode(mode):
                out = encoder(images)
            out.float().square().mean().backward()

    dense_flops = flops(encoder, Slicer(encoder, 1.0), "dense", images)
    rows = []
    for ratio in options.ratios:
        slicer = Slicer(encoder, ratio)
        times = {
            mode: time_ms(lambda s=slicer, m=mode: step(s, m), device, seconds=options.seconds)
            for mode in ("dense", "mask", "skip")
        }
        dense_ms = times["dense"]["p50"]
        small, large = (cost(m, options.size) for m in (compact(encoder, slicer.masks), encoder))
        row = {
            "encoder": name,
            "ratio": ratio,
            "ms": times,
            "of_dense": {mode: t["p50"] / dense_ms for mode, t in times.items()},
            "gflops_dense": dense_flops / 1e9,
            "ideal": flops(encoder, slicer, "skip", images) / dense_flops,
            "compact": small.flops / large.flops,
            "compact_parameters": small.parameters / large.parameters,
        }
        rows.append(row)
        print(
            f"{name:22} s={ratio:<5g} dense {dense_ms:7.1f} ms"
            f"  mask {row['of_dense']['mask']:.2f}  skip {row['of_dense']['skip']:.2f}"
            f"  ideal {row['ideal']:.2f}  compact {row['compact']:.2f}",
            flush=True,
        )
    return rows


def flops(encoder: nn.Module, slicer: Slicer, mode: Mode, images: torch.Tensor) -> int:
    """Of one forward pass. Only of convolutions and matrix products, as torch counts them."""
    state = copy.deepcopy(encoder.state_dict())
    with torch.no_grad(), FlopCounterMode(display=False) as counter, slicer.mode(mode):
        encoder(images)
    encoder.load_state_dict(state)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
