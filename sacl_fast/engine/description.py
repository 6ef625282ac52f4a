"""What a run says of itself before the first step: its sizes, its device, what runs and why."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from sacl_fast.checks import counted
from sacl_fast.config import Config
from sacl_fast.engine.distributed import Ranks, device_name
from sacl_fast.engine.step import TrainingStep
from sacl_fast.ops.backend import SLIM_OPERATORS, Resolution
from sacl_fast.precision import precision_reason


def describe(
    config: Config, ranks: Ranks, step: TrainingStep, steps_per_epoch: int
) -> Iterator[str]:
    """Lines for a person; only of what this run uses."""
    method, device = step.method, ranks.device
    parameters = sum(p.numel() for p in method.encoder.parameters())
    name = device_name(device)
    processes = f" x {ranks.world_size} processes" if ranks.world_size > 1 else ""
    dtype = str(step.amp_dtype or torch.float32).removeprefix("torch.")
    yield f"{counted(steps_per_epoch, 'step')} an epoch, batches of {config.batch_size} images"
    if (parts := config.engine.accumulate) > 1:
        each = config.batch_size // parts
        yield (
            f"gradients: the mean of {parts} parts of {each} images, whose batch norms and "
            f"correlations are each part's own; running statistics move {parts} times a step"
        )
    yield (
        f"{config.encoder.name} x {config.encoder.width:g}, {parameters / 1e6:.2f} M "
        f"parameters, slim ratio {config.slim.ratio:g}, {dtype} on {name}{processes}"
    )
    if reason := precision_reason(config.precision, device):
        yield reason
    if config.deterministic:
        yield "deterministic: nothing is chosen by time, and what has no fixed order is an error"
    elif device.type == "cuda":
        yield "convolutions: cuDNN takes the fastest of its algorithms, tried at the first steps"
    if step.graph is not None:
        yield "steps: captured as one CUDA graph once they have settled"
    gpus = torch.cuda.device_count() if device.type == "cuda" else 1
    if ranks.world_size == 1 and gpus > 1:
        yield (
            f"1 of {gpus} GPUs is used; torchrun --nproc-per-node {gpus} -m sacl_fast train ... "
            "uses all of them"
        )
    slim = config.slim.ratio < 1 and bool(method.slicer.kept)
    if config.slim.ratio < 1 and not slim:
        yield (
            f"{config.encoder.name} has no convolution to slim: slim passes leave nothing out, as "
            "with slim.ratio 1"
        )
    unused = {"augment", "draw_views"}  # the loader's, which has said so
    unused.update(() if config.optim.name == "lars" else ("lars",))
    unused.update(() if slim or method.passes.dense == "recorded" else SLIM_OPERATORS)
    operators: dict[Resolution, list[str]] = {}
    for op, resolution in step.backends.items():
        if op not in unused:
            operators.setdefault(resolution, []).append(op)
    for (backend, reason), names in operators.items():
        yield f"{', '.join(names)}: {backend} ({reason})"
    passes = method.passes
    if passes.plan != "eager":
        yield f"passes: {passes.plan} ({passes.reason})"
    elif slim:
        recorded = ", recorded" if passes.recorded else ""
        yield f"slim passes: {passes.mode}{recorded} ({passes.reason})"
    if slim and method.slicer.norm_gradient == "damped":
        requested = config.slim.norm_gradient == "damped"
        why = "as requested" if requested else "they would grow over several in a row"
        yield f"slim passes: gradients through norms of constant channels are damped ({why})"
