"""The memory of a step: what it took at most, and what it will take.

What it will take is found out on the CPU with two and three images: the same operators run, each
allocation is noted, and after each operator so many bytes are alive, an amount that is fixed and
one for each image. Their sum for all images is largest at the peak, which may be another operator
than for a few.
"""

from __future__ import annotations

import resource
import sys
import weakref
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sacl_fast.config import Config
from sacl_fast.config.choices import Plan
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method, build_networks
from sacl_fast.engine.step import TrainingStep
from sacl_fast.machine import usable_memory
from sacl_fast.passes import choose_passes, passes_of, plan_obstacle
from sacl_fast.precision import autocast_dtype

_FEW = (2, 3)  # images
_WARM_UP = 1  # steps, after which the optimiser has its state
_WARM_UP_RECORDED = 3  # and passes run from their recording
STEPS_PER_EPOCH = 100  # where that is not known: slim passes are recorded
_CPU = torch.device("cpu")


# --- what it took ------------------------------------------------------------------------------


def peak_memory(device: torch.device) -> dict[str, float]:
    """Bytes at most until now, as metrics: of tensors, and what torch holds for them, on a GPU; of
    the whole process on a CPU. On an Apple GPU, what the driver holds, which does not give back.
    Waits for nothing."""
    if device.type == "mps":
        return {"peak_memory_bytes": torch.mps.driver_allocated_memory()}
    if device.type == "cuda":
        return {
            "peak_memory_bytes": torch.cuda.max_memory_allocated(device),
            "peak_reserved_bytes": torch.cuda.max_memory_reserved(device),
        }
    unit = 1 if sys.platform == "darwin" else 1024
    return {"peak_memory_bytes": unit * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss}


def memory_here(device: torch.device) -> tuple[int, int]:
    """Bytes that are there in all and that are free now, on a GPU or this machine."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return total, free
    if device.type == "mps":
        total = torch.mps.recommended_max_memory()
        return total, total - torch.mps.driver_allocated_memory()
    return usable_memory()


class LiveBytes(TorchDispatchMode):
    """Counts the bytes of tensors that are alive, after each operator that runs within it."""

    def __init__(self, there: Iterable[Tensor] = ()) -> None:
        """``there``: tensors from before that count, too."""
        super().__init__()
        self.alive = 0
        self.trace: list[int] = []
        self._known: dict[int, weakref.ref[Any]] = {}
        for tensor in there:
            self._note(tensor)

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, Tensor):
                self._note(leaf)
        self.trace.append(self.alive)
        return out

    def _note(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()  # one object as long as its memory is there
        key, size = id(storage), storage.nbytes()
        if key in self._known:
            return

        def freed(_: object) -> None:
            del self._known[key]
            self.alive -= size

        self._known[key] = weakref.ref(storage, freed)
        self.alive += size


# --- what it will take -------------------------------------------------------------------------


@dataclass(frozen=True)
class Forecast:
    """The memory of one process's step."""

    plan: Plan
    state: int
    """Bytes of weights, gradients, buffers and optimiser."""
    fixed: Tensor
    """(T,) bytes alive after each operator of a step, without those of images."""
    per_image: Tensor  # (T,)
    image: int
    """Bytes of both views of an image."""
    world_size: int
    embedding: int
    """Bytes of an image's embeddings."""
    batches: int
    """Views on the device, besides those that are trained on."""

    def peak(self, images: int, parts: int = 1) -> int:
        """Bytes at most, with so many images in a process, computed in so many parts."""
        part = images // parts
        step = int((self.fixed + part * self.per_image).max())
        views = (images - part + self.batches * images) * self.image
        others = (self.world_size - 1) * part * 2 * self.embedding  # and as the loss takes them
        factors = 8 * part * part * self.world_size
        return step + views + others + factors


def forecast(
    config: Config,
    device: torch.device,
    world_size: int = 1,
    *,
    steps_per_epoch: int = STEPS_PER_EPOCH,
) -> Forecast:
    """What a step of this run will take on a device; it is computed on the CPU.

    Where the plan is still to be chosen, or cannot run on a CPU, that of ``eager``.

    Raises:
        UserError: the model cannot be built, or not with what was asked for.
    """
    passes = choose_passes(config, device, steps_per_epoch=steps_per_epoch)
    half = autocast_dtype(config.precision, device) is not None
    parts = min(2, config.engine.accumulate)
    engine = replace(config.engine, plan="auto", accumulate=parts, cuda_graph="off")
    few = replace(
        config,
        device="cpu",
        backend="torch" if config.backend == "torch" else "auto",
        precision="bf16" if half else "fp32",
        engine=engine,
        slim=replace(config.slim, mode=passes.mode),
        batch_size=parts * max(_FEW),
    )
    torch.manual_seed(0)
    networks = build_networks(few)
    passes = choose_passes(
        config, device, steps_per_epoch=steps_per_epoch, encoder=networks.encoder
    )
    plan: Plan = "eager" if plan_obstacle(passes.plan, few, _CPU) else passes.plan
    plan = "eager" if plan == "compile" else plan
    own = passes_of(plan, few, _CPU, steps_per_epoch=steps_per_epoch)
    method = build_method(few, own, networks)
    step = TrainingStep(method, few, Ranks(0, 1, _CPU), steps_per_epoch=steps_per_epoch)
    (at_2, state), (at_3, _) = (trace(step, few, parts * n) for n in _FEW)
    rows = (at_3 - at_2) / (_FEW[1] - _FEW[0])
    parameters = sum(p.nbytes for p in step.method.parameters())
    buckets = parameters if world_size > 1 else 0
    image = 2 * 3 * config.views.size**2 * 4
    fixed = at_2 - _FEW[0] * rows + buckets
    return Forecast(
        plan=plan,
        state=state + parameters + buckets,
        fixed=fixed,
        # Of the batch, two parts were there; ``peak`` counts those that are not trained on.
        per_image=rows - (parts - 1) * image,
        image=image,
        world_size=world_size,
        embedding=(4 if step.method.distill else 2) * config.projector.out * 4,
        batches=0 if device.type == "cpu" else 1 + (config.engine.cuda_graph != "off"),
    )


def trace(step: TrainingStep, config: Config, images: int) -> tuple[Tensor, int]:
    """Bytes alive after each operator of a step of so many images, and of what stays after it but
    the gradients."""
    size = config.views.size
    memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
    a, b = torch.randn(2, images, 3, size, size)
    a, b = (view.contiguous(memory_format=memory_format) for view in (a, b))
    passes = step.method.passes
    recorded = passes.recorded or passes.dense == "recorded"
    warm_up = _WARM_UP_RECORDED if recorded else _WARM_UP
    for i in range(warm_up):
        step(a, b, i)
    state = [*step.method.parameters(), *step.method.buffers()]
    for values in step.optimizer.state.values():
        state += (value for value in values.values() if isinstance(value, Tensor))
    gradients = [p.grad for p in step.method.parameters() if p.grad is not None]
    with LiveBytes([*state, *gradients, a, b]) as live:
        step(a, b, warm_up)
    return torch.tensor(live.trace, dtype=torch.float64), sum(t.nbytes for t in state)
