"""Processes and devices: ``torchrun`` or ``srun`` start W ranks, all else is one rank of one.

Collectives have a limit in minutes, so that what is lost is noticed. What rank 0 alone does, such
as an evaluation, may take hours: the others then ask the store now and then, which Python does, so
that signals are seen and so is a rank that failed, or that is gone (``watch``).
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from functools import cache
from itertools import count
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sacl_fast.data.loading.workers import worker_count
from sacl_fast.engine.launch import Launch, read_launch
from sacl_fast.engine.signals import StopRequest
from sacl_fast.engine.watch import FAILED, Watch
from sacl_fast.errors import OtherRankFailed, SaidByAnother, Stopped, UserError, reason_of

T = TypeVar("T")

_START_UP = timedelta(minutes=5)
"""From the first rank's start to the last's."""
_ANSWER = 10.0  # seconds beyond it, for a store that says itself what it waited for
_COLLECTIVE = timedelta(minutes=30)
_FAILING = 60.0  # seconds from the first rank's failure at something to the last's
_groups = count()
"""How many groups this process has joined; all ranks join the same ones."""


class Ranks:
    """This process's rank among the others, and its device.

    Args:
        store: where ranks tell one another more than collectives do; None: by collectives alone.
        watch: over the other ranks, where there is a store.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        device: torch.device,
        store: dist.Store | None = None,
        watch: Watch | None = None,
    ) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device
        self.stop = StopRequest()
        """Asked while others are waited for."""
        self._store, self._watch = store, watch
        self._meetings = 0

    @property
    def first(self) -> bool:
        """Whether this is the rank that writes."""
        return self.rank == 0

    def largest(self, number: int) -> int:
        """The largest of all ranks' numbers. All ranks must ask."""
        if self.world_size == 1:
            return number
        largest = torch.tensor(number, device=self.device)
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return int(largest.item())

    def on_first(self, function: Callable[[], T]) -> T:
        """What ``function`` returns on rank 0, on every rank; see ``jointly``."""
        found: list[Any] = self.jointly(function if self.first else lambda: None)
        return found[0]

    def jointly(self, function: Callable[[], T]) -> list[T]:
        """What ``function`` returns on each rank, in rank order, on every rank. It may take hours
        if it calls ``check`` now and then.

        Raises:
            UserError: on every rank, where it fails on any; one of them says so.
            Stopped: on every rank, where it is stopped on any.
        """
        if self.world_size == 1:
            return [function()]
        value, failed, stopped = None, None, None
        try:
            with self._finishing():
                value = function()
        except UserError as error:
            failed = error
            self._call_off()
        except Stopped as error:
            stopped = error
            self._call_off()
        self.wait()
        number = (stopped and stopped.number) or self.stop.number
        told = self.gather((value, failed and str(failed), stopped is not None, number))
        values, sentences, ended, numbers = zip(*told, strict=True)
        for rank, sentence in enumerate(sentences):
            if sentence:
                _fail_together(failed if rank == self.rank else None, sentence)
        if any(ended):
            raise Stopped(max(numbers), everywhere=True)
        return list(values)

    def check(self) -> None:
        """Raise ``Stopped`` if asked to, or where another rank has ended what all do jointly."""
        self.stop.check()
        if self._store is not None:
            _check_others(self._store)
            if self._store.check([f"called off {self._meetings}"]):
                raise Stopped(0)

    @contextmanager
    def _finishing(self) -> Iterator[None]:
        """What is done within is not to be ended in its midst, as writing a file is not."""
        if self._watch is not None:
            self._watch.working = True
        try:
            yield
        finally:
            if self._watch is not None:
                self._watch.working = False

    def _call_off(self) -> None:
        """Have the others end what they do before the next meeting, if they ``check``."""
        if self._store is not None:
            self._store.set(f"called off {self._meetings}", "")

    def together(self, function: Callable[[], T]) -> T:
        """What ``function`` returns, on each rank its own.

        Raises:
            UserError: on every rank, where it fails on any; one of them says so.
        """
        value, failed = None, None
        try:
            value = function()
        except UserError as error:
            failed = error
        sentences = self.gather(failed and str(failed))
        told = next((rank for rank, sentence in enumerate(sentences) if sentence), None)
        if told is not None:
            _fail_together(failed if told == self.rank else None, sentences[told])
        return value  # type: ignore[return-value]

    def all_fail(self, what: str) -> bool:
        """Whether ``what`` failed on every rank, as it did here: whether all come to ask. One that
        does not may wait in a collective, so no collective can tell."""
        if self.world_size == 1 or self._store is None:
            return self.world_size == 1
        end = time.monotonic() + _FAILING
        failed = self._store.add(f"failing: {what}", 1)
        while failed < self.world_size and time.monotonic() < end:
            time.sleep(0.1)
            _check_others(self._store)
            failed = self._store.add(f"failing: {what}", 0)
        return failed == self.world_size

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in rank order, on every rank."""
        if self.world_size == 1:
            return [value]
        values: list[Any] = [None] * self.world_size
        dist.all_gather_object(values, value)
        return values

    def wait(self) -> None:
        """Wait until every rank is here, however long that takes."""
        if self.world_size == 1:
            return
        if self._store is not None:
            self._meet(self._store)
        # Rank 0's process may hold the store, so it does not leave before all have seen the others.
        dist.barrier(device_ids=[self.device.index] if self.device.type == "cuda" else None)

    def _meet(self, store: dist.Store) -> None:
        key = f"meeting {self._meetings}"
        pause, here = 0.001, store.add(key, 1)
        while here < self.world_size:
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            if self.stop.number:
                self._call_off()
            self.stop.check_wait()
            _check_others(store)
            here = store.add(key, 0)
        self._meetings += 1


@contextmanager
def process_group(requested_device: str) -> Iterator[Ranks]:
    """Join the processes that were started together, if this is one of several.

    Raises:
        UserError: the others do not come, or were not told where to find one another.
        OtherRankFailed: in the midst of the run another process failed or was killed.
    """
    launch = read_launch()
    device = pick_device(requested_device, launch.local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not os.environ.get("OMP_NUM_THREADS"):
        share_cores()
    if dist.is_initialized():
        yield Ranks(dist.get_rank(), dist.get_world_size(), device)
        return
    if launch.world_size == 1:
        yield Ranks(0, 1, device)
        return
    store = _meet(launch)
    watch = Watch(store, launch.rank, launch.world_size)
    backend = "nccl" if device.type == "cuda" else "gloo"
    try:
        dist.init_process_group(
            backend,
            store=store,
            rank=launch.rank,
            world_size=launch.world_size,
            timeout=_COLLECTIVE,
        )
        yield Ranks(launch.rank, launch.world_size, device, store, watch)
    except BaseException as error:
        together = isinstance(error, SaidByAnother) or (
            isinstance(error, Stopped) and error.everywhere
        )
        if together:
            raise
        earlier = _tell_the_others(store, watch, error)
        if earlier is not None:
            raise earlier from error
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        watch.end()


def share_cores() -> None:
    """Have torch's threads be no more than this rank's share of the cores that may be used: threads
    without a core are waited for by all others. torchrun gives each rank one thread by
    OMP_NUM_THREADS, srun does not."""
    torch.set_num_threads(min(torch.get_num_threads(), worker_count(-1)))


def _meet(launch: Launch) -> dist.Store:
    """The store of this start of all processes, once all of them are there."""
    try:
        store = _reach(launch)
        # torchrun's own store outlives a restart, and the addresses in it are of the dead.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        store = dist.PrefixStore(f"sacl_fast {attempt} {next(_groups)}", store)
        store.set_timeout(_START_UP)
        names = [f"rank {rank}" for rank in range(launch.world_size)]
        first = store.add(names[launch.rank], 1) == 1
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"rank {launch.rank} of {launch.world_size} does not reach the others at "
            f"{launch.address} ({reason_of(error)}); MASTER_ADDR and MASTER_PORT name rank 0's "
            "host and a free port there, and WORLD_SIZE=1 trains alone"
        ) from None
    if not first:
        raise UserError(
            f"there is a rank {launch.rank} at {launch.address} already, of another run or of an "
            "earlier one that was not ended; ending that works, and so does another MASTER_PORT, "
            "the same for all ranks"
        )
    try:
        store.wait(names, _START_UP)
    except RuntimeError:
        missing = [name for name in names if not store.check([name])]
        raise UserError(
            f"{', '.join(missing[:8])} of {launch.world_size} did not come within "
            f"{_START_UP.total_seconds() / 60:g} minutes; start as many processes as WORLD_SIZE "
            "says, or set WORLD_SIZE=1 to train alone"
        ) from None
    return store


def _reach(launch: Launch) -> dist.Store:
    """The store at the launch's address. It is asked for by a thread, since what listens there may
    be something else, and torch waits for its answer for ever."""
    found: list[dist.Store | Exception] = []

    def ask() -> None:
        try:
            found.append(_store_at(launch))
        except Exception as error:
            found.append(error)

    thread = threading.Thread(target=ask, name="store of the ranks", daemon=True)
    thread.start()
    thread.join(_START_UP.total_seconds() + _ANSWER)
    if not found:
        raise ValueError("what listens there does not answer as rank 0 would")
    if isinstance(found[0], Exception):
        raise found[0]
    return found[0]


@cache
def _store_at(launch: Launch) -> dist.Store:
    """As long as this process lives, so that the others can still ask rank 0's."""
    store, _, _ = next(iter(dist.rendezvous("env://", timeout=_START_UP)))
    return store


