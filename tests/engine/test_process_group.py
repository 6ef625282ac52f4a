"""Processes that meet, wait for one another, fail, and never come. Two gloo ranks on the CPU."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

from sacl_fast.config import Config, DataConfig, OptimConfig
from sacl_fast.engine import distributed, watch
from sacl_fast.engine.agreement import check_same_settings
from sacl_fast.engine.distributed import Ranks, process_group, share_cores
from sacl_fast.errors import OtherRankFailed, Stopped, UserError


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def takes_long(ranks: Ranks) -> str:
    """Longer than collectives may."""

    def make() -> str:
        time.sleep(5)
        return "made by 0"

    value = ranks.on_first(make)
    ranks.wait()
    return f"{value}, {ranks.largest(ranks.rank)}, {ranks.gather(ranks.rank)}"


def rank_1_fails(ranks: Ranks) -> str:
    if ranks.rank == 1:
        raise UserError("there is no such image")
    ranks.wait()
    return "went on"


def rank_1_has_a_bug(ranks: Ranks) -> str:
    if ranks.rank == 1:
        raise ZeroDivisionError("by zero")
    dist.all_reduce(torch.ones(1))
    return "went on"


def rank_0_stops_in_its_evaluation(ranks: Ranks) -> str:
    def make() -> None:
        raise Stopped(signal.SIGUSR1)

    ranks.on_first(make)
    return "went on"


def works_until_called_off(ranks: Ranks) -> str:
    """Rank 1 is done and gets a signal while it waits; rank 0 has much left."""

    def work() -> str:
        if ranks.rank == 1:
            ranks.stop.patience = 60.0
            ranks.stop.ask(signal.SIGTERM)
            return "done"
        for _ in range(600):
            time.sleep(0.1)
            ranks.check()
        return "all done"

    return str(ranks.jointly(work))


def rank_1_fails_in_joint_work(ranks: Ranks) -> str:
    assert ranks.jointly(lambda: ranks.rank + 1) == [1, 2]

    def work() -> None:
        if ranks.rank == 1:
            raise UserError("there is no such image")
        for _ in range(600):
            time.sleep(0.1)
            ranks.check()

    return str(ranks.jointly(work))


def rank_1_does_not_wait_for_ever(ranks: Ranks) -> str:
    if ranks.rank == 1:
        ranks.stop.ask(signal.SIGTERM)
        ranks.wait()
    time.sleep(1)
    ranks.wait()
    return "went on"


def settings_differ(ranks: Ranks) -> str:
    data = DataConfig(root=f"/disk{ranks.rank}", workers=ranks.rank)
    check_same_settings(Config(data=data), ranks)
    check_same_settings(Config(seed=ranks.rank, optim=OptimConfig(lr=0.1 + ranks.rank)), ranks)
    return "went on"


def rank_1_is_killed(ranks: Ranks) -> str:
    if ranks.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    dist.all_reduce(torch.ones(1))
    return "went on"


SCENES: tuple[Callable[[Ranks], str], ...] = (
    takes_long,
    rank_1_fails,
    rank_1_has_a_bug,
    rank_0_stops_in_its_evaluation,
    works_until_called_off,
    rank_1_fails_in_joint_work,
    rank_1_does_not_wait_for_ever,
    settings_differ,
    rank_1_is_killed,
)


def play(rank: int, ports: list[int], folder: str) -> None:
    """Every scene; what came of it is written down."""
    torch.set_num_threads(1)
    distributed._COLLECTIVE = timedelta(seconds=3)
    for scene, port in zip(SCENES, ports, strict=True):
        os.environ |= {
            "RANK": str(rank),
            "WORLD_SIZE": "2",
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        try:
            with process_group("cpu") as ranks:
                outcome = scene(ranks)
        except OtherRankFailed as error:
            outcome = f"OtherRankFailed {error.said}: {error}"
        except Stopped as stopped:
            outcome = f"Stopped {stopped.number} {stopped.everywhere}"
        except (UserError, ZeroDivisionError) as error:
            outcome = f"{type(error).__name__}: {error}"
        Path(folder, f"{scene.__name__} {rank}").write_text(outcome)


def test_ranks_wait_for_one_another_and_notice_who_fails(tmp_path):
    context = mp.spawn(play, ([free_port() for _ in SCENES], str(tmp_path)), nprocs=2, join=False)
    assert context is not None
    processes: list[Any] = context.processes
    for process in processes:
        process.join(timeout=200)
    assert [process.exitcode for process in processes] == [0, -signal.SIGKILL]
    came = {path.name: path.read_text() for path in tmp_path.iterdir()}
    for rank in (0, 1):
        assert came[f"takes_long {rank}"] == "made by 0, 1, [0, 1]"
        stopped = came[f"rank_0_stops_in_its_evaluation {rank}"]
        assert stopped == f"Stopped {int(signal.SIGUSR1)} True"
        called_off = came[f"works_until_called_off {rank}"]
        assert called_off == f"Stopped {int(signal.SIGTERM)} True"
        failed = came[f"rank_1_fails_in_joint_work {rank}"]
        assert failed == f"{'UserError' if rank else 'SaidByAnother'}: there is no such image"
    assert came["rank_1_fails 1"] == "UserError: there is no such image"
    other = "OtherRankFailed True: rank 1 failed: "
    assert came["rank_1_fails 0"] == f"{other}there is no such image"
    assert came["rank_1_has_a_bug 1"] == "ZeroDivisionError: by zero"
    assert came["rank_1_has_a_bug 0"] == f"{other}ZeroDivisionError: by zero"
    assert came["rank_1_does_not_wait_for_ever 1"] == f"Stopped {int(signal.SIGTERM)} False"
    assert came["rank_1_does_not_wait_for_ever 0"].startswith("OtherRankFailed True: rank 1 was")
    differ = [came[f"settings_differ {rank}"] for rank in (0, 1)]
    said = [text for text in differ if text.startswith("UserError: rank ")]
    assert said and "optim.lr: " in said[0] and "seed: " in said[0] and "data" not in said[0]
    assert all("went on" not in text for text in differ)
    assert came["rank_1_is_killed 0"].startswith("OtherRankFailed False: another process")
    assert "rank_1_is_killed 1" not in came


def watched(rank: int, port: int, folder: str, scene: Callable[[str], str]) -> None:
    """A scene in which the others are soon missed."""
    torch.set_num_threads(1)
    watch._BEAT, watch._SILENT, watch._GRACE = 0.1, 2.0, 1.0
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    try:
        outcome = scene(folder)
    except (OtherRankFailed, UserError) as error:
        outcome = f"{type(error).__name__}: {error}"
    Path(folder, f"outcome {rank}").write_text(outcome)


def killed_while_waited_for(folder: str) -> str:
    with process_group("cpu") as ranks:
        if ranks.rank == 1:
            os.kill(os.getpid(), signal.SIGKILL)
        ranks.wait()
    return "went on"


def killed_before_the_group(folder: str) -> str:
    if os.environ["RANK"] == "1":
        dist.init_process_group = lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL)
    with process_group("cpu"):
        return "went on"


def fails_while_rank_0_writes(folder: str) -> str:
    watch._SILENT = 600.0

    def write() -> None:
        while not Path(folder, "outcome 1").exists():
            time.sleep(0.1)
        time.sleep(4 * watch._GRACE)
        Path(folder, "checkpoint").write_text("whole")

    with process_group("cpu") as ranks:
        ranks.wait()
        if ranks.rank == 1:
            raise UserError("there is no such image")
        ranks.on_first(write)
    return "went on"


def two_groups_in_turn(folder: str) -> str:
    watch._SILENT = 600.0

    def group() -> list[int]:
        with process_group("cpu") as ranks:
            return ranks.jointly(lambda: ranks.rank)

    return str([group(), group()])


LOST = "OtherRankFailed: rank 1 was lost: rank 0 has not heard of it for 2 seconds"


@pytest.mark.parametrize(
    ("scene", "codes", "outcomes"),
    [
        (killed_while_waited_for, (0, -signal.SIGKILL), (LOST, None)),
        (killed_before_the_group, (1, -signal.SIGKILL), (None, None)),
        (
            fails_while_rank_0_writes,
            (0, 0),
            ("OtherRankFailed: rank 1 failed: there is", "UserError: there is no such image"),
        ),
        (two_groups_in_turn, (0, 0), ("[[0, 1], [0, 1]]",) * 2),
    ],
)
def test_nobody_waits_for_ever(tmp_path, scene, codes, outcomes):
    arguments = (free_port(), str(tmp_path), scene)
    context = mp.spawn(watched, arguments, nprocs=2, join=False)
    assert context is not None
    processes: list[Any] = context.processes
    for process in processes:
        process.join()
    assert tuple(process.exitcode for process in processes) == codes
    for rank, outcome in enumerate(outcomes):
        file = tmp_path / f"outcome {rank}"
        assert file.exists() == (outcome is not None)
        assert outcome is None or file.read_text().startswith(outcome)
    if scene is fails_while_rank_0_writes:
        assert (tmp_path / "checkpoint").read_text() == "whole"


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_never_comes(monkeypatch, rank):
    monkeypatch.setattr(distributed, "_START_UP", timedelta(seconds=2))
    port = free_port()
    join_as(monkeypatch, rank, port)
    with pytest.raises(UserError) as raised, process_group("cpu"):
        pass
    assert f"rank {rank} of 2 does not reach the others at 127.0.0.1:{port}" in str(raised.value)
    assert "WORLD_SIZE=1 trains alone" in str(raised.value)


def test_something_else_at_the_port_that_says_nothing(monkeypatch):
    monkeypatch.setattr(distributed, "_START_UP", timedelta(seconds=1))
    monkeypatch.setattr(distributed, "_ANSWER", 1.0)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        port = silent.getsockname()[1]
        join_as(monkeypatch, 1, port)
        with pytest.raises(UserError) as raised, process_group("cpu"):
            pass
    assert f"rank 1 of 2 does not reach the others at 127.0.0.1:{port}" in str(raised.value)


def test_a_rank_that_is_there_already(monkeypatch):
    """An earlier run still has the port: its ranks are not to be mixed with this one's."""
    earlier = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(distributed, "_groups", count())
    dist.PrefixStore("sacl_fast 0 0", earlier).set("rank 1", "1")
    join_as(monkeypatch, 1, earlier.port)
    with pytest.raises(UserError, match=r"there is a rank 1 at .* already"), process_group("cpu"):
        pass
    join_as(monkeypatch, 0, earlier.port)
    with pytest.raises(UserError, match="rank 0 of 2 does not reach"), process_group("cpu"):
        pass


