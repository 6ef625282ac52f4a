"""``sacl-fast doctor --measure``: a preset's step on this machine, measured for half a minute.

The step computes random views; the loader makes real ones beside it, at last for it. Nothing is
written. What the figures mean stands in ``verdict.py``.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import count
from typing import TypeVar, get_args

import torch

from sacl_fast.checks import counted
from sacl_fast.config import Config
from sacl_fast.config.choices import Plan
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.images.source import Source, as_packed
from sacl_fast.data.loading.batch import Batch
from sacl_fast.data.loading.open import dali_obstacle, open_view_loader, resolve_loader
from sacl_fast.data.loading.workers import worker_count
from sacl_fast.engine.ceilings import (
    copy_bandwidth,
    launch_cost,
    machine_load,
    percentiles,
    product_rate,
)
from sacl_fast.engine.clock import Clock
from sacl_fast.engine.convolutions import tried_algorithms
from sacl_fast.engine.distributed import Ranks, device_name, pick_device
from sacl_fast.engine.memory import keep_freed_memory
from sacl_fast.engine.method import build_method, build_networks
from sacl_fast.engine.plan import random_views, take_plan, why_not_tried
from sacl_fast.engine.preflight import check_run
from sacl_fast.engine.profiling import profiled, synchronize
from sacl_fast.engine.step import TrainingStep
from sacl_fast.engine.trace import Figures
from sacl_fast.engine.traffic import Traffic
from sacl_fast.errors import UserError
from sacl_fast.passes import Passes, choose_passes, passes_of

logger = logging.getLogger(__name__)

T = TypeVar("T")

_STEP = 0.5
"""Seconds that a measured step takes at most; a slow machine is given fewer images."""
_WARM_UP = 6  # steps, in which passes are recorded and the step is captured as a CUDA graph
_FEW = 2  # images of a step that is all but empty
_SOME = 16  # images, of which it is told how long more take
_GROWTH = 4  # of the images that a step is timed on
_PROFILED = 3  # steps
_PER_EPOCH = 1000  # steps of an epoch that is never trained
_LIMITS = 0.4  # seconds for each of the device's rates


@dataclass(frozen=True)
class Rates:
    """What the device did at best."""

    copy: float
    """Bytes a second of a large copy."""
    product: float
    """FLOP a second of a large product."""
    launch: float
    """Seconds of the host for the smallest operator."""


@dataclass(frozen=True)
class Data:
    """How fast batches come. Rates are in images a second."""

    alone: float
    """With nothing else to do."""
    training: float
    """Of steps on its batches."""
    wait: float
    """The share of that time in which the device waited for a batch."""
    loader: str
    images: str
    """What was read."""
    workers: int
    """Processes or threads that were asked for; below 0: as many as suit."""
    setting: str
    """Which setting says so."""
    faster: str = ""
    """Why a faster loader is not used, where there is one."""


@dataclass(frozen=True)
class Measured:
    """A step's figures; times in milliseconds."""

    config: Config
    """As measured: with a smaller batch where the step takes long."""
    asked: int
    """The batch size that was asked for."""
    device: str
    dtype: str
    plan: Plan
    step: float
    few: float
    """Of a step on ``few_images`` images."""
    few_images: int
    figures: Figures
    bytes: int
    flops: int
    launches: int
    captured: bool
    """Whether they are all in one CUDA graph, but where they were counted."""
    rates: Rates
    plans: dict[Plan, float]
    """Other plans that were tried, a step of each."""
    data: Data
    load: float = 0.0
    """Processes that ran or waited for a core, on average over the minute before."""

    @property
    def step_as_asked(self) -> float:
        """Of a step on the batch that was asked for, estimated where that is a larger one."""
        own, few = self.config.batch_size, self.few_images
        each = max(0.0, self.step - self.few) / max(1, own - few)
        return self.step + each * (self.asked - own)


def measure(config: Config, *, seconds: float = 25.0) -> Measured:
    """Measure a step of a configuration, for about so long after it is built.

    Raises:
        UserError: it cannot be built here, or not even a small batch fits into memory.
    """
    check_run(config)
    ranks = Ranks(0, 1, pick_device(config.device))
    if ranks.device.type == "cpu":
        keep_freed_memory()
    with tried_algorithms(ranks.device):
        return _measure(config, ranks, seconds)


