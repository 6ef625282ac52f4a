"""A training step as one CUDA graph (``engine.cuda_graph``).

The host needs some 10 ms to launch the 1,600 kernels of a MobileNet's step, whatever the size of
the images. Captured in a graph they are one launch. A graph holds addresses and sizes, so a step is
captured

- once its forms have settled: passes are recorded and algorithms chosen in the first steps, which
  train as any other;
- anew where sizes change: the plan, the start of slimming, and, where slim passes skip, the filters
  (masks are buffers, which stay where they are);
- on views in memory of its own, into which those of the loader are copied: the loader's memory is
  then free for the batch after the next, as the graph's is for this one.

The step that is captured is also computed as ever, and the graph's first replay starts from the
same weights. A graph that does not come to the same weights, statistics and loss, like a step that
cannot be captured, is given up with a warning, and training goes on without.

What a graph reads and did not make is held as long as the graph: lists of channels, say, are in
caches that may drop them.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable, Iterable
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sacl_fast.config import Config
from sacl_fast.engine.regions import region
from sacl_fast.errors import UserError
from sacl_fast.ops.collectives import world_size

if TYPE_CHECKING:
    from sacl_fast.engine.step import Reading, TrainingStep

logger = logging.getLogger(__name__)

_WARM_UP = 4  # steps; passes run from their recording from the third on
_WARM_UP_OF_RANKS = 11  # steps in which DistributedDataParallel settles its buckets
_STEPS_WORTH_CAPTURING = 50
_CLOSE = 0.05  # of the update; kernels that add in no fixed order differ by less

T = TypeVar("T")


def wants_graph(config: Config, device: torch.device, world_size: int) -> bool:
    """Whether the steps of a run are to be captured.

    Raises:
        UserError: they are to be, by name, and the device has no graphs.
    """
    setting = config.engine.cuda_graph
    if setting == "on" and device.type != "cuda":
        raise UserError(
            f"engine.cuda_graph is on, but the device is {device.type}; a CUDA device, "
            "engine.cuda_graph auto or off works"
        )
    return setting == "on" or (setting == "auto" and device.type == "cuda" and world_size == 1)


class StepGraph:
    """The steps of a run, computed by replaying a graph where there is one."""

    def __init__(self, step: TrainingStep, graphs: Graphs, *, world_size: int = 1) -> None:
        self.step = step
        self.replays = 0
        """Steps that were replays."""
        self.graphs = graphs
        self._warm_up = _WARM_UP if world_size == 1 else _WARM_UP_OF_RANKS
        self._obstacle = ""
        self._form: Hashable = None
        self._steps = 0  # of this form
        self._views: tuple[Tensor, Tensor] | None = None
        self._replay: Callable[[], object] | None = None
        self._result: Reading | None = None
        self._read: dict[int, Tensor] = {}

    def __call__(self, view_a: Tensor, view_b: Tensor) -> Reading:
        """``TrainingStep.compute``; a replay's results are overwritten by the next one's."""
        if not self._obstacle and (form := self._form_of(view_a, view_b)) != self._form:
            self._begin(form, view_a, view_b)
        if self._obstacle or self._views is None:
            return self.step.compute(view_a, view_b)
        for own, view in zip(self._views, (view_a, view_b), strict=True):
            own.copy_(view)
        self._steps += 1
        if self._replay is not None and self._result is not None:
            with region("replay"):
                self._replay()
            self.replays += 1
            return self._result
        if self._steps <= self._warm_up:
            return self._computed()
        return self._capture()

    def _form_of(self, *views: Tensor) -> Hashable:
        """What sizes and addresses in a step depend on."""
        method = self.step.method
        slicer, passes = method.slicer, method.passes
        kept = slicer.kept if passes.mode == "skip" and slicer.skips else ()
        memory = ((v.shape, v.stride(), v.dtype, v.device) for v in views)
        return id(passes), slicer.skips, slicer.norm_gradient, kept, method.training, *memory

    def _begin(self, form: Hashable, *views: Tensor) -> None:
        refresh = self.step.config.slim.refresh_steps
        if self.step.method.passes.mode == "skip" and 0 < refresh < _STEPS_WORTH_CAPTURING:
            return self._give_up(
                f"slim.refresh_steps is {refresh}, and skipping passes would be captured anew each "
                f"time; it pays from {_STEPS_WORTH_CAPTURING} steps on",
                logging.INFO,
            )
        self._forget()  # first, so that the old graph's memory is free
        self.step.optimizer.zero_grad(set_to_none=True)
        self._form, self._steps = form, 0
        a, b = (torch.empty_like(view) for view in views)
        self._views = a, b

    def _forget(self) -> None:
        self._replay = self._result = None
        self._read = {}

    def _computed(self) -> Reading:
        assert self._views is not None
        a, b = self._views
        return self.graphs.beside(lambda: self.step.compute(a, b))

    def _capture(self) -> Reading:
        """The step, computed as ever; after it there is a graph, or there never will be."""
        assert self._views is not None
        a, b = self._views
        before = _State(self.step)
        with _Read() as read:  # in a step of its own: modes change in what order autograd adds
            self._computed()
        before.restore()
        expected = self._computed()
        after = _State(self.step)
        before.restore()
        self.step.optimizer.zero_grad(set_to_none=True)
        replay, result, found = None, expected, ""
        try:
            replay, result = self.graphs.capture(lambda: self.step.compute(a, b))
        except Exception as error:  # whatever is met here, training goes on without
            found = f"a step cannot be captured ({_first_line(error)})"
        # A replay's collectives wait for those of all ranks.
        if self.graphs.agreed(replay is not None) and replay is not None:
            found = self._fault(replay, result, expected, before, after)
            if self.graphs.agreed(not found):
                logger.info("a step is one CUDA graph from here on")
                self._replay, self._result, self._read = replay, result, read.tensors
                return result
        found = found or "another process cannot capture a step, or its replay is wrong"
        try:
            self._give_up(found, logging.WARNING)
            after.restore()
        except RuntimeError as error:
            raise UserError(
                f"{found}, after which the GPU cannot be used in this process; "
                "--engine.cuda-graph off works"
            ) from error
        return expected

    def _fault(
        self,
        replay: Callable[[], object],
        result: Reading,
        expected: Reading,
        before: _State,
        after: _State,
    ) -> str:
        """Of the first replay, from ``before``, where the step came to ``after``; empty if none."""
        try:
            replay()
            self.graphs.wait()
        except RuntimeError as error:
            return f"a replay failed ({_first_line(error)})"
        off = after.unlike(before)
        if not off and not _close((result.loss - expected.loss).abs(), *[expected.loss.abs()] * 2):
            off = "loss"
        return off and f"a replay gives another {off} than the step it was made of"

    def _give_up(self, reason: str, level: int) -> None:
        logger.log(level, "no CUDA graph: %s", reason)
        self._obstacle = reason
        self._views = None
        self._forget()
        self.step.optimizer.zero_grad(set_to_none=True)
        self.step.method.sharing.forget()
        self.step.renew_scaler()  # which may be in the midst of a step


class Graphs:
    """What of CUDA a step's graph takes. One stream for all, since cuBLAS has memory by stream."""

    def __init__(self, device: torch.device) -> None:
        self._stream = torch.cuda.Stream(device)

    def beside(self, function: Callable[[], T]) -> T:
        """``function()``, on the stream that captures."""
        current = torch.cuda.current_stream(self._stream.device)
        self._stream.wait_stream(current)
        with torch.cuda.stream(self._stream):
            result = function()
        current.wait_stream(self._stream)
        return result

    def capture(self, function: Callable[[], T]) -> tuple[Callable[[], object], T]:
        """What replays the work of ``function``, which is not done yet, and its results."""
        graph = torch.cuda.CUDAGraph()
        # Loaders and autograd have threads of their own, which may call CUDA meanwhile.
        mode = "thread_local"
        with torch.cuda.graph(graph, stream=self._stream, capture_error_mode=mode):
            result = function()
        return graph.replay, result

    def agreed(self, fine: bool) -> bool:
        """Whether it is so on every rank."""
        if world_size() == 1:
            return fine
        told = torch.tensor(float(fine), device=self._stream.device)
        dist.all_reduce(told, op=dist.ReduceOp.MIN)
        return bool(told)

    def wait(self) -> None:
        self._stream.synchronize()
        torch.cuda.current_stream(self._stream.device).synchronize()


