"""Depthwise convolutions: ours against PyTorch's (oneDNN on a CPU, cuDNN on a GPU), NHWC.

    python benchmarks/bench_depthwise.py --batch 32 --json depthwise.json

The nine shapes of MobileNet-V1 at 224 px and the 5x5 ones of EfficientNet-B0; forward, gradient of
the input, gradient of the weight. ``half``: ours with an index list of half the channels, which
PyTorch has no operator for. Bytes: what must move, each operand once. The share of the bandwidth
is that of a large copy in the same run.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timing import device_name, time_ms, write_json
from torch import Tensor

from sacl_fast.ops.depthwise_conv import depthwise_conv, is_compiled

# (channels, side, stride, kernel)
MOBILENET_V1 = [
    (32, 112, 1, 3),
    (64, 112, 2, 3),
    (128, 56, 1, 3),
    (128, 56, 2, 3),
    (256, 28, 1, 3),
    (256, 28, 2, 3),
    (512, 14, 1, 3),
    (512, 14, 2, 3),
    (1024, 7, 1, 3),
]
EFFICIENTNET_B0 = [
    (144, 56, 2, 5),
    (240, 28, 1, 5),
    (480, 14, 1, 5),
    (672, 14, 1, 5),
    (672, 14, 2, 5),
]
PASSES = ("forward", "input", "weight")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--seconds", type=float, default=0.3, help="for each figure")
    parser.add_argument("--device", default="cpu", help="cpu: the compiled operators' only one yet")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if not is_compiled():
        parser.exit(1, "the compiled module is not built; sacl-fast doctor says why\n")
    device = torch.device(options.device)
    source = torch.empty(2**28, dtype=torch.int8, device=device)
    target = torch.empty_like(source)
    bandwidth = 2 * source.numel() / time_ms(lambda: target.copy_(source), device)["p20"] * 1e3
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {bandwidth / 1e9:.0f} GB/s")
    rows = [
        measure(options.batch, *shape, device, bandwidth, options.seconds)
        for shape in MOBILENET_V1 + EFFICIENTNET_B0
    ]
    means = {
        name: math.exp(sum(math.log(row[name]["times_as_fast"]) for row in rows) / len(rows))
        for name in PASSES
    }
    print("geometric means:", ", ".join(f"{name} {x:.2f}" for name, x in means.items()))
    if options.json:
        result = {"benchmark": "bench_depthwise", "device": device_name(device)}
        write_json(options.json, {**result, "bytes_per_s": bandwidth, "means": means, "rows": rows})


def measure(
    batch: int,
    channels: int,
    side: int,
    stride: int,
    kernel: int,
    device: torch.device,
    bandwidth: float,
    seconds: float,
) -> dict[str, Any]:
    """Milliseconds of each pass, ours, PyTorch's and ours with half of the channels."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, side, side, device=device)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, kernel, kernel, device=device)
    index = torch.randperm(channels, device=device)[: channels // 2].sort().values
    window = {"stride": (stride, stride), "padding": (kernel // 2,) * 2}
    ours = passes(lambda a, w: depthwise_conv(a, w, **window), x, weight)
    theirs = passes(lambda a, w: F.conv2d(a, w, groups=channels, **window), x, weight)
    half = passes(lambda a, w: depthwise_conv(a, w, index, **window), x, weight[index])
    moved = 4 * x.numel() * (1 + 1 / stride**2)
    row: dict[str, Any] = {"channels": channels, "side": side, "stride": stride, "kernel": kernel}
    print(f"{channels:5} x {side:3} stride {stride} {kernel}x{kernel}", end="")
    for name in PASSES:
        times = {
            method: time_ms(calls[name], device, seconds=seconds)
            for method, calls in (("ours", ours), ("torch", theirs), ("half", half))
        }
        own = times["ours"]["p50"]
        row[name] = {
            **times,
            "bytes": moved,
            "bandwidth_share": moved / own * 1e3 / bandwidth,
            "times_as_fast": times["torch"]["p50"] / own,
        }
        print(
            f"  {name} {own:6.2f} ms, torch {times['torch']['p50']:6.2f}, half "
            f"{times['half']['p50']:6.2f}",
            end="",
            flush=True,
        )
    print()
    return row


def passes(
    convolve: Callable[[Tensor, Tensor], Tensor], x: Tensor, weight: Tensor
) -> dict[str, Callable[[], Any]]:
    x_leaf, weight_leaf = (t.detach().clone().requires_grad_() for t in (x, weight))
    of_x, of_weight = convolve(x_leaf, weight), convolve(x, weight_leaf)
    dy = torch.randn_like(of_x)
    return {
        "forward": lambda: convolve(x, weight),
        "input": lambda: torch.autograd.grad(of_x, x_leaf, dy, retain_graph=True),
        "weight": lambda: torch.autograd.grad(of_weight, weight_leaf, dy, retain_graph=True),
    }


if __name__ == "__main__":
    main()