def _measure(config: Config, ranks: Ranks, seconds: float) -> Measured:
    load = machine_load()
    step = _build(config, ranks)
    asked, (config, _) = config.batch_size, fitting(config, step, _STEP)
    whole = _steps(step, config, config.batch_size, seconds=seconds / 5, warm_up=0)
    few_images = min(_FEW * config.engine.accumulate, config.batch_size)
    few = _steps(step, config, few_images, seconds=seconds / 25)
    figures, traffic = _looked_into(config, step)
    return Measured(
        config=config,
        asked=asked,
        device=_name(ranks.device),
        dtype=str(step.amp_dtype or torch.float32).removeprefix("torch."),
        plan=step.method.passes.plan,
        step=whole,
        few=few,
        few_images=few_images,
        figures=figures,
        bytes=traffic.bytes,
        flops=_flops(config, step) * config.batch_size,
        launches=round(figures.launches) if figures.on_gpu else traffic.launches,
        captured=step.graph is not None and step.graph.replays > 0,
        rates=Rates(
            copy_bandwidth(ranks.device, seconds=_LIMITS),
            product_rate(ranks.device, step.amp_dtype or torch.float32, seconds=_LIMITS),
            launch_cost(ranks.device),
        ),
        data=_data(config, step, seconds=seconds / 5),
        plans=_other_plans(config, step, seconds=seconds / 3),
        load=load,
    )


def time_step(
    config: Config, images: int, *, seconds: float, per_epoch: int = _PER_EPOCH
) -> tuple[float, int]:
    """Seconds of a step of one process on so many random images, and on how many it was timed:
    fewer where there is no time for more, but always on two numbers of images, since what a step
    takes for none does not grow. It takes about ``seconds`` once it is built.

    Raises:
        UserError: it cannot be built here, or does not fit into memory.
    """
    ranks = Ranks(0, 1, pick_device(config.device))
    if ranks.device.type == "cpu":
        keep_freed_memory()

    def timed(count: int) -> float:
        """Seconds of the quickest of some steps, after which passes are recorded."""
        views = random_views(config, ranks.device, count)
        times: list[float] = []
        while not times or (len(times) < _WARM_UP + 2 and time.perf_counter() < end):
            begin = time.perf_counter()
            step(*views, 0)
            synchronize(ranks.device)
            times.append(time.perf_counter() - begin)
        return min(times)

    parts = config.engine.accumulate
    with tried_algorithms(ranks.device):
        step = _build(replace(config, batch_size=images), ranks, per_epoch)
        end = time.perf_counter() + seconds
        few = many = min(_FEW * parts, images)
        try:
            of_few = of_many = timed(few)
            while many < images:
                more = min(images, _GROWTH * many)
                at_most = 3 * of_many * more / many  # an image less where there are more
                if many > few and time.perf_counter() + at_most > end:
                    break
                many, of_many = more, timed(more)
        except torch.OutOfMemoryError:
            raise UserError(
                f"a step of {images} images does not fit into the GPU's memory"
            ) from None
    each = max(0.0, of_many - of_few) / (many - few) if many > few else of_many / many
    return of_many + each * (images - many), many


# --- the step -------------------------------------------------------------------------------------


def _build(config: Config, ranks: Ranks, per_epoch: int = _PER_EPOCH) -> TrainingStep:
    torch.manual_seed(config.seed)
    networks = build_networks(config)
    passes = choose_passes(
        config, ranks.device, steps_per_epoch=per_epoch, encoder=networks.encoder
    )
    method = build_method(config, passes, networks)
    step = TrainingStep(method, config, ranks, steps_per_epoch=per_epoch)
    take_plan(config, step, None)
    return step


