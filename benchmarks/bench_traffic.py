"""How many values the operators of a training step read and write, by plan of its slim passes.

    python benchmarks/bench_traffic.py --encoder mobilenetv1_100 --ratio 0.5 --json a.json

No GPU is needed and no time is taken: a dispatch mode counts, on the CPU, the step's operators
(four passes, loss, backward, update) and what each is given and gives (``engine/traffic.py``).

What grows with the batch is activations. So two small batches are counted, at the full image size,
and the difference is what a sample costs: weights, statistics and lists of channels drop out. It is
given in units of Y, the values of all convolution outputs of one dense pass, and in GB in half
precision. ``launches`` are the operators that are not free.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sacl_fast.bench.figures import write_json
from sacl_fast.cli import parse_config
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep
from sacl_fast.engine.traffic import Traffic
from sacl_fast.passes import Passes

PLANS = {
    "eager+mask": Passes("mask"),
    "eager+skip": Passes("skip", recorded=True),
    "dense+mask": Passes("mask", dense="recorded"),
    "dense+skip": Passes("skip", dense="recorded", recorded=True, fused="around"),
    "fused": Passes("skip", dense="recorded", recorded=True, fused="all"),
}
_SMALL = 2, 4  # samples
_WARM_UP = 3  # steps, in which slim passes are recorded


def convolution_outputs(encoder: nn.Module, size: int) -> int:
    """Y for one sample."""
    found = 0

    def add(_: nn.Module, __: Any, out: Tensor) -> None:
        nonlocal found
        found += out.numel()

    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    hooks = [m.register_forward_hook(add) for m in convolutions]
    training = encoder.training
    with torch.no_grad():
        encoder.eval()(torch.zeros(1, 3, size, size))
    encoder.train(training)
    for hook in hooks:
        hook.remove()
    return found


def measure(name: str, ratio: float, plan: str, *, size: int, batch: int) -> dict[str, Any]:
    options = {"encoder.name": name, "views.size": size, "slim.ratio": ratio, "device": "cpu"}
    given = [f"--{key}={value}" for key, value in options.items()]
    config = parse_config("train", ["imagenet100", *given])
    torch.manual_seed(0)
    method = build_method(config, PLANS[plan])
    y = convolution_outputs(method.slicer.encoder, size)
    step = TrainingStep(method, config, Ranks(0, 1, torch.device("cpu")), steps_per_epoch=100)
    counted = []
    for samples in _SMALL:
        images = torch.randn(2, samples, 3, size, size)
        a, b = (v.contiguous(memory_format=torch.channels_last) for v in images)
        for number in range(_WARM_UP):
            step(a, b, number)
        with Traffic() as traffic:
            step(a, b, _WARM_UP)
        counted.append(traffic)
    small, large = counted
    per_sample = {
        op: (n - small.values[op]) / (_SMALL[1] - _SMALL[0]) for op, n in large.values.items()
    }
    total = sum(per_sample.values())
    most = sorted(per_sample.items(), key=lambda item: -item[1])[:10]
    return {
        "encoder": name,
        "ratio": ratio,
        "plan": plan,
        "operators": large.operators,
        "launches": large.launches,
        "in_y": round(total / y, 2),
        "gbytes": round(2 * batch * total / 1e9, 2),
        "y_gbytes": round(2 * batch * y / 1e9, 3),
        "most": {op: round(n / y, 2) for op, n in most},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--encoder", nargs="+", default=["mobilenetv1_100"])
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=256, help="that the GB are of")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    print(f"{'encoder':22} {'plan':15} {'operators':>9} {'launches':>8} {'Y':>6} {'GB':>7}")
    rows = []
    for name in options.encoder:
        for plan in options.plan:
            row = measure(name, options.ratio, plan, size=options.size, batch=options.batch)
            rows.append(row)
            print(
                f"{name:22} {plan:15} {row['operators']:9} {row['launches']:8}"
                f" {row['in_y']:6.1f} {row['gbytes']:7.1f}",
                flush=True,
            )
    if options.json:
        result = {"benchmark": "bench_traffic", "size": options.size, "batch": options.batch}
        write_json(options.json, {**result, "rows": rows})


if __name__ == "__main__":
    main()