def join_as(monkeypatch, rank: int, port: int) -> None:
    variables = {"RANK": rank, "WORLD_SIZE": 2, "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    for name, value in variables.items():
        monkeypatch.setenv(name, str(value))


def test_torchrun_keeps_the_store_over_a_restart(monkeypatch):
    """Its agent's store holds what the ranks of the first attempt said; those are dead."""
    monkeypatch.setattr(distributed, "_START_UP", timedelta(seconds=2))
    port = free_port()
    agent = dist.TCPStore("127.0.0.1", port, is_master=True, wait_for_workers=False)
    variables = {
        "RANK": "0",
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        "TORCHELASTIC_RESTART_COUNT": "1",
    }
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(distributed, "_groups", count())
    dist.PrefixStore("sacl_fast 0 0", agent).set("rank 1", "1")
    with pytest.raises(UserError, match="rank 1 of 2 did not come within"), process_group("cpu"):
        pass


def test_ranks_share_the_cores_of_their_machine(monkeypatch):
    before, cores = torch.get_num_threads(), len(os.sched_getaffinity(0))
    try:
        torch.set_num_threads(cores + 1)
        for ranks in (1, 2, cores + 1):
            monkeypatch.setenv("LOCAL_WORLD_SIZE", str(ranks))
            share_cores()
            assert torch.get_num_threads() == max(1, cores // ranks)
    finally:
        torch.set_num_threads(before)


def test_one_process_needs_no_others():
    ranks = Ranks(0, 1, torch.device("cpu"))
    ranks.wait()
    check_same_settings(Config(), ranks)
    assert ranks.on_first(lambda: 3) == 3 and ranks.largest(4) == 4 and ranks.gather(5) == [5]
    with pytest.raises(Stopped):
        ranks.on_first(lambda: (_ for _ in ()).throw(Stopped(15)))
