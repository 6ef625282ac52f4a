"""``--dry-run``: what a configuration comes to, without training.

FLOPs are counted by running the encoder once; memory is estimated from steps of a few images
(``memory_use``); time is that of steps on random images, here, for some seconds.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace

import torch
import yaml
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from sacl_fast.checks import counted
from sacl_fast.config import Config, to_dict
from sacl_fast.data.images.open import open_sources
from sacl_fast.engine.distributed import device_name, pick_device
from sacl_fast.engine.launch import read_launch
from sacl_fast.engine.measure import time_step
from sacl_fast.engine.memory_use import STEPS_PER_EPOCH, Forecast, forecast, memory_here
from sacl_fast.engine.method import SaclXd, build_method
from sacl_fast.engine.outlook import spoken
from sacl_fast.engine.preflight import check_run, remarks
from sacl_fast.errors import UserError
from sacl_fast.passes import Passes

_GIB = 2**30
_TIMED = 10.0  # seconds in which steps are timed
_RUNTIME = _GIB // 2  # of Python's libraries, or of CUDA


def print_dry_run(config: Config) -> None:
    """Print the resolved configuration, sizes, FLOPs, and estimates of memory and time."""
    check_run(config)
    world_size = read_launch().world_size
    method = build_method(config, Passes())
    encoder_parameters = _count(method.encoder)
    projector_parameters = _count(method.projector)
    forward = _forward_flops(method, config.views.size)
    # A pass with gradient is a forward and a backward of twice its cost.
    passes = 2 * 3 + (2 if method.distill else 0)
    kept = sum(int(mask.sum()) for mask in method.slicer.masks.values())
    filters = sum(len(mask) for mask in method.slicer.masks.values())

    print(yaml.safe_dump(to_dict(config), sort_keys=False))
    print(f"encoder     {encoder_parameters / 1e6:.2f} M parameters")
    print(f"projector   {projector_parameters / 1e6:.2f} M parameters")
    print(
        f"slim        {kept:,} of {filters:,} filters in "
        f"{counted(len(method.slicer.masks), 'convolution')}"
    )
    print(f"forward     {forward / 1e9:.3f} GFLOP an image (a multiplication and addition: 2)")
    step = passes * forward * config.batch_size
    print(
        f"step        {step / 1e12:.2f} TFLOP for {counted(config.batch_size, 'image')} "
        f"({passes} forwards)"
    )
    del method  # which the estimate makes once more
    why_not, images, steps = "", 0, STEPS_PER_EPOCH
    try:
        images = len(open_sources(config.data, config.seed, download=False).train)
        steps = images // config.batch_size
    except UserError as error:
        why_not = str(error)
    for name, text in _memory(config, world_size, max(1, steps)):
        print(f"{name:<11} {text}")
    seconds = _time_of_a_step(config, world_size, max(1, steps))
    if why_not:
        print(f"data        not available: {why_not}")
    else:
        whole = steps * config.epochs
        print(
            f"data        {counted(images, 'image')}, {counted(steps, 'step')} an epoch, "
            f"{whole:,} in all"
        )
        if seconds is not None and whole:
            print(
                f"time        about {spoken(whole * seconds)} for "
                f"{counted(config.epochs, 'epoch')}, where "
                "images are loaded as fast (doctor --measure says whether), and evaluations besides"
            )
        for sentence in remarks(config, images):
            print(f"warning     {sentence}")


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def _forward_flops(method: SaclXd, size: int) -> int:
    """FLOPs of encoder and projector on one image."""
    counter = FlopCounterMode(display=False)
    trained = [p for p in method.parameters() if p.requires_grad]
    # Without gradient: the counter asks for the history of what goes from module to module, and a
    # parameter that does (a class token) has none.
    method.eval().requires_grad_(False)
    with counter, torch.no_grad():
        method.dense(torch.zeros(1, 3, size, size))
    method.train()
    for parameter in trained:
        parameter.requires_grad_()
    return counter.get_total_flops()


def _time_of_a_step(config: Config, world_size: int, per_epoch: int) -> float | None:
    """Time one on random images and say so; in seconds, None where it cannot be timed here."""
    share = config.batch_size // world_size
    try:
        seconds, timed = time_step(config, share, seconds=_TIMED, per_epoch=per_epoch)
    except UserError as error:
        print(f"time        not measured: {error}")
        return None
    each = "" if world_size == 1 else f" in one of {world_size} processes, without what is sent"
    how = f"timed on {counted(timed, 'random image')}{each}" + (
        "" if timed == share else ", the rest estimated"
    )
    rate = config.batch_size / seconds
    print(f"time        {seconds:.3g} s a step, {rate:,.0f} images/s, {how}")
    return seconds


def _memory(config: Config, world_size: int, per_epoch: int) -> Iterator[tuple[str, str]]:
    """What a step will take in a process, what there is, and what would fit where that does not."""
    device = pick_device(config.device)
    expected = forecast(config, device, world_size, steps_per_epoch=per_epoch)
    images, parts = config.batch_size // world_size, config.engine.accumulate
    peak, (total, free) = expected.peak(images, parts), memory_here(device)
    yield (
        "memory",
        f"{peak / _GIB:.2f} GiB per process, estimated: {expected.state / _GIB:.2f} weights, "
        f"gradients and optimiser, {(peak - expected.state) / _GIB:.2f} activations and batches, "
        f"plan {expected.plan}",
    )
    name = "this machine" if device.type == "cpu" else device_name(device)
    yield "", f"of {total / _GIB:.1f} GiB of {name}, {free / _GIB:.1f} free now"
    # On one machine, processes share its memory; each GPU has its own.
    sharing = world_size if device.type == "cpu" else 1
    room = free // sharing - _RUNTIME
    if peak > room:
        ways = ", or ".join(_ways_to_fit(config, expected, world_size, room, per_epoch))
        says = f"; {ways} would fit" if ways else ", nor would less of a batch"
        yield "warning", f"a step will not fit into {room / _GIB:.1f} GiB{says}"


def _ways_to_fit(
    config: Config, expected: Forecast, world_size: int, room: int, per_epoch: int
) -> Iterator[str]:
    images, parts = config.batch_size // world_size, config.engine.accumulate
    more = (n for n in range(parts + 1, images // 2 + 1) if images % n == 0)
    if n := next((n for n in more if expected.peak(images, n) <= room), None):
        yield f"--engine.accumulate {n}"
    if not config.engine.activation_checkpointing:
        engine = replace(config.engine, activation_checkpointing=True)
        with suppress(UserError):  # an encoder or a plan that cannot
            own = forecast(
                replace(config, engine=engine),
                pick_device(config.device),
                world_size,
                steps_per_epoch=per_epoch,
            )
            if own.peak(images, parts) <= room:
                yield "--engine.activation-checkpointing"
    fewer = (images // 2**k // parts * parts for k in range(1, images.bit_length()))
    if n := next((n for n in fewer if n >= 2 * parts and expected.peak(n, parts) <= room), None):
        yield f"--batch-size {n * world_size}"
