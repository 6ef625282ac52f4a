"""1x1 convolutions from live inputs to kept filters: ours against PyTorch's, NHWC.

    python benchmarks/bench_slim_pointwise.py --device cuda --dtype bfloat16 --batch 256

Layers of MobileNet-V1 at 224 px, dense and as slimming leaves them: K live inputs, often an odd
number of them, O kept filters of a full weight. Forward, and with the gradients of input and
weight. ``torch``: the same product by PyTorch's convolution of the weights that are left, as if
they had been packed before. Bytes: each activation and the weight, read or written once (backward:
dy and x read, dx and the weight's gradient written). On a GPU calls are replayed as CUDA graphs.
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
from sacl_fast.ops.slim_pointwise import slim_pointwise

# (side, live inputs K of Cin, kept filters O of Cout)
SHAPES = [
    (112, 32, 32, 64, 64),
    (112, 16, 32, 32, 64),
    (112, 17, 32, 32, 64),
    (56, 24, 64, 64, 128),
    (28, 133, 256, 128, 256),
    (28, 136, 256, 128, 256),
    (14, 256, 512, 256, 512),
    (14, 512, 512, 512, 512),
    (7, 260, 1024, 512, 1024),
]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    options = operator_options(parser)
    device, dtype = options.device, getattr(torch, options.dtype)
    torch.backends.cudnn.benchmark = True
    bandwidth = copy_bandwidth(device)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {bandwidth / 1e9:.0f} GB/s")
    rows = [measure(options, shape, device, dtype, bandwidth) for shape in SHAPES]
    if options.json:
        result = {
            "benchmark": "bench_slim_pointwise",
            "device": device_name(device),
            "dtype": options.dtype,
            "batch": options.batch,
            "bytes_per_s": bandwidth,
        }
        write_json(options.json, {**result, "rows": rows})


def measure(
    options: argparse.Namespace,
    shape: tuple[int, int, int, int, int],
    device: torch.device,
    dtype: torch.dtype,
    bandwidth: float,
) -> dict[str, Any]:
    """Milliseconds of both, forward and with backward, and what ours reaches of the bandwidth."""
    torch.manual_seed(0)
    side, live, inputs, kept, outputs = shape
    x = _image(options.batch, live, side, device, dtype)
    dy = _image(options.batch, kept, side, device, dtype)
    weight = torch.randn(outputs, inputs, 1, 1, device=device, requires_grad=True)
    in_index = None if live == inputs else torch.randperm(inputs)[:live].sort()[0].to(device)
    out_index = None if kept == outputs else torch.randperm(outputs)[:kept].sort()[0].to(device)
    packed = weight.detach()
    packed = packed if out_index is None else packed[out_index]
    packed = packed if in_index is None else packed[:, in_index]
    packed = packed.to(dtype).contiguous(memory_format=torch.channels_last).requires_grad_()
    calls = {
        "ours": _calls(lambda x: slim_pointwise(x, weight, in_index, out_index), x, dy, weight),
        "torch": _calls(lambda x: F.conv2d(x, packed), x, dy, packed),
    }
    moved = {"forward": x.nbytes + dy.nbytes, "with_backward": 3 * x.nbytes + 2 * dy.nbytes}
    row: dict[str, Any] = {
        "side": side,
        "live": live,
        "of": inputs,
        "kept": kept,
        "filters": outputs,
    }
    print(f"{side:4} px  {live:4} of {inputs:4} to {kept:4} of {outputs:4}", end="")
    for name, least in moved.items():
        these = {method: call[name] for method, call in calls.items()}
        row[name] = beside_torch(these, least, bandwidth, device, seconds=options.seconds)
        print(told(name, row[name]), end="", flush=True)
    print()
    return row


def _image(n: int, channels: int, side: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    values = torch.randn(n, channels, side, side, device=device, dtype=dtype)
    return values.contiguous(memory_format=torch.channels_last)


def _calls(
    convolve: Callable[[Tensor], Tensor], x: Tensor, dy: Tensor, weight: Tensor
) -> dict[str, Callable[[], Any]]:
    leaf = x.detach().clone().requires_grad_()

    def with_backward() -> Any:
        return torch.autograd.grad(convolve(leaf), (leaf, weight), dy)

    def forward() -> Any:
        with torch.no_grad():
            return convolve(x)

    return {"forward": forward, "with_backward": with_backward}


if __name__ == "__main__":
    main()
