"""Depthwise convolutions: ours against PyTorch's (oneDNN on a CPU, cuDNN on a GPU), NHWC.

    python benchmarks/bench_depthwise_conv.py --batch 32 --json depthwise.json
    python benchmarks/bench_depthwise_conv.py --device cuda --dtype bfloat16 --batch 256

The nine shapes of MobileNet-V1 at 224 px and the 5x5 ones of EfficientNet-B0; forward, gradient of
the input, gradient of the weight. ``half``: ours with an index list of half the channels, which
PyTorch has no operator for. Bytes: what must move, each operand once. The share of the bandwidth
is that of a large copy in the same run. On a GPU calls are replayed as CUDA graphs, so that their
launching on the CPU is not in the time, and cuDNN tries its algorithms first.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import beside_torch, operator_options, told
from torch import Tensor

from sacl_fast.bench.figures import device_name, write_json
from sacl_fast.engine.ceilings import copy_bandwidth

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
    options = operator_options(parser)
    device, dtype = options.device, getattr(torch, options.dtype)
    torch.backends.cudnn.benchmark = True
    bandwidth = copy_bandwidth(device)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {bandwidth / 1e9:.0f} GB/s")
    rows = [
        measure(options.batch, *shape, device, dtype, bandwidth, options.seconds)
        for shape in MOBILENET_V1 + EFFICIENTNET_B0
    ]
    means = {name: geometric_mean([row[name]["times_as_fast"] for row in rows]) for name in PASSES}
    means["all passes of MobileNet-V1"] = geometric_mean(
        [
            sum(row[name]["torch"]["p50"] for name in PASSES)
            / sum(row[name]["ours"]["p50"] for name in PASSES)
            for row in rows[: len(MOBILENET_V1)]
        ]
    )
    print("times as fast as PyTorch:", ", ".join(f"{name} {x:.2f}" for name, x in means.items()))
    if options.json:
        result = {
            "benchmark": "bench_depthwise_conv",
            "device": device_name(device),
            "dtype": options.dtype,
            "batch": options.batch,
            "bytes_per_s": bandwidth,
        }
        write_json(options.json, {**result, "means": means, "rows": rows})


def measure(
    batch: int,
    channels: int,
    side: int,
    stride: int,
    kernel: int,
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    seconds: float,
) -> dict[str, Any]:
    """Milliseconds of each pass, ours, PyTorch's and ours with half of the channels."""
    torch.manual_seed(0)
    x = torch.randn(batch, channels, side, side, device=device, dtype=dtype)
    x = x.contiguous(memory_format=torch.channels_last)
    weight = torch.randn(channels, 1, kernel, kernel, device=device, dtype=dtype)
    index = torch.randperm(channels, device=device)[: channels // 2].sort().values
    window = ((stride, stride), (kernel // 2, kernel // 2), (1, 1))
    ours, half = passes(x, weight, None, window), passes(x, weight[index], index, window)
    theirs = passes_of_torch(x, weight, window)
    moved = x.element_size() * x.numel() * (1 + 1 / stride**2)
    row: dict[str, Any] = {"channels": channels, "side": side, "stride": stride, "kernel": kernel}
    print(f"{channels:5} x {side:3} stride {stride} {kernel}x{kernel}", end="")
    for name in PASSES:
        calls = {"ours": ours[name], "torch": theirs[name], "half": half[name]}
        row[name] = beside_torch(calls, moved, bandwidth, device, seconds=seconds)
        print(told(name, row[name]), end="", flush=True)
    print()
    return row


Window = tuple[tuple[int, int], tuple[int, int], tuple[int, int]]


def passes(
    x: Tensor, weight: Tensor, index: Tensor | None, window: Window
) -> dict[str, Callable[[], Any]]:
    op, taps = torch.ops.sacl_fast, weight.squeeze(1)
    dy = torch.randn_like(op.depthwise_conv(x, taps, index, *window))
    channels, high, wide = x.shape[1:]
    return {
        "forward": lambda: op.depthwise_conv(x, taps, index, *window),
        "input": lambda: op.depthwise_conv_backward_input(
            dy, taps, index, high, wide, channels, *window
        ),
        "weight": lambda: op.depthwise_conv_backward_weight(x, dy, index, *taps.shape[1:], *window),
    }


def passes_of_torch(x: Tensor, weight: Tensor, window: Window) -> dict[str, Callable[[], Any]]:
    dy = torch.randn_like(F.conv2d(x, weight, None, *window, groups=len(weight)))

    def gradient(*wanted: bool) -> Any:
        return torch.ops.aten.convolution_backward(
            dy, x, weight, None, *window, False, (0, 0), len(weight), wanted
        )

    return {
        "forward": lambda: F.conv2d(x, weight, None, *window, groups=len(weight)),
        "input": lambda: gradient(True, False, False),
        "weight": lambda: gradient(False, True, False),
    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values))


if __name__ == "__main__":
    main()
