"""Slim encoders: milliseconds of dense, mask, skip and recorded, forward and backward.

    python benchmarks/bench_slim.py --encoders mobilenetv1_100 resnet50 --size 112 --batch 32
    python benchmarks/bench_slim.py --encoders mobilenetv1_100 --layers

``recorded`` is skip as training runs it, from a recording of itself (``RecordedEncoder``), which is
made before the timing. ``ideal``, of an encoder: the ratio of the FLOPs that skipping leaves,
forward, to the dense ones: what the ratio of the times would be if the convolutions were all and as
efficient. ``compact`` is the same for the exported module, which does not compute what only running
statistics need.

``--layers`` takes apart: each convolution with batch norm and ReLU after it, given what the slim
encoder gives it (live channels and constants). Its ``flops`` and ``bytes`` are the ratios of skip's
to dense's; bytes count each operand once for each time it must be read or written, forward and
backward (convolution: 3 times its input, 3 times its output, 3 times its weight; norm: 8 times the
output). Whichever is the larger is what to hope for.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from timing import time_in_turns
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sacl_fast.bench.figures import device_name, write_json
from sacl_fast.encoders import build_encoder
from sacl_fast.engine.memory import keep_freed_memory
from sacl_fast.passes import RecordedEncoder
from sacl_fast.precision import autocast
from sacl_fast.slim import Slicer
from sacl_fast.slim.channels import channels
from sacl_fast.slim.export import compact, cost
from sacl_fast.slim.parts import Part
from sacl_fast.slim.slicer import Mode
from sacl_fast.slim.tensor import SlimTensor, from_parts

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
    parser.add_argument("--give-back", action="store_true", help="freed memory to the system")
    parser.add_argument("--seconds", type=float, default=2.0, help="timed, for each figure")
    parser.add_argument("--layers", action="store_true", help="each layer by itself")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    if not options.give_back:
        keep_freed_memory()  # as training does
    measured = measure_layers if options.layers else measure
    rows = [row for name in options.encoders for row in measured(name, options)]
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

    def step(run: Callable[[torch.Tensor], torch.Tensor]) -> None:
        with autocast(device, None if dtype is torch.float32 else dtype):
            run(images).float().square().mean().backward()

    def in_mode(slicer: Slicer, mode: Mode, images: torch.Tensor) -> torch.Tensor:
        with slicer.mode(mode):
            return encoder(images)

    dense_flops = flops(encoder, Slicer(encoder, 1.0), "dense", images)
    rows = []
    for ratio in options.ratios:
        slicer = Slicer(encoder, ratio)
        modes: tuple[Mode, ...] = get_args(Mode)
        runs = {mode: partial(step, partial(in_mode, slicer, mode)) for mode in modes}
        runs["recorded"] = partial(step, RecordedEncoder(slicer))
        for _ in range(4):
            runs["recorded"]()
        times = time_in_turns(runs, device, seconds=4 * options.seconds)
        dense_ms = times["dense"]["p50"]
        small, large = (
            cost(m, options.size)
            for m in (compact(encoder, slicer.masks, statistics="encoder"), encoder)
        )
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
            f"  recorded {row['of_dense']['recorded']:.2f}"
            f"  ideal {row['ideal']:.2f}  compact {row['compact']:.2f}",
            flush=True,
        )
    return rows


class Layer(nn.Module):
    """A convolution of an encoder, batch norm and ReLU; ``size``: of the convolution's input."""

    def __init__(self, name: str, convolution: nn.Module, size: tuple[int, int]) -> None:
        super().__init__()
        self.name, self.size = name, size
        norm = nn.BatchNorm2d(convolution.get_parameter("weight").shape[0])
        self.block = nn.Sequential(convolution, norm, nn.ReLU(inplace=True))

    @property
    def convolution(self) -> nn.Conv2d:
        convolution = self.block[0]
        assert isinstance(convolution, nn.Conv2d)
        return convolution

    def __str__(self) -> str:
        c = self.convolution
        kind = f"{c.kernel_size[0]}x{c.kernel_size[1]}{' dw' if c.groups > 1 else ''}"
        return (
            f"{self.name:28} {c.in_channels:4} to {c.out_channels:4} {kind:6} at {self.size[0]:3}"
        )

    def step(self, x: torch.Tensor) -> None:
        y = self.block(x)  # not as a module of its own, which would have to give a dense tensor
        parts = [p.values for p in y.parts] if isinstance(y, SlimTensor) else [y]
        sum(values.float().sum() for values in parts).backward()  # type: ignore[union-attr]


