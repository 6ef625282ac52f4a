"""An update of LARS: ours by every backend that runs, against one tensor at a time.

    python benchmarks/bench_lars.py --device cuda --json lars.json

The parameters of the presets' encoders with their projector, and gradients that stay where they
are. ``per_tensor`` is LARS as solo-learn writes it, which asks the device for two norms a tensor.
``calls`` counts PyTorch's operators that compute, in one update; on a GPU ``launches`` counts
kernels, and ``graph`` is the time without the launch costs of the CPU.

Bytes that must move: weights and gradients for the norms; weights, gradients and momentum read,
weights and momentum written. The share of the bandwidth is that of a large copy in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import time_in_turns
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from sacl_fast.bench.figures import device_name, kernel_launches, write_json
from sacl_fast.config import Backend, EncoderConfig
from sacl_fast.engine.ceilings import copy_bandwidth, time_ms
from sacl_fast.engine.memory import keep_freed_memory
from sacl_fast.engine.method import build_networks
from sacl_fast.ops.backend import OPERATORS
from sacl_fast.optim import Lars
from sacl_fast.presets import get_preset

ENCODERS = ("resnet20", "mobilenetv1_100", "efficientnet_b0")
SETTINGS: dict[str, Any] = dict(momentum=0.9, weight_decay=1e-4, eta=0.02, clip=True)
MOVED = 7  # times all values


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--encoders", nargs="+", default=ENCODERS)
    parser.add_argument("--seconds", type=float, default=5.0, help="for the times of an encoder")
    parser.add_argument("--device", type=torch.device, default=torch.device("cpu"))
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    device = options.device
    if device.type == "cpu":
        keep_freed_memory()  # as training does
    bandwidth = copy_bandwidth(device)
    print(f"{device_name(device)}, {torch.get_num_threads()} threads, {bandwidth / 1e9:.0f} GB/s")
    rows = [measure(name, device, bandwidth, options.seconds) for name in options.encoders]
    if options.json:
        result = {"benchmark": "bench_lars", "device": device_name(device)}
        write_json(options.json, {**result, "bytes_per_s": bandwidth, "rows": rows})


def measure(encoder: str, device: torch.device, bandwidth: float, seconds: float) -> dict[str, Any]:
    """Milliseconds of all methods for one encoder."""
    shapes = shapes_of(encoder)
    values = sum(shape.numel() for shape in shapes)
    checks = OPERATORS["lars"].items()
    backends: list[Backend] = [name for name, check in checks if check(device) is None]
    backends.append("torch")
    updates = {"per_tensor": per_tensor(parameters(shapes, device))}
    rate = torch.tensor(0.1, device=device)
    for name in backends:
        updates[name] = ours(parameters(shapes, device), rate, name)
    times: dict[str, Any] = dict(time_in_turns(updates, device, seconds=seconds))
    own, moved = times[backends[0]]["p50"], MOVED * 4 * values
    for name, update in updates.items():
        times[name]["calls"] = calls(update)
        if device.type == "cuda":
            times[name]["launches"] = len(kernel_launches(update))
            if name != "per_tensor":  # which reads numbers, and so cannot be captured
                times[name]["graph"] = time_ms(update, device, seconds=seconds / 4, graph=True)
    for name, figures in times.items():
        print(f"{encoder:16} {name:10} {figures['p50']:8.3f} ms  {figures['calls']:4} calls")
    ratio = times["per_tensor"]["p50"] / own
    update = {**times, "bytes": moved, "times_as_fast": ratio}
    update["bandwidth_share"] = moved / own * 1e3 / bandwidth
    return {"encoder": encoder, "tensors": len(shapes), "values": values, "update": update}


def shapes_of(encoder: str) -> list[torch.Size]:
    """Of the parameters of the encoder and of its projector."""
    preset = get_preset("cifar10" if encoder == "resnet20" else "imagenet100")
    config = replace(preset, encoder=EncoderConfig(name=encoder))
    encoder_, projector, *_ = build_networks(config)
    return [p.shape for net in (encoder_, projector) for p in net.parameters()]


def parameters(shapes: list[torch.Size], device: torch.device) -> list[nn.Parameter]:
    torch.manual_seed(0)
    params = [nn.Parameter(torch.randn(shape, device=device)) for shape in shapes]
    for p in params:
        if p.ndim == 4:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        p.grad = torch.randn_like(p)
    return params


def ours(params: list[nn.Parameter], rate: Tensor, backend: Backend) -> Callable[[], Any]:
    return Lars(params, lr=rate, **SETTINGS, backend=backend).step


def per_tensor(params: list[nn.Parameter]) -> Callable[[], Any]:
    """A loop over the tensors, with conditions on numbers of the device."""
    buffers = [torch.zeros_like(p) for p in params]
    momentum, decay, eta = (SETTINGS[name] for name in ("momentum", "weight_decay", "eta"))
    lr = 0.1

    @torch.no_grad()
    def update() -> None:
        for p, buffer in zip(params, buffers, strict=True):
            assert p.grad is not None
            g = p.grad
            if p.ndim > 1:
                p_norm, g_norm = torch.norm(p), torch.norm(g)
                if p_norm != 0 and g_norm != 0:
                    trust = eta * p_norm / (g_norm + p_norm * decay + 1e-8)
                    trust = min(trust / lr, 1)
                    g = g.add(p, alpha=decay) * trust
            buffer.mul_(momentum).add_(g)
            p.add_(buffer, alpha=-lr)

    return update


class Calls(TorchDispatchMode):
    """Counts PyTorch's operators, without those that allocate or make views."""

    PASSIVE = ("empty", "as_strided", "view", "expand", "unbind", "select", "slice", "unsqueeze")

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        passive = ("_record_function", *self.PASSIVE)
        self.count += not func.overloadpacket.__name__.startswith(passive)
        return func(*args, **(kwargs or {}))


def calls(update: Callable[[], Any]) -> int:
    with Calls() as counted:
        update()
    return counted.count


if __name__ == "__main__":
    main()
