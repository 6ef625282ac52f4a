"""The loss, forward and backward: ours against the published pseudocode and against lightly.

    python benchmarks/bench_xcorr_loss.py --n 256 --d 2048 8192 --json loss.json --plot loss.png

Methods: ``ours`` (the algorithm and backend that the defaults choose), ``ours_torch`` (plain
PyTorch, where that is not the default), ``eager`` (the supplement's pseudocode), ``compiled`` (the
same under torch.compile), ``lightly`` (its BarlowTwinsLoss, called for the three correlations). On
a CPU in fp32, on a GPU in bf16: the baselines then run under autocast, as published, and everything
is timed as launched and as a CUDA graph.

FLOP: 12 N^2 D (Gram) or 14 N D^2, multiplication and addition counted, whichever the method does.
Bytes that must move: four embeddings read, two gradients written. The floor is the larger of the
fewest FLOP at the speed of one large matrix product, and of those bytes at the speed of a copy,
both measured in the same run.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sacl_fast.bench.figures import device_name, peak_bytes, write_json
from sacl_fast.bench.pseudocode import pseudocode_loss
from sacl_fast.engine.ceilings import copy_bandwidth, product_rate, time_ms
from sacl_fast.ops.backend import resolve
from sacl_fast.ops.xcorr_loss import sacl_xd_loss

ALPHA, LAMBDA = 0.95, 0.005
Loss = Callable[..., Tensor]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--n", type=int, nargs="+", default=[64, 256, 1024, 4096])
    parser.add_argument("--d", type=int, nargs="+", default=[512, 2048, 4096, 8192])
    parser.add_argument("--methods", nargs="+", help="default: all that run here")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seconds", type=float, default=1.0, help="for each figure")
    parser.add_argument("--max-flop", type=float, default=float("inf"), help="skip larger eager")
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--plot", type=Path, help="draw time over D here")
    options = parser.parse_args()
    device = torch.device(options.device)
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    methods = available_methods(device)
    if options.methods:
        methods = {name: methods[name] for name in options.methods}
    speed = {"flop_per_s": product_rate(device, dtype), "bytes_per_s": copy_bandwidth(device)}
    print(
        f"{device_name(device)}, {dtype}, {torch.get_num_threads()} threads: "
        f"{speed['flop_per_s'] / 1e9:,.0f} GFLOP/s, {speed['bytes_per_s'] / 1e9:,.0f} GB/s"
    )
    rows = []
    for n in options.n:
        for d in options.d:
            rows += measure(n, d, methods, device, dtype, speed, options)
    result = {
        "benchmark": "bench_xcorr_loss",
        "device": device_name(device),
        "dtype": str(dtype),
        **speed,
        "rows": rows,
    }
    if options.json:
        write_json(options.json, result)
    if options.plot:
        plot(result, options.plot)


# --- the methods ---------------------------------------------------------------------------------


def available_methods(device: torch.device) -> dict[str, Loss]:
    methods: dict[str, Loss] = {"ours": lambda *zs: sacl_xd_loss(*zs)[0]}
    if resolve("auto", "xcorr_loss", device).backend != "torch":
        methods["ours_torch"] = lambda *zs: sacl_xd_loss(*zs, backend="torch")[0]
    methods["eager"] = partial(_autocast, pseudocode_loss)
    methods["compiled"] = partial(_autocast, torch.compile(pseudocode_loss, dynamic=False))
    try:
        from lightly.loss import BarlowTwinsLoss  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("lightly is not installed (extra 'bench'): left out")
    else:
        methods["lightly"] = partial(_autocast, partial(_three_times, BarlowTwinsLoss(LAMBDA)))
    return methods


def _autocast(loss: Loss, *zs: Tensor) -> Tensor:
    with torch.autocast(zs[0].device.type, torch.bfloat16, enabled=zs[0].is_cuda):
        return loss(*zs)


def _three_times(loss: Loss, z1: Tensor, z2: Tensor, z1_t: Tensor, z2_t: Tensor) -> Tensor:
    distilled = loss(z1, z1_t) + loss(z2, z2_t)
    return ALPHA * loss(z1, z2) + (1 - ALPHA) / 2 * distilled


# --- measuring -----------------------------------------------------------------------------------


def measure(
    n: int,
    d: int,
    methods: dict[str, Loss],
    device: torch.device,
    dtype: torch.dtype,
    speed: dict[str, float],
    options: argparse.Namespace,
) -> list[dict[str, Any]]:
    """The figures of every method at one shape."""
    torch.manual_seed(0)
    zs = [torch.randn(n, d, device=device).to(dtype) for _ in range(4)]
    zs[1] += 0.7 * zs[0]
    for z in zs[:2]:
        z.requires_grad_()
    gram, direct = 12 * n**2 * d, 14 * n * d**2
    moved = 6 * zs[0].nbytes
    floor = 1e3 * max(min(gram, direct) / speed["flop_per_s"], moved / speed["bytes_per_s"])
    print(f"N = {n}, D = {d}: floor {floor:.3f} ms")
    rows: list[dict[str, Any]] = []
    for name, loss in methods.items():
        if not name.startswith("ours") and direct > options.max_flop:
            continue
        torch.compiler.reset()

        def step(loss: Loss = loss) -> None:
            torch.autograd.grad(loss(*zs), zs[:2])

        time = time_ms(step, device, seconds=options.seconds)
        flop = gram if name.startswith("ours") and n <= d else direct
        row = {
            "n": n,
            "d": d,
            "method": name,
            "ms": time,
            "peak_bytes": peak_bytes(step, device),
            "flop": flop,
            "flop_per_s": flop / time["p50"] * 1e3,
            "bytes": moved,
            "bytes_per_s": moved / time["p50"] * 1e3,
            "floor_ms": floor,
        }
        if device.type == "cuda":
            row["graph_ms"] = time_ms(step, device, seconds=options.seconds, graph=True)
        rows.append(row)
        ours = rows[0]
        row["ours_is_times_faster"] = time["p50"] / ours["ms"]["p50"]
        row["ours_takes_memory"] = ours["peak_bytes"] / row["peak_bytes"]
        print(
            f"  {name:10} {time['p50']:10.3f} ms ({time['p20']:.3f} .. {time['p80']:.3f})"
            + (f"  graph {row['graph_ms']['p50']:8.3f} ms" if "graph_ms" in row else "")
            + f"  {row['peak_bytes'] / 2**20:9.1f} MiB  {row['flop_per_s'] / 1e9:9,.0f} GFLOP/s"
            f"  ours {row['ours_is_times_faster']:.1f} times as fast",
            flush=True,
        )
    return rows


def plot(result: dict[str, Any], path: Path) -> None:
    """Time over D, one line a method, one panel for each N."""
    from matplotlib.figure import Figure

    rows = result["rows"]
    sizes = sorted({row["n"] for row in rows})
    figure = Figure(figsize=(3.4 * len(sizes) + 0.6, 3.6), layout="constrained")
    panels = figure.subplots(1, len(sizes), squeeze=False, sharey=True)[0]
    key = "graph_ms" if "graph_ms" in rows[0] else "ms"
    for panel, n in zip(panels, sizes, strict=True):
        here = [row for row in rows if row["n"] == n]
        for method in dict.fromkeys(row["method"] for row in rows):
            points = [(row["d"], row[key]["p50"]) for row in here if row["method"] == method]
            if points:
                panel.plot(*zip(*points, strict=True), marker="o", markersize=4, label=method)
        floor = sorted({(row["d"], row["floor_ms"]) for row in here})
        panel.plot(*zip(*floor, strict=True), "k:", label="floor")
        panel.set(title=f"N = {n}", xlabel="D", xscale="log", yscale="log")
        ticks = sorted({row["d"] for row in rows})
        panel.set_xticks(ticks, [str(d) for d in ticks])
        panel.minorticks_off()
        panel.grid(alpha=0.3)
    panels[0].set_ylabel("forward and backward, ms")
    panels[-1].legend(fontsize=8)
    figure.suptitle(f"{result['device']}, {result['dtype'].removeprefix('torch.')}", fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=130)


if __name__ == "__main__":
    main()