def _check_others(store: dist.Store) -> None:
    if store.check([FAILED]):
        raise RuntimeError("a rank that is waited for has failed")


def _tell_the_others(
    store: dist.Store, watch: Watch, error: BaseException
) -> OtherRankFailed | None:
    """Say in the store why this rank leaves. Where that is another's failure: what to raise."""
    lost = isinstance(error, RuntimeError) and is_of_a_lost_rank(error)
    mine = f"rank {watch.rank} failed: {type(error).__name__}: {reason_of(error)}"
    if isinstance(error, UserError):
        mine = f"rank {watch.rank} failed: {error}"
    if isinstance(error, Stopped):
        mine = f"rank {watch.rank} was stopped"
    if lost:
        mine = (
            f"another process of this run was lost ({reason_of(error)}); --resume auto goes on "
            "from the last checkpoint"
        )
    try:
        first = store.compare_set(FAILED, "", mine).decode()
    except RuntimeError:  # the store's process is gone
        first = mine
    if first != mine:
        return OtherRankFailed(first, said=first != watch.found)
    return OtherRankFailed(mine, said=False) if lost else None


def is_of_a_lost_rank(error: BaseException) -> bool:
    """Whether a collective or the store failed, rather than something of this rank's own."""
    signs = ("gloo", "Connection closed by peer", "NCCL", "a rank that is waited for")
    return isinstance(error, dist.DistError) or any(sign in str(error) for sign in signs)


