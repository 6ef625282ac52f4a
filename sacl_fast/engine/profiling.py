"""``sacl-fast train ... --profile``: a trace of some steps of a run, and what it says.

The steps are a run's own, with its loader, readings and refreshes; it goes on afterwards. They
begin when passes are recorded and the plan is settled, and end at an epoch's end at the latest, so
that no evaluation is among them.
"""

from __future__ import annotations

import gzip
import json
import logging
import os
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

import torch
from torch.profiler import ProfilerActivity, profile

from sacl_fast.checks import counted
from sacl_fast.config import Config
from sacl_fast.engine.clock import Clock
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.regions import region
from sacl_fast.engine.trace import Figures, figures_of, table
from sacl_fast.errors import UserError, reason_of
from sacl_fast.files import whole_file

logger = logging.getLogger(__name__)

T = TypeVar("T")

_SETTLED, _SETTLED_OF_RANKS = 8, 14
"""Steps of the process, and steps since filters were chosen, in which passes are recorded and the
step is captured as a CUDA graph."""
_PROFILED = 5


def first_profiled(
    done: int, total: int, per_epoch: int, refresh: int = 0, settled: int = _SETTLED
) -> int | None:
    """The step to begin at, all counted from the start of the run; None: it is too short.

    Args:
        refresh: ``slim.refresh_steps``, how often filters are chosen; 0: after each epoch.
        settled: steps to leave out, of the process and, if there are so many, after each choice.
    """
    refresh = refresh or per_epoch
    since = min(settled, min(per_epoch, refresh) - 1)
    for step in range(done + settled, total):
        if min(step % per_epoch, step % refresh) >= since:
            return step
    return None


class Profile:
    """The batches of a run, some of whose steps are profiled where that is asked for."""

    def __init__(
        self, config: Config, folder: Path, ranks: Ranks, asked: bool, done: int, per_epoch: int
    ) -> None:
        """
        Args:
            folder: of the run; the trace goes there.
            done: steps of the run until now.

        Raises:
            UserError: a run that starts is too short. (One that goes on is told, and trains.)
        """
        self._done, self._images, self._device = done, config.batch_size, ranks.device
        total, refresh = config.epochs * per_epoch, config.slim.refresh_steps
        rank = f"_rank{ranks.rank}" if ranks.world_size > 1 else ""
        self._path = folder / f"trace{rank}.json.gz"
        settled = _SETTLED if ranks.world_size == 1 else _SETTLED_OF_RANKS
        first = first_profiled(done, total, per_epoch, refresh, settled)
        self._first = first if asked else None
        self._profiler: profile | None = None
        if asked and first is None and done < total:
            sentence = (
                f"--profile leaves out the first {counted(settled, 'step')} or more, in which "
                f"passes are "
                f"recorded, and this run has {total - done}; more epochs or a smaller "
                "batch_size make more"
            )
            if done == 0:
                raise UserError(sentence)
            if ranks.first:
                logger.warning(sentence)

    def over(self, batches: Iterator[T]) -> Iterator[T]:
        """The batches of an epoch; a batch's step is done when the next one is asked for."""
        started, clock = 0, Clock(self._images, self._device)
        try:
            while True:
                if self._done == self._first and self._start():
                    started, clock = self._done, Clock(self._images, self._device)
                    batches = clock.waiting(batches)
                with region("data wait"):
                    batch = next(batches, None)
                if batch is None:
                    break
                yield batch
                self._done += 1
                if self._profiler and self._done == started + _PROFILED:
                    self._end(self._done - started, clock)
            if self._profiler:
                self._end(self._done - started, clock)
        finally:
            self.close()

    def close(self) -> None:
        """Profile no more."""
        if self._profiler is not None:
            self._profiler.stop()
            self._profiler = None

    def _start(self) -> bool:
        self._first = None
        if getattr(torch.autograd, "_profiler_enabled", bool)():  # which a second one would end
            logger.warning("cannot profile: another profiler is at work in this process")
            return False
        try:
            _set_up(self._device)
            profiler = _profiler(self._device)
            profiler.start()
        except RuntimeError as error:  # the driver may forbid it
            logger.warning("cannot profile: %s", reason_of(error))
            return False
        self._profiler = profiler
        return True

    def _end(self, steps: int, clock: Clock) -> None:
        profiler, self._profiler = self._profiler, None
        assert profiler is not None
        synchronize(self._device)
        waited = clock.read()["data_wait"]
        try:
            profiler.stop()
            raw = _exported(profiler)
            text = table(figures_of(json.loads(raw), steps), data_wait=waited)
            first = self._done - steps + 1
            logger.info("profile of steps %d to %d\n\n%s\n", first, self._done, text)
            with whole_file(self._path) as file, gzip.GzipFile("", "wb", 6, file, 0) as packed:
                packed.write(raw.encode())
            logger.info("trace of these steps, for ui.perfetto.dev: %s", self._path)
        except (OSError, RuntimeError, ValueError) as error:
            logger.warning("cannot write %s: %s", self._path, reason_of(error))


def profiled(run: Callable[[], object], steps: int, device: torch.device) -> Figures:
    """What a trace of ``run``, which makes so many steps, says."""
    _set_up(device)
    with _profiler(device) as profiler:
        run()
        synchronize(device)
    return figures_of(json.loads(_exported(profiler)), steps)


def _exported(profiler: profile) -> str:
    """The trace of a profiler that has stopped."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        return path.read_text(errors="replace")


def _set_up(device: torch.device) -> None:
    """Have the device's tracing ready, which the first profiler takes a while for, and the device
    done."""
    with _profiler(device):
        torch.zeros(1, device=device).add_(1)
    synchronize(device)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()


def _profiler(device: torch.device) -> profile:
    activities = [ProfilerActivity.CPU]
    if device.type == "cuda":
        activities.append(ProfilerActivity.CUDA)
    else:
        os.environ.setdefault("KINETO_LOG_LEVEL", "5")  # else it says that there is no GPU
    return profile(activities=activities, acc_events=True)  # else it warns of other cycles
