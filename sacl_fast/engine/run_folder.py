"""The run folder: where a run writes, and what it says about itself there.

::

    config.yaml          the resolved configuration; sacl-fast train --config reads it
    environment.json     versions, device, git commit, command line
    metrics.jsonl        every reading of the metrics
    views.png            both views of some images, as the encoder sees them
    curves.png           the metrics as curves
    checkpoints/         step_NNNNNNNN.pt (the last ones), best.pt (by kNN, or by RankMe)
    encoder.safetensors  the dense encoder after training, under timm's names
    encoder_slim.safetensors  the slim one likewise, where it is another
    encoder_best.safetensors, encoder_best_slim.safetensors  those of best.pt, where it is earlier
    trace.json.gz        some steps as the profiler saw them (--profile), one of each process
    superseded/          what a run left that went on from an earlier step (see resume.py)
    run.lock             whose folder it is, while a run writes there (see lock.py)
"""

from __future__ import annotations

import contextlib
import errno
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

import yaml
from torch import nn

from sacl_fast.config import Config, to_dict
from sacl_fast.data.images.root import refuse_among_images
from sacl_fast.engine.checkpoint import list_checkpoints
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.lock import RunLock
from sacl_fast.errors import UserError, reason_of
from sacl_fast.files import kind_of, remove_leftovers, user_path, whole_file

logger = logging.getLogger(__name__)

CONFIG, ENVIRONMENT, METRICS = "config.yaml", "environment.json", "metrics.jsonl"
VIEWS, CURVES, CHECKPOINTS = "views.png", "curves.png", "checkpoints"
ENCODER, SUPERSEDED = "encoder.safetensors", "superseded"
ENCODERS = {"dense": ENCODER, "slim": "encoder_slim.safetensors"}
BEST_ENCODERS = {"dense": "encoder_best.safetensors", "slim": "encoder_best_slim.safetensors"}


@dataclass(frozen=True)
class RunFolder:
    """The folder of a run, known to all ranks and written by the first."""

    path: Path
    lock: RunLock | None
    """The first rank's hold on it."""

    def is_gone(self) -> bool:
        """Whether it was removed, renamed or emptied since the run began; known to the first
        rank. By its names, since some file systems number files anew."""
        return self.lock is not None and all(map(_is_missing, (self.lock.path, self.path / CONFIG)))

    def check(self) -> None:
        """See ``RunLock.check``."""
        if self.lock is not None:
            self.lock.check()


@contextlib.contextmanager
def claimed_run_folder(config: Config, ranks: Ranks) -> Iterator[RunFolder]:
    """The folder that ``config`` asks for, made and locked against other runs; empty again where
    nothing was written into it.

    Raises:
        UserError: on all ranks. It holds a run already and ``resume`` is ``never``, is among the
            images, another process writes there, or it cannot be made or written.
    """
    with contextlib.ExitStack() as held:
        locks: list[RunLock] = []

        def claim() -> Path:
            chosen = choose_run_folder(config)
            refuse_among_images(chosen or _new_runs(config), config.data)
            folder, created = _make(chosen, config)
            if created:
                held.callback(_remove_if_empty, folder)
            locks.append(RunLock(folder))
            held.callback(locks[0].release)
            list_checkpoints(folder / CHECKPOINTS)  # which may be no folder
            return folder

        yield RunFolder(ranks.on_first(claim), locks[0] if locks else None)


def choose_run_folder(config: Config) -> Path | None:
    """The folder of this run: ``config.out``, or None for a new one under ``runs/PRESET``.

    With ``resume`` ``auto`` and no ``out`` it is the preset's newest unfinished run, if there is
    one; with a checkpoint's path and no ``out`` it is the run that the checkpoint is of.

    Raises:
        UserError: the folder holds a run already and ``resume`` is ``never``.
    """
    if config.out is not None:
        folder = user_path(config.out, "out")
        if config.resume == "never" and _holds_a_run(folder):
            raise UserError(
                f"{folder} already holds a run; --resume auto goes on with it, another --out "
                "starts a new one"
            )
        return folder
    if config.resume == "never":
        return None
    if config.resume == "auto":
        unfinished = _unfinished_runs(_new_runs(config))
        return unfinished[-1] if unfinished else None
    given = user_path(config.resume, "resume")
    for checkpoints in (given.parent, given, given / CHECKPOINTS):
        if checkpoints.name == CHECKPOINTS and kind_of(checkpoints) == "folder":
            return checkpoints.parent
    return None