def _fail_together(error: UserError | None, sentence: str | None) -> None:
    if error is not None:
        raise error
    if sentence is not None:
        raise SaidByAnother(sentence)


def device_name(device: torch.device) -> str:
    """What a person calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return "Apple GPU" if device.type == "mps" else "CPU"


def pick_device(requested: str, local_rank: int | None = None) -> torch.device:
    """``auto``, ``cpu``, ``cuda`` (this rank's GPU) or ``mps`` as a device."""
    if requested == "mps":
        if not torch.backends.mps.is_available():
            raise UserError(
                "device 'mps' was asked for, but torch sees no Apple GPU; --device cpu works"
            )
        if read_launch().world_size > 1:
            raise UserError("device 'mps' is for one process; --device cpu, or WORLD_SIZE=1, works")
        return torch.device("mps")
    has_gpu = torch.cuda.is_available()
    if requested == "cuda" and not has_gpu:
        raise UserError("device 'cuda' was asked for, but torch sees no GPU; --device cpu works")
    if requested == "cpu" or not has_gpu:
        return torch.device("cpu")
    index = read_launch().local_rank if local_rank is None else local_rank
    count = torch.cuda.device_count()
    if count == 1 and "SLURM_STEP_GPUS" in os.environ:
        index = 0  # srun --gpus-per-task shows each task its own GPU only
    if index >= count:
        raise UserError(
            f"local rank {index} has no GPU: this machine has {count}; start as many processes per "
            "node as there are GPUs"
        )
    return torch.device("cuda", index)
