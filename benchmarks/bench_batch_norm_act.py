"""Train-mode batch norm with its activation: ours against PyTorch's two operations, NHWC.

    python benchmarks/bench_batch_norm_act.py --device cuda --dtype bfloat16 --batch 256

Activations of MobileNet-V1 and EfficientNet-B0 at 224 px. Forward alone, and with the gradients of
input, weight and bias. Bytes: forward reads x twice and writes y; backward reads x and dy twice and
writes dx. The share of the bandwidth is that of a large copy in the same run. On a GPU calls are
replayed as CUDA graphs.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from timing import beside_torch, operator_options, told
from torch import Tensor

from sacl_fast.bench.figures import device_name, write_json
from sacl_fast.engine.ceilings import copy_bandwidth
from sacl_fast.ops.batch_norm_act import ACTIVATIONS

# (channels, side, activation)
SHAPES = [
    (32, 112, "relu"),
    (64, 112, "relu"),
    (128, 56, "relu"),
    (256, 28, "relu"),
    (512, 14, "relu"),
    (1024, 7, "relu"),
    (96, 112, "silu"),
    (240, 28, "silu"),
    (672, 14, "silu"),
]
MOVED = {"forward": 3, "with_backward": 8}  # images


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options = operator_options(parser)
    device, dtype = options.device, getattr(torch, options.dtype)
    bandwidth = copy_bandwidth(device)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {bandwidth / 1e9:.0f} GB/s")
    rows = [
        measure(options.batch, *shape, device, dtype, bandwidth, options.seconds)
        for shape in SHAPES
    ]
    if options.json:
        result = {
            "benchmark": "bench_batch_norm_act",
            "device": device_name(device),
            "dtype": options.dtype,
            "batch": options.batch,
            "bytes_per_s": bandwidth,
        }
        write_json(options.json, {**result, "rows": rows})


def measure(
    batch: int,
    channels: int,
    side: int,
    act: str,
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
    seconds: float,
) -> dict[str, Any]:
    """Milliseconds of both methods, forward and with the backward pass."""
    torch.manual_seed(0)
    x, dy = (
        torch.randn(batch, channels, side, side, device=device, dtype=dtype).contiguous(
            memory_format=torch.channels_last
        )
        for _ in range(2)
    )
    vectors = [torch.rand(channels, device=device) for _ in range(4)]
    calls = {"ours": ours(x, dy, vectors, act), "torch": theirs(x, dy, vectors, act)}
    row: dict[str, Any] = {"channels": channels, "side": side, "act": act}
    print(f"{channels:5} x {side:3} {act:5}", end="")
    for name, images in MOVED.items():
        these = {method: call[name] for method, call in calls.items()}
        moved = images * x.numel() * x.element_size()
        row[name] = beside_torch(these, moved, bandwidth, device, seconds=seconds)
        print(told(name, row[name]), end="", flush=True)
    print()
    return row


def ours(x: Tensor, dy: Tensor, vectors: list[Tensor], act: str) -> dict[str, Callable[[], Any]]:
    op, code = torch.ops.sacl_fast, list(ACTIVATIONS).index(act)
    weight, bias, *running = vectors
    numbers = (x.numel() // x.shape[1], 0.1, 1e-5, code)

    def forward() -> Any:
        return op.batch_norm_act(x, weight, bias, None, None, *running, *numbers)

    def with_backward() -> Any:
        _, _, mean, rstd = forward()
        arguments = (dy, None, x, weight, bias, None, None, mean, rstd, code)
        return op.batch_norm_act_backward(*arguments)

    return {"forward": forward, "with_backward": with_backward}


def theirs(x: Tensor, dy: Tensor, vectors: list[Tensor], act: str) -> dict[str, Callable[[], Any]]:
    function = ACTIVATIONS[act]
    weight, bias, running_mean, running_var = vectors
    leaves = [t.detach().clone().requires_grad_() for t in (x, weight, bias)]

    def forward(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return function(F.batch_norm(x, running_mean, running_var, weight, bias, True, 0.1, 1e-5))

    def with_backward() -> Any:
        return torch.autograd.grad(forward(leaves[0], leaves[1], leaves[2]), leaves, dy)

    return {"forward": lambda: forward(x, weight, bias), "with_backward": with_backward}


if __name__ == "__main__":
    main()