def fitting(config: Config, step: TrainingStep, seconds: float) -> tuple[Config, float]:
    """With the batch halved until its step fits into memory and takes no longer than that; and the
    milliseconds of that step."""

    def milliseconds(images: int) -> float | None:
        try:
            return _steps(step, config, images, seconds=0)
        except torch.OutOfMemoryError:
            step.optimizer.zero_grad()
            torch.cuda.empty_cache()
            return None

    parts = config.engine.accumulate  # of as many images each
    batch, least = config.batch_size // parts, min(_FEW, config.batch_size // parts)
    some = min(batch, max(least, _SOME // parts))
    if (few := milliseconds(parts * least)) is None:
        raise UserError(f"a step of {parts * least} images does not fit into the GPU's memory")
    while (time_of_some := milliseconds(parts * some)) is None:
        batch = some = some // 2
    each = max(0.0, time_of_some - few) / max(1, some - least)
    while batch > 2 * least and few + each * batch > 1e3 * seconds:
        batch //= 2
    while (time_of_all := milliseconds(parts * batch)) is None:
        batch //= 2
    return replace(config, batch_size=parts * batch), time_of_all


def _looked_into(config: Config, step: TrainingStep) -> tuple[Figures, Traffic]:
    """Of the step by its parts, that is without a CUDA graph."""
    views = random_views(config, step.device, config.batch_size)

    def some_steps() -> None:
        for _ in range(_PROFILED):
            step.compute(*views)

    step.compute(*views)
    figures = profiled(some_steps, _PROFILED, step.device)
    with Traffic() as traffic:
        step.compute(*views)
    return figures, traffic


def _steps(
    step: TrainingStep, config: Config, images: int, *, seconds: float, warm_up: int = _WARM_UP
) -> float:
    """Milliseconds of a step, the median, after some that settle it, on a CPU fewer slow ones."""
    views = random_views(config, step.device, images)
    stop = time.perf_counter() + max(seconds, _STEP)
    for _ in range(warm_up):
        step(*views, 0)
        if step.device.type == "cpu" and time.perf_counter() > stop:
            break
    synchronize(step.device)
    together = 5 if step.device.type == "cuda" else 1  # steps that nobody waits between
    stop, times = time.perf_counter() + seconds, []
    while not times or time.perf_counter() < stop:
        start = time.perf_counter()
        for _ in range(together):
            step(*views, 0)
        synchronize(step.device)
        times.append(1e3 * (time.perf_counter() - start) / together)
    return percentiles(times)["p50"]


def _other_plans(config: Config, step: TrainingStep, *, seconds: float) -> dict[Plan, float]:
    """A step by each plan that is possible, while there is time."""
    method, start = step.method, time.perf_counter()
    own = method.passes
    found: dict[Plan, float] = {}
    plans: tuple[Plan, ...] = get_args(Plan)
    for plan in plans:
        left = seconds - (time.perf_counter() - start)
        if plan == own.plan or why_not_tried(plan, config, step.device) or left < 0:
            continue
        method.run_by(passes_of(plan, config, step.device, steps_per_epoch=_PER_EPOCH))
        try:
            found[plan] = _steps(step, config, config.batch_size, seconds=min(left / 3, 2.0))
        except (RuntimeError, NotImplementedError):  # of its kernels: the plan is left out
            logger.debug("plan %s", plan, exc_info=True)
    method.run_by(own)
    return found


def _flops(config: Config, step: TrainingStep) -> int:
    """Of a step, for one image, if slim passes compute the kept filters only where they skip."""
    method = build_method(config, Passes(step.method.passes.mode, backend="torch"))
    views = (torch.randn(_FEW, 3, config.views.size, config.views.size) for _ in range(2))
    with Traffic() as traffic:
        embeddings = method(*views)
        (embeddings.z1.sum() + embeddings.z2.sum()).backward()
    return traffic.flops // _FEW


def _name(device: torch.device) -> str:
    if device.type != "cpu":
        return device_name(device)
    return f"CPU, {torch.get_num_threads()} of {counted(worker_count(-1), 'core')}"


# --- data -----------------------------------------------------------------------------------------


def _data(config: Config, step: TrainingStep, *, seconds: float) -> Data:
    source, images, config = _images(config)
    loader = open_view_loader(source, config, device=step.device)
    try:
        batches = (batch for epoch in count() for batch in loader.epoch(epoch))
        alone = _rate(batches, config, step.device, seconds, lambda batch: None)
        training = _rate(
            batches, config, step.device, seconds, lambda batch: step(batch.view_a, batch.view_b, 0)
        )
    finally:
        loader.close()
    packed = as_packed(source) is not None
    name = resolve_loader(config, step.device, packed=packed).loader
    by_dali = name == "dali"
    return Data(
        alone["images_per_second"],
        training["images_per_second"],
        training["data_wait"],
        loader=name,
        images=images,
        workers=config.data.dali.threads if by_dali else config.data.workers,
        setting="data.dali.threads" if by_dali else "data.workers",
        faster="" if by_dali or name == "compiled" else dali_obstacle() or "",
    )


def _images(config: Config) -> tuple[Source, str, Config]:
    """The training images, or the demo's where they are not there, and what was taken."""
    try:
        train = open_sources(config.data, config.seed, download=False).train
        if len(train) >= config.batch_size:
            return train, f"{counted(len(train), 'image')} of {config.data.source}", config
        why = f"{counted(len(train), 'training image')} make no batch"
    except UserError as error:
        why = str(error)
    data = replace(config.data, source="demo", root=None, labels="auto", limit=0)
    demo = replace(config, data=data)
    train = open_sources(demo.data, demo.seed).train
    return train, f"images of the demo, 32 px and in memory, since {why}", demo


def _rate(
    batches: Iterator[Batch],
    config: Config,
    device: torch.device,
    seconds: float,
    use: Callable[[Batch], object],
) -> dict[str, float]:
    """See ``Clock.read``; what was prepared before is used up first."""
    for _ in range(_WARM_UP):
        use(next(batches))
    synchronize(device)
    clock = Clock(config.batch_size, device)
    stop = time.perf_counter() + seconds
    for batch in clock.waiting(batches):
        use(batch)
        if time.perf_counter() > stop:
            break
    synchronize(device)
    return clock.read()
