"""Which plan a run takes (``engine.plan auto``): on GPUs, the fastest of those that are right.

Every candidate computes a few steps on random views of the run's own shapes, before the first real
one; weights, running statistics and random numbers are put back afterwards. One whose embeddings or
gradients are further from those in float32 than rounding explains, or that fails, is left out, with
the reason in the log. The choice is remembered (``plans.json`` in the user's cache folder) for the
device, the versions and the shapes, and a run that is resumed keeps the plan of its checkpoint.

Ranks try the same plans at the same time, since passes wait for one another in the batch norms.
What decides is all ranks': an obstacle, an error or a wrong value of any, and the time of the
slowest. A plan first runs on each rank alone, where one that fails keeps no other waiting. One that
fails later, on all ranks, is left out; if it is not all, the others wait in it, and the run ends.
"""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, get_args

import torch
from torch import Tensor

from sacl_fast import _version
from sacl_fast.config import Config, to_dict
from sacl_fast.config.choices import Plan
from sacl_fast.encoders.batch_norm import local_batch_norm
from sacl_fast.engine.agreement import differ
from sacl_fast.engine.cuda_graph import StepGraph
from sacl_fast.engine.distributed import Ranks, is_of_a_lost_rank
from sacl_fast.engine.step import TrainingStep
from sacl_fast.errors import UserError
from sacl_fast.files import user_cache, whole_file
from sacl_fast.passes import Passes, passes_of, plan_obstacle
from sacl_fast.precision import autocast

logger = logging.getLogger(__name__)

_SECONDS = 30.0
_WARM_UP, _TIMED = 4, 5  # steps; passes are recorded in the first ones
_CHECKED = 64  # samples that results are compared on
_ROUNDING = 3.0  # times that of the eager passes
_FLOOR = 1e-3  # relative; of float32, where batch norms have few samples
_WITHOUT_TRIAL: dict[Plan, str] = {"compile": "it takes longer to compile than all others to try"}


@dataclass(frozen=True)
class Trial:
    """What came of a plan."""

    plan: Plan
    milliseconds: float | None
    """A step without its update; None if it is left out."""
    why_not: str = ""

    def __str__(self) -> str:
        if self.milliseconds is None:
            return f"{self.plan} not ({self.why_not})"
        return f"{self.plan} {self.milliseconds:.1f} ms"


def take_plan(config: Config, step: TrainingStep, resumed: Plan | None) -> None:
    """Where ``engine.plan`` is ``auto``: have the step's model run by the plan that it was resumed
    from; or on a GPU by the best one, unless nothing is to be chosen by time (``deterministic``).
    All ranks must ask, and take the same.

    Args:
        resumed: the plan of the checkpoint that the run goes on from; None where it starts.
    """
    if config.engine.plan != "auto" or config.deterministic:
        return
    if resumed is not None and not _obstacle_of_any(resumed, config, step):
        plan, reason = resumed, "as before it was resumed"
    elif _may_try(step):
        plan, reason = _fastest(config, step)
    else:
        return
    if plan == step.method.passes.plan and step.device.type == "cpu":
        return
    per_epoch = step.steps_per_epoch
    passes = passes_of(plan, config, step.device, steps_per_epoch=per_epoch, reason=reason)
    step.method.run_by(passes)


def _may_try(step: TrainingStep) -> bool:
    """On a CPU the same plan runs everywhere, so that the same run gives the same figures."""
    return step.device.type == "cuda"


def _fastest(config: Config, step: TrainingStep) -> tuple[Plan, str]:
    ranks = step.ranks
    key, known = _key(config, step), ranks.on_first(_remembered)
    found: Iterator[Plan] = (plan for plan in get_args(Plan) if plan == known.get(key))
    plan = next(found, None)
    if plan is not None and not _obstacle_of_any(plan, config, step):
        return plan, f"the fastest when it was tried here before; {_cache()} remembers"
    trials = try_plans(config, step)
    best = min((t for t in trials if t.milliseconds), key=lambda t: t.milliseconds or 0.0)
    if ranks.first:
        _remember({**known, key: best.plan})
    return best.plan, f"tried: {', '.join(map(str, trials))}"


def _obstacle_of_any(plan: Plan, config: Config, step: TrainingStep) -> str:
    return _of_any(step.ranks, plan_obstacle(plan, config, step.device))


def _of_any(ranks: Ranks, why_not: str | None) -> str:
    """What speaks against a plan on the first rank where something does, on every rank."""
    return next(filter(None, ranks.gather(why_not)), "")


# --- trying -----------------------------------------------------------------------------------