def prepare_run_folder(
    folder: Path, config: Config, environment: dict[str, object], *, checkpoint_size: int
) -> None:
    """Try what the run will need of its folder, write the configuration and the environment into
    it, and remove what killed processes left.

    Args:
        checkpoint_size: bytes of one checkpoint.

    Raises:
        UserError: the folder cannot be written, or a checkpoint does not fit on its disk.
    """
    checkpoints = folder / CHECKPOINTS
    try:
        checkpoints.mkdir(exist_ok=True)
        with tempfile.TemporaryFile(dir=checkpoints) as file:
            file.write(b"can be written")
        for written in (folder, checkpoints):
            remove_leftovers(written)
        _check_space(checkpoints, checkpoint_size, config.checkpoint.keep)
        _write(folder / CONFIG, yaml.safe_dump(to_dict(config), sort_keys=False))
        _write(folder / ENVIRONMENT, json.dumps(environment, indent=2, default=str) + "\n")
    except OSError as error:
        raise UserError(
            f"cannot write to run folder {folder}: {reason_of(error)}; --out names another"
        ) from error


def size_of_checkpoint(model: nn.Module, optimizer: str) -> int:
    """Bytes of a checkpoint: the model's tensors, and the optimiser's for each of its weights."""
    moments = 2 if optimizer == "adamw" else 1
    tensors = [*model.parameters(), *model.buffers(), *moments * [*model.parameters()]]
    return sum(tensor.nbytes for tensor in tensors)


def _new_runs(config: Config) -> Path:
    """Where the folders of runs are that no ``out`` names."""
    return Path("runs") / config.preset


def _make(folder: Path | None, config: Config) -> tuple[Path, bool]:
    """The folder, or a new one, and whether it was made here."""
    stamp = _new_runs(config) / datetime.now().strftime("%Y%m%d-%H%M%S")
    number = 1
    while True:
        wanted = folder or (stamp if number == 1 else stamp.with_name(f"{stamp.name}-{number}"))
        try:
            wanted.mkdir(parents=True)
            return wanted, True
        except FileExistsError:
            if folder is None:  # another run began in the same second
                number += 1
            elif kind_of(folder) == "folder":
                return folder, False
            else:
                raise UserError(f"{folder} is no folder; --out names another") from None
        except OSError as error:
            raise UserError(
                f"cannot make run folder {wanted}: {reason_of(error)}; --out names another"
            ) from error


def _holds_a_run(folder: Path) -> bool:
    return (
        kind_of(folder / METRICS) is not None
        or kind_of(folder / ENCODER) is not None
        or bool(list_checkpoints(folder / CHECKPOINTS))
    )


def _unfinished_runs(runs: Path) -> list[Path]:
    """Run folders with checkpoints and no final encoder, oldest first."""
    if kind_of(runs) != "folder":
        return []
    found = []
    for folder in sorted(runs.iterdir()):
        try:
            if list_checkpoints(folder / CHECKPOINTS) and kind_of(folder / ENCODER) is None:
                found.append(folder)
        except UserError as error:
            logger.warning("passed over %s: %s", folder, error)
    return found


def _is_missing(path: Path) -> bool:
    try:
        os.stat(path)
    except OSError as error:  # others pass, such as a server that does not answer
        return error.errno in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE)
    return False


def _remove_if_empty(folder: Path) -> None:
    with contextlib.suppress(OSError):
        if os.listdir(folder) == [CHECKPOINTS]:
            (folder / CHECKPOINTS).rmdir()
        folder.rmdir()


def _check_space(folder: Path, checkpoint: int, keep: int) -> None:
    free, most = shutil.disk_usage(folder).free, checkpoint * (keep + 2)
    if free < checkpoint:
        raise UserError(
            f"{folder} has {free / 1e6:,.1f} MB free, and a checkpoint of this run takes "
            f"{checkpoint / 1e6:,.1f} MB; make room, or name a folder on another disk with --out"
        )
    there = sum(path.stat().st_size for path in list_checkpoints(folder))
    if free + there < most:
        logger.warning(
            "%s has %.1f MB free; the checkpoints of this run (%d, the best one and one being "
            "written) take up to %.1f MB. --checkpoint.keep 1 takes less",
            folder, free / 1e6, keep, most / 1e6,
        )  # fmt: skip


def _write(path: Path, text: str) -> None:
    with whole_file(path) as file:
        file.write(text.encode())