class _Read(TorchDispatchMode):
    """Holds the tensors that operators read within it, but for those that one of them made."""

    def __init__(self) -> None:
        super().__init__()
        self.tensors: dict[int, Tensor] = {}
        self._made: set[int] = set()  # addresses, which outside are not given out meanwhile

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        for tensor in _tensors((args, kwargs)):
            address = tensor.untyped_storage().data_ptr()
            if address not in self._made:
                self.tensors.setdefault(address, tensor.detach())
        out = func(*args, **(kwargs or {}))
        for tensor in _tensors(out):
            address = tensor.untyped_storage().data_ptr()
            if address not in self.tensors:
                self._made.add(address)
        return out


def _tensors(tree: Any) -> Iterable[Tensor]:
    return (leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor))


class _State:
    """All that a step changes, as it is now."""

    def __init__(self, step: TrainingStep) -> None:
        self._step = step
        changed = _changed_by(step)
        self._values = {k: [(t, t.detach().clone()) for t in ts] for k, ts in changed.items()}
        self._scaler = step.scaler.state_dict()
        self._random = _random_state(step.device)

    @torch.no_grad()
    def restore(self) -> None:
        for pairs in self._values.values():
            for tensor, value in pairs:
                tensor.copy_(value)
        if self._scaler:
            self._step.scaler.load_state_dict(self._scaler)
        _set_random_state(self._step.device, self._random)

    @torch.no_grad()
    def unlike(self, before: _State) -> str:
        """In what the step has come elsewhere from ``before`` than to this; empty if in nothing."""
        for kind, pairs in self._values.items():
            start = {id(tensor): value for tensor, value in before._values[kind]}
            moved, off, size = [], [], []
            for tensor, value in pairs:
                if tensor.is_floating_point():
                    moved.append((value - start.get(id(tensor), value)).double().norm())
                    off.append((tensor - value).double().norm())
                    size.append(value.double().norm())
            if off and not _close(*(torch.stack(norms).norm() for norms in (off, moved, size))):
                return kind
        return ""


def _first_line(error: Exception) -> str:
    first, *_ = str(error).splitlines() or [""]
    return f"{type(error).__name__}: {first[:200]}"


def _close(off: Tensor, moved: Tensor, size: Tensor) -> bool:
    return bool(off <= _CLOSE * moved + 1e-6 * size)


def _changed_by(step: TrainingStep) -> dict[str, list[Tensor]]:
    states = (value for state in step.optimizer.state.values() for value in state.values())
    return {
        "weights": list(step.method.parameters()),
        "running statistics": list(step.method.buffers()),
        "momentum": [value for value in states if isinstance(value, Tensor)],
        "first_nonfinite": [step.first_nonfinite],
    }


def _random_state(device: torch.device) -> Tensor:
    return torch.cuda.get_rng_state(device) if device.type == "cuda" else torch.get_rng_state()


def _set_random_state(device: torch.device, state: Tensor) -> None:
    if device.type == "cuda":
        torch.cuda.set_rng_state(state, device)
    else:
        torch.set_rng_state(state)