def try_plans(
    config: Config, step: TrainingStep, plans: tuple[Plan, ...] = get_args(Plan)
) -> list[Trial]:
    """Each plan's time for a step of the run's shapes, the first one's the reference.

    Raises:
        UserError: a plan failed on some ranks while others went on, or has left the GPU unusable.
    """
    method, trials, started, ranks = step.method, [], time.monotonic(), step.ranks
    own = method.passes
    exact = _results(step, config, _few_views(config, step), None)
    rounding: dict[str, float] = {}
    try:
        for plan in plans:
            spent = time.monotonic() - started
            if why_not := _of_any(ranks, why_not_tried(plan, config, step.device, spent)):
                trials.append(Trial(plan, None, why_not))
                continue
            passes = passes_of(plan, config, step.device, steps_per_epoch=step.steps_per_epoch)
            if rounding and ranks.world_size > 1:
                why_not = "it differs between ranks" if differ(passes, ranks) else ""
                if why_not := why_not or _of_any(ranks, _failure_alone(passes, step, config)):
                    trials.append(Trial(plan, None, why_not))
                    continue
            try:
                trials.append(_try(plan, passes, step, config, exact, rounding))
            except Exception as error:  # whatever a kernel meets here, training goes on without
                if not rounding or is_of_a_lost_rank(error):
                    raise  # the reference itself, or no fault of the plan's
                why_not = _failure(plan, error)
                if not ranks.all_fail(f"plan {plan}"):
                    raise UserError(
                        f"trying engine.plan {plan} failed on rank {ranks.rank} and not on all "
                        f"({why_not}); --engine.plan eager works"
                    ) from error
                trials.append(Trial(plan, None, why_not))
    finally:
        method.run_by(own)
        method.zero_grad(set_to_none=True)
    return trials


def _failure(plan: Plan, error: Exception) -> str:
    """What a trial ended in."""
    logger.debug("plan %s", plan, exc_info=error)
    first, *_ = str(error).splitlines() or [""]
    if first.startswith("CUDA error"):  # which no later call gets over
        raise UserError(
            f"trying engine.plan {plan} ended in '{first[:120]}', after which the GPU "
            "cannot be used in this process; --engine.plan eager works"
        ) from error
    return f"{type(error).__name__}: {first[:120]}"


def _failure_alone(passes: Passes, step: TrainingStep, config: Config) -> str:
    """How a plan's passes fail on this rank without collectives; empty where they do not."""
    method, views = step.method, random_views(config, step.device, _part(config, step.ranks))
    method.run_by(passes)
    gather, method.gather = method.gather, False
    try:
        with local_batch_norm(method), _kept_as_it_is(step):
            for _ in range(_WARM_UP):
                with autocast(step.device, step.amp_dtype):
                    embeddings = method(*views)
                step.backward(embeddings.z1.float().sum() + embeddings.z2.float().sum())
            _synchronize(step.device)
    except Exception as error:
        return _failure(passes.plan, error)
    finally:
        method.gather = gather
    return ""


def why_not_tried(
    plan: Plan, config: Config, device: torch.device, seconds: float = 0.0
) -> str | None:
    """``seconds`` have been spent on others already; None: it can be tried."""
    if obstacle := _WITHOUT_TRIAL.get(plan) or plan_obstacle(plan, config, device):
        return obstacle
    mode = config.slim.mode
    if mode != "auto" and plan != "eager" and mode != _mode_of(plan):
        return f"slim.mode is {mode}"
    return f"no time left of {_SECONDS:.0f} s" if seconds > _SECONDS else None


def _mode_of(plan: Plan) -> str:
    return "mask" if plan in ("compile", "dense+mask") else "skip"


def _try(
    plan: Plan,
    passes: Passes,
    step: TrainingStep,
    config: Config,
    exact: dict[str, Tensor],
    rounding: dict[str, float],
) -> Trial:
    ranks = step.ranks
    step.method.run_by(passes)
    views = _few_views(config, step)
    for _ in range(_WARM_UP - 1):
        _results(step, config, views, step.amp_dtype)
    found = _results(step, config, views, step.amp_dtype)
    off = {name: _distance(found[name], exact[name]) for name in exact}
    if not rounding:
        rounding.update(off)
    wrong = (
        f"its {name} are off by {distance:.1e}"
        for name, distance in off.items()
        if not distance <= _ROUNDING * rounding[name] + _FLOOR
    )
    if why_not := _of_any(ranks, next(wrong, None)):
        return Trial(plan, None, why_not)
    views = random_views(config, step.device, _part(config, ranks))
    run: Callable[[], object] = partial(_forward_and_backward, step, views, step.amp_dtype)
    with _kept_as_it_is(step):
        for _ in range(_WARM_UP):
            step.graph.graphs.beside(run) if step.graph else run()
        if step.graph:
            run = _captured(run, step.graph)  # as the run's own steps
        _synchronize(step.device)
        start = time.perf_counter()
        for _ in range(_TIMED):
            run()
        _synchronize(step.device)
    own = 1e3 * (time.perf_counter() - start) / _TIMED
    return Trial(plan, max(ranks.gather(own)))


