"""How many processes a run has and which one this is: from torchrun's variables or from SLURM's.

``torchrun`` and what is like it set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR and MASTER_PORT.
``srun`` sets variables of its own, from which the same are made here, so that torch and everything
else read them. No torch import: the command line asks before it is loaded.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass

from sacl_fast.errors import UserError

_TORCHRUN = "torchrun --nproc-per-node N -m sacl_fast train ..."


@dataclass(frozen=True)
class Launch:
    """This process among those that were started together."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    """Among the processes of this machine: the GPU that is this one's."""
    address: str = ""
    """Where rank 0 is, as ADDRESS:PORT; empty for one process."""


def read_launch(environ: MutableMapping[str, str] = os.environ) -> Launch:
    """What the environment says. SLURM's variables are made torchrun's in ``environ``.

    Raises:
        UserError: variables that contradict one another or that are no numbers, or a launcher that
            does not say where the processes find one another.
    """
    _refuse_mpirun(environ)
    adopt_slurm(environ)
    if not environ.get("WORLD_SIZE"):
        if environ.get("RANK"):
            raise UserError(
                f"RANK is {environ['RANK']}, but WORLD_SIZE is not set; torchrun sets both "
                f"({_TORCHRUN}), and without RANK one process trains alone"
            )
        return Launch()
    world_size = _number(environ, "WORLD_SIZE", least=1)
    rank = _number(environ, "RANK", least=0, default=0 if world_size == 1 else None)
    if rank >= world_size:
        raise UserError(
            f"RANK is {rank} and WORLD_SIZE {world_size}; ranks from 0 to {world_size - 1} work"
        )
    local_rank = _number(environ, "LOCAL_RANK", least=0, default=0)
    if world_size == 1:
        return Launch(local_rank=local_rank)
    if not environ.get("MASTER_ADDR"):
        raise UserError(
            f"WORLD_SIZE is {world_size}, but MASTER_ADDR is not set, so the processes cannot find "
            f"one another; torchrun sets it ({_TORCHRUN}), and WORLD_SIZE=1 trains alone"
        )
    port = _number(environ, "MASTER_PORT", least=1, most=65_535)
    return Launch(rank, world_size, local_rank, f"{environ['MASTER_ADDR']}:{port}")


def _number(
    environ: Mapping[str, str],
    name: str,
    *,
    least: int,
    most: int | None = None,
    default: int | None = None,
) -> int:
    """A whole number from the environment; without a default it must be there."""
    given = environ.get(name, "")
    if not given and default is not None:
        return default
    if not (given.isascii() and given.isdecimal() and least <= int(given) <= (most or int(given))):
        said = f"is {given!r}" if given else "is not set"
        upward = f"from {least} to {most}" if most else f"of {least} or more"
        raise UserError(f"{name} {said}; a whole number {upward} works, which torchrun sets")
    return int(given)


def adopt_slurm(environ: MutableMapping[str, str]) -> None:
    """Set torchrun's variables from those of a SLURM step with several tasks; keep what is set.

    SLURM_NTASKS is not asked: batch scripts and ``salloc`` shells have it as well, and there one
    process was started. Nor is an interactive step (``srun --pty``).
    """
    if any(environ.get(name) for name in ("RANK", "WORLD_SIZE")) or "SLURM_PTY_PORT" in environ:
        return
    tasks, rank = environ.get("SLURM_STEP_NUM_TASKS", "1"), environ.get("SLURM_PROCID", "")
    if tasks == "1" or not rank:
        return
    values = {"RANK": rank, "WORLD_SIZE": tasks, "LOCAL_RANK": environ.get("SLURM_LOCALID", "0")}
    node, here = _number(environ, "SLURM_NODEID", least=0, default=0), _tasks_per_node(environ)
    if node < len(here) and not _is_bound(environ):
        values["LOCAL_WORLD_SIZE"] = str(here[node])
    values["MASTER_ADDR"] = _first_host(environ)
    job = _number(environ, "SLURM_JOB_ID", least=0, default=0)
    step = _number(environ, "SLURM_STEP_ID", least=0, default=0)
    # Below the ports that systems give out by themselves; another for each step of a job.
    values["MASTER_PORT"] = str(10_000 + (31 * job + step) % 20_000)
    for name, value in values.items():
        environ.setdefault(name, value)


def _tasks_per_node(environ: Mapping[str, str]) -> list[int]:
    """SLURM's ``4(x2),1`` as [4, 4, 1]."""
    text = environ.get("SLURM_STEP_TASKS_PER_NODE") or environ.get("SLURM_TASKS_PER_NODE") or ""
    found = re.findall(r"(\d+)(?:\(x(\d+)\))?", text)
    return [int(n) for n, times in found for _ in range(int(times or 1))]


def _is_bound(environ: Mapping[str, str]) -> bool:
    """Whether each task has cores of its own, which then are not to be shared out again."""
    kind = environ.get("SLURM_CPU_BIND_TYPE", "")
    return bool(kind) and not kind.startswith("none")


def _first_host(environ: Mapping[str, str]) -> str:
    """The host of rank 0: the first of a list such as ``gpu[03-07,11],big1``."""
    hosts = (
        environ.get("SLURM_STEP_NODELIST")
        or environ.get("SLURM_JOB_NODELIST")
        or environ.get("SLURM_NODELIST")
    )
    if not hosts:
        raise UserError(
            "srun has started several tasks, but SLURM_STEP_NODELIST does not say where; "
            "MASTER_ADDR=HOST names the host of the first"
        )
    # Up to the first comma that is not within brackets; of each bracket the first number.
    first = re.match(r"(?:\[[^\]]*\]|[^,\[])+", hosts)
    return re.sub(r"\[([^\],-]+)[^\]]*\]", r"\1", first.group() if first else hosts)


def _refuse_mpirun(environ: Mapping[str, str]) -> None:
    """Several processes of an MPI launcher would each train alone, into the same folder."""
    if environ.get("WORLD_SIZE"):
        return
    # srun sets PMI_SIZE too, beside its own variables.
    names = ("OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE", "PMI_SIZE")
    for name in names[: 2 if "SLURM_JOB_ID" in environ else 3]:
        if environ.get(name, "1") != "1":
            raise UserError(
                f"an MPI launcher has started {environ[name]} processes ({name}), and each would "
                f"train alone; {_TORCHRUN} works, and WORLD_SIZE=1 if each is to train alone"
            )
