"""A step by other plans of the encoder's passes, beside one by plan ``eager``, on the CPU.

    python benchmarks/bench_plans.py --encoder mobilenetv1_100 resnet18 --size 64 --json a.json

Both make the same steps of preset ``demo``, on random views, in one process with one thread, one
step of each in turn. Times are the processor's, and the ratio is the median of the pairs': so it
holds on a busy machine too, but for what other processes do to caches.
"""

from __future__ import annotations

import argparse
import gc
import time
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from sacl_fast.bench.figures import write_json
from sacl_fast.bench.waterfall import prepared
from sacl_fast.config import EncoderConfig
from sacl_fast.config.choices import Plan
from sacl_fast.engine.ceilings import percentiles
from sacl_fast.engine.step import TrainingStep
from sacl_fast.presets import get_preset

ENCODERS = (
    *("mobilenetv1_100", "mobilenetv3_small_100", "mobilenetv3_large_100", "efficientnet_b0"),
    *("mnasnet_100", "ghostnet_100", "mobilevit_s", "convnext_atto", "resnet18", "resnet50"),
)
_WARM_UP = 6  # passes are recorded in the first ones


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--encoder", nargs="+", default=ENCODERS)
    parser.add_argument("--plan", nargs="+", choices=get_args(Plan), default=["dense+skip"])
    parser.add_argument("--size", type=int, default=64, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--pairs", type=int, default=9, help="of steps")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    torch.set_num_threads(1)
    rows: list[dict[str, Any]] = []
    for encoder in options.encoder:
        for plan in options.plan:
            ratio = paired(encoder, plan, options.size, options.batch, options.pairs)
            rows.append({"encoder": encoder, "plan": plan, "eager_of_plan": ratio})
            print(f"{encoder:24} {plan:12} {ratio['p50']:.2f}x the steps of eager", flush=True)
            if options.json:
                sizes = {"image_size": options.size, "batch_size": options.batch}
                result = {"benchmark": "bench_plans", **sizes, "pairs": options.pairs, "rows": rows}
                write_json(options.json, result)


def paired(encoder: str, plan: Plan, size: int, batch: int, pairs: int) -> dict[str, float]:
    """The time of a step by plan ``eager``, as a multiple of one by ``plan``."""
    eager, other = made(encoder, "eager", size, batch), made(encoder, plan, size, batch)
    ratios = [seconds(*eager, i) / seconds(*other, i) for i in range(_WARM_UP + pairs)]
    del eager, other
    gc.collect()
    return percentiles(ratios[_WARM_UP:])


def made(encoder: str, plan: Plan, size: int, batch: int) -> tuple[TrainingStep, Tensor, Tensor]:
    config = get_preset("demo")
    return prepared(
        replace(
            config,
            device="cpu",
            batch_size=batch,
            views=replace(config.views, size=size),
            encoder=EncoderConfig(name=encoder),
            engine=replace(config.engine, plan=plan),
        )
    )


def seconds(step: TrainingStep, view_a: Tensor, view_b: Tensor, i: int) -> float:
    start = time.process_time()
    step(view_a, view_b, i)
    return time.process_time() - start


if __name__ == "__main__":
    main()