def _captured(run: Callable[[], object], graph: StepGraph) -> Callable[[], object]:
    """What replays it, which takes the host no time; itself where it cannot be captured."""
    try:
        replay, _ = graph.graphs.capture(run)
    except Exception:
        logger.debug("timed without a CUDA graph", exc_info=True)
        return run
    return replay


def _part(config: Config, ranks: Ranks) -> int:
    """Images that the passes are given at once."""
    return config.batch_size // ranks.world_size // config.engine.accumulate


def _few_views(config: Config, step: TrainingStep) -> tuple[Tensor, Tensor]:
    return random_views(config, step.device, min(_CHECKED, _part(config, step.ranks)))


def random_views(config: Config, device: torch.device, most: int) -> tuple[Tensor, Tensor]:
    """Two batches (n, 3, S, S) of a run's shape, n at most ``most``, always the same."""
    shape = (2, min(most, config.batch_size), 3, config.views.size, config.views.size)
    generator = torch.Generator().manual_seed(0)
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    a, b = torch.randn(shape, generator=generator)
    return (
        a.to(device).contiguous(memory_format=memory_format),
        b.to(device).contiguous(memory_format=memory_format),
    )


def _forward_and_backward(
    step: TrainingStep, views: tuple[Tensor, Tensor], amp_dtype: torch.dtype | None
) -> tuple[Tensor, Tensor]:
    with autocast(step.device, amp_dtype):
        embeddings = step.method(*views)
    loss, _ = step.criterion(*embeddings)
    step.backward(loss)
    return embeddings.z1.detach(), embeddings.z2.detach()


def _results(
    step: TrainingStep,
    config: Config,
    views: tuple[Tensor, Tensor],
    amp_dtype: torch.dtype | None,
) -> dict[str, Tensor]:
    """The embeddings and gradients of a step, and nothing changed by it."""
    with _kept_as_it_is(step):
        z1, z2 = _forward_and_backward(step, views, amp_dtype)
        scale = step.scaler.get_scale()
        gradients = [
            p.grad.float().flatten() / scale for p in step.method.parameters() if p.grad is not None
        ]
    return {"embeddings": torch.cat([z1, z2]).float(), "gradients": torch.cat(gradients)}


def _distance(x: Tensor, exact: Tensor) -> float:
    return float((x - exact).norm() / exact.norm())


@contextmanager
def _kept_as_it_is(step: TrainingStep) -> Iterator[None]:
    """At its end, after errors too, buffers and random numbers are what they were."""
    buffers = [(b, b.detach().clone()) for b in step.method.buffers()]
    devices = [step.device] if step.device.type == "cuda" else []
    try:
        with torch.random.fork_rng(devices):
            torch.manual_seed(0)
            yield
    finally:
        with torch.no_grad():
            for buffer, value in buffers:
                buffer.copy_(value)


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# --- remembering ------------------------------------------------------------------------------


def _cache() -> Path | None:
    folder = user_cache()
    return None if folder is None else folder / "plans.json"


def _key(config: Config, step: TrainingStep) -> str:
    """What the fastest plan depends on."""
    own = to_dict(config)
    told = {name: own[name] for name in ("encoder", "projector", "slim", "loss")}
    told |= {name: own[name] for name in ("batch_size", "precision", "channels_last", "backend")}
    told |= {name: own["engine"][name] for name in ("accumulate", "activation_checkpointing")}
    told |= {
        "graph": step.graph is not None,
        "ranks": step.ranks.world_size,
        "size": config.views.size,
        "torch": torch.__version__,
        "own": _version.__version__,
    }
    if step.device.type == "cuda":
        told["device"] = torch.cuda.get_device_name(step.device)
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def _remembered() -> dict[str, Any]:
    if (file := _cache()) is None:
        return {}
    try:
        found = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _remember(plans: dict[str, Any]) -> None:
    if (path := _cache()) is None:
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            file.write(json.dumps(plans, indent=1).encode())
    except OSError as error:
        logger.debug("cannot remember the plan: %s", error)
