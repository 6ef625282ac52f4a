"""What accumulation and activation checkpointing save of a step's memory, and what they cost.

    python benchmarks/bench_memory.py --encoder mobilenetv1_100 --size 112 --batch 32 --json a.json

On the CPU, each setting in a process of its own: ``measured`` is the process's peak resident set
in a few steps, less what it has with the model and a batch; ``estimated`` is what ``--dry-run``
says, less the same. MiB both. Times are the process's own, in seconds a step.
``deterministic`` is the first setting under ``--deterministic``.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import resource
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from sacl_fast.bench.figures import write_json
from sacl_fast.config import Config, EncoderConfig, EngineConfig
from sacl_fast.engine.determinism import deterministic
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.memory import keep_freed_memory
from sacl_fast.engine.memory_use import forecast
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep
from sacl_fast.passes import choose_passes
from sacl_fast.presets import get_preset

SETTINGS = {
    "plain": EngineConfig(),
    "accumulate 2": EngineConfig(accumulate=2),
    "accumulate 4": EngineConfig(accumulate=4),
    "checkpointing": EngineConfig(activation_checkpointing=True),
    "both": EngineConfig(accumulate=4, activation_checkpointing=True),
    "deterministic": EngineConfig(),
}
_WARM_UP, _TIMED = 3, 3
_CPU = torch.device("cpu")


def configured(encoder: str, size: int, batch: int, setting: str) -> Config:
    config = get_preset("demo")
    return replace(
        config,
        device="cpu",
        batch_size=batch,
        deterministic=setting == "deterministic",
        views=replace(config.views, size=size),
        encoder=EncoderConfig(name=encoder),
        engine=replace(SETTINGS[setting], plan="eager"),
    )


def measure(config: Config) -> dict[str, float]:
    """MiB and seconds of a step, in this process."""
    with deterministic(config.deterministic):
        method = build_method(config, choose_passes(config, _CPU, steps_per_epoch=100))
        step = TrainingStep(method, config, Ranks(0, 1, _CPU), steps_per_epoch=100)
        size = config.views.size
        a, b = (
            view.contiguous(memory_format=torch.channels_last)
            for view in torch.randn(2, config.batch_size, 3, size, size)
        )
        ctypes.CDLL(None).malloc_trim(0)
        keep_freed_memory()
        pages = int(Path("/proc/self/statm").read_text().split()[1])
        before = pages * resource.getpagesize() // 1024
        for i in range(_WARM_UP):
            step(a, b, i)
        start = time.process_time()
        for i in range(_TIMED):
            step(a, b, _WARM_UP + i)
        seconds = (time.process_time() - start) / _TIMED
        after = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"measured": round((after - before) / 1024), "seconds": round(seconds, 2)}


def estimated(config: Config) -> int:
    """MiB that a step will take, besides the weights and the batch."""
    expected = forecast(config, _CPU)
    weights = expected.state // 3  # and gradients, and momentum
    there = weights + config.batch_size * expected.image
    return round((expected.peak(config.batch_size, config.engine.accumulate) - there) / 2**20)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--encoder", nargs="+", default=["mobilenetv1_100"])
    parser.add_argument("--setting", nargs="+", choices=SETTINGS, default=list(SETTINGS))
    parser.add_argument("--size", type=int, default=112, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--json", type=Path, help="write the figures here")
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.alone:
        (encoder,), (setting,) = options.encoder, options.setting
        print(json.dumps(measure(configured(encoder, options.size, options.batch, setting))))
        return
    rows: list[dict[str, Any]] = []
    for encoder in options.encoder:
        for setting in options.setting:
            own = ["--alone", "--encoder", encoder, "--setting", setting]
            sizes = ["--size", str(options.size), "--batch", str(options.batch)]
            done = subprocess.run(
                [sys.executable, __file__, *own, *sizes], capture_output=True, text=True, check=True
            )
            config = configured(encoder, options.size, options.batch, setting)
            row = {"encoder": encoder, "setting": setting, "estimated": estimated(config)}
            rows.append(row | json.loads(done.stdout))
            print(rows[-1], flush=True)
    if options.json:
        sizes = {"size": options.size, "batch": options.batch}
        write_json(options.json, {"benchmark": "bench_memory", **sizes, "rows": rows})


if __name__ == "__main__":
    main()