def layers(name: str, size: int) -> list[Layer]:
    """Those of an encoder that differ, without the first, whose input is the image."""
    encoder = build_encoder(name, image_size=size).eval()
    found: dict[Any, tuple[str, Any]] = {}

    def note(path: str, conv: Any, given: Any, _: Any) -> None:
        size = tuple(given[0].shape[2:])
        key = conv.weight.shape, conv.stride, conv.padding, conv.groups, size
        found.setdefault(key, (path, size))

    slimmed = [(path, encoder.get_submodule(path)) for path in Slicer(encoder, 0.5).masks]
    hooks = [conv.register_forward_hook(partial(note, path)) for path, conv in slimmed]
    encoder(torch.zeros(1, 3, size, size))
    for hook in hooks:
        hook.remove()
    convolutions = dict(slimmed)
    return [Layer(path, convolutions[path], own) for path, own in list(found.values())[1:]]


def measure_layers(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    device, dtype = torch.device(options.device), getattr(torch, options.dtype)
    memory_format = torch.contiguous_format if options.contiguous else torch.channels_last

    def images(channels: int, size: tuple[int, int]) -> torch.Tensor:
        x = torch.randn(options.batch, channels, *size, device=device)
        return x.contiguous(memory_format=memory_format).requires_grad_()

    rows = []
    for layer in layers(name, options.size):
        layer.to(device, memory_format=memory_format)  # type: ignore[call-overload]
        count = layer.convolution.in_channels
        dense = images(count, layer.size)
        for ratio in options.ratios:
            slicer, kept = Slicer(layer, ratio), max(1, int(ratio * count))
            order = torch.randperm(count).tolist()
            constants = torch.randn(1, count - kept, 1, 1, device=device, requires_grad=True)
            parts = [Part(channels(order[:kept]), images(kept, layer.size))]
            parts.append(Part(channels(order[kept:]), constants))

            slim = partial(from_parts, parts, dense.shape)

            def run(mode: Mode, layer: Layer, slicer: Slicer, slim: Any, x: torch.Tensor) -> None:
                amp_dtype = None if dtype is torch.float32 else dtype
                with autocast(device, amp_dtype), slicer.mode(mode):
                    layer.step(slim() if mode == "skip" else x)

            modes: tuple[Mode, ...] = get_args(Mode)
            runs = {mode: partial(run, mode, layer, slicer, slim, dense) for mode in modes}
            times = time_in_turns(runs, device, seconds=options.seconds)
            full, live = (work(layer, options.batch, share) for share in (1.0, ratio))
            row = {
                "encoder": name,
                "layer": layer.name,
                "ratio": ratio,
                "ms": times,
                "of_dense": {m: t["p50"] / times["dense"]["p50"] for m, t in times.items()},
                "gflops_dense": full[0] / 1e9,
                "mbytes_dense": full[1] / 1e6,
                "flops": live[0] / full[0],
                "bytes": live[1] / full[1],
            }
            rows.append(row)
            print(
                f"{layer} s={ratio:<5g} dense {times['dense']['p50']:6.2f} ms"
                f"  mask {row['of_dense']['mask']:.2f}  skip {row['of_dense']['skip']:.2f}"
                f"  flops {row['flops']:.2f}  bytes {row['bytes']:.2f}",
                flush=True,
            )
    return rows


def work(layer: Layer, batch: int, ratio: float) -> tuple[float, float]:
    """FLOPs of the convolution and bytes of it and its norm, forward and backward, in float32."""
    conv = layer.convolution
    inputs, filters = (max(1, int(ratio * n)) for n in (conv.in_channels, conv.out_channels))
    if depthwise := conv.groups > 1:
        filters = max(1, int(ratio * filters))  # that read a live channel, on average
    taps = conv.kernel_size[0] * conv.kernel_size[1]
    size = [n // s for n, s in zip(layer.size, conv.stride, strict=True)]  # padded to keep it
    pixels, weights = batch * size[0] * size[1], filters * (1 if depthwise else inputs) * taps
    values = 3 * batch * inputs * layer.size[0] * layer.size[1] + 11 * filters * pixels
    return 6.0 * pixels * weights, 4.0 * (values + 3 * weights)


def flops(encoder: nn.Module, slicer: Slicer, mode: Mode, images: torch.Tensor) -> int:
    """Of one forward pass. Only of convolutions and matrix products, as torch counts them."""
    state = copy.deepcopy(encoder.state_dict())
    with torch.no_grad(), FlopCounterMode(display=False) as counter, slicer.mode(mode):
        encoder(images)
    encoder.load_state_dict(state)
    return counter.get_total_flops()


if __name__ == "__main__":
    main()
