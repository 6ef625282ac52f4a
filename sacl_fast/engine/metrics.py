"""The numbers of a run on disk: ``metrics.jsonl``, and TensorBoard or Weights & Biases besides.

One JSON object per line, appended as it happens, so a run that was killed loses nothing but the
line being written::

    {"kind": "train", "step": 10, "epoch": 0.25, "time": 1763800000.123, "loss": 11.2, "lr": 0.01}
    {"kind": "knn", "step": 40, "epoch": 1.0, "time": 1763800009.456, "knn_dense": 31.5}
    {"kind": "label_free", "step": 40, "epoch": 1.0, "time": 1763800009.456, "rankme_dense": 18.2}
    {"kind": "event", "step": 40, "epoch": 1.0, "time": 1763800010.789, "message": "..."}

``step`` counts optimiser steps done, ``epoch`` is ``step`` in epochs, ``time`` is Unix time in
seconds. JSON has no NaN and no infinity: such values are written as ``null``. A resumed run goes
on in the same file, from which the lines after the checkpoint's step are set aside, for those
steps are taken again.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO, Literal

from sacl_fast.config import LogConfig
from sacl_fast.engine.run_folder import METRICS
from sacl_fast.errors import UserError, reason_and_remedy
from sacl_fast.files import kind_of, whole_file

logger = logging.getLogger(__name__)

_WANDB_ID = "wandb-id.txt"

Kind = Literal["train", "knn", "label_free", "accuracy", "event"]


def read_metrics(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The lines of a metrics file; a half-written last one is left out, and damaged ones are with
    a warning.

    Raises:
        UserError: the file cannot be read.
    """
    path = Path(path)
    with _disk(path, "read"):
        lines = path.read_bytes().splitlines()
    rows = [_row(line) for line in lines]
    damaged = [number for number, row in enumerate(rows[:-1], start=1) if row is None]
    if damaged:
        logger.warning(
            "%s: %d of %d lines are damaged and left out, line %d first",
            path, len(damaged), len(lines), damaged[0],
        )  # fmt: skip
    return [row for row in rows if row is not None]


class MetricWriter:
    """Writes the metrics of one run; made by the first process only.

    Args:
        run_folder: exists already.
        config_dict: the configuration as plain values, shown by TensorBoard and W&B.
        resume_step: step of the checkpoint that the run goes on from; None for a new run. The file
            itself goes on where it ends: see ``rewind_metrics``.

    Raises:
        UserError: here and in ``write``, if the disk is full or the folder cannot be written;
            here, if ``log.wandb`` is set and wandb is not installed.
    """

    def __init__(
        self,
        run_folder: str | os.PathLike[str],
        log: LogConfig,
        config_dict: Mapping[str, Any],
        resume_step: int | None,
    ) -> None:
        self.folder = Path(run_folder)
        self.path = self.folder / METRICS
        self._tensorboard: Any = None
        self._wandb: Any = None
        self._file = self._open()
        try:
            if log.tensorboard:
                self._tensorboard = self._open_tensorboard(config_dict, resume_step)
            if log.wandb:
                self._wandb = self._open_wandb(log.wandb, config_dict)
        except BaseException:
            self.close()
            raise

    def write(
        self, kind: Kind, step: int, epoch: float, values: Mapping[str, float | str | None]
    ) -> None:
        """Append one line: the values beside ``kind``, ``step``, ``epoch`` and ``time``."""
        clean = {key: _finite(value) for key, value in values.items()}
        row = {"kind": kind, "step": step, "epoch": round(epoch, 6), "time": round(time.time(), 3)}
        line = memoryview(json.dumps(row | clean, allow_nan=False).encode() + b"\n")
        with _disk(self.path, "write"):
            if not self.path.exists() and self.folder.exists():
                logger.warning("%s was removed and goes on in a new file", self.path)
                self._file.close()
                self._file = self._open()
            while line:  # an almost full disk takes part of a line, and then none
                line = line[self._file.write(line) :]
        for name, value in values.items():
            self._to_tensorboard(f"{kind}/{name}", value, step)
        if self._wandb is not None:
            named = {f"{kind}/{name}": value for name, value in clean.items()}
            self._wandb.log({"step": step, "epoch": epoch, **named})

    def close(self) -> None:
        """Close the file and end the TensorBoard and W&B logs. May be called twice."""
        self._file.close()
        tensorboard, self._tensorboard = self._tensorboard, None
        if tensorboard is not None:
            with _disk(self.folder / "tensorboard", "write"):
                tensorboard.close()
        wandb, self._wandb = self._wandb, None
        if wandb is not None:
            wandb.finish()

    def __enter__(self) -> MetricWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self) -> BinaryIO:
        with _disk(self.path, "write"):
            # Unbuffered: what failed to be written is not tried again when the file is closed.
            return open(self.path, "ab", buffering=0)

    def _open_tensorboard(self, config_dict: Mapping[str, Any], resume_step: int | None) -> Any:
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ModuleNotFoundError as error:
            if error.name not in ("tensorboard", "tensorboard.compat"):
                raise
            logger.info(
                "TensorBoard is not installed, so no events are written "
                "(pip install 'sacl-fast[log]')"
            )
            return None
        folder = self.folder / "tensorboard"
        with _disk(folder, "write"):
            # Events from this step on that an earlier process wrote are hidden.
            purge = 0 if resume_step is None else resume_step + 1
            writer = SummaryWriter(str(folder), purge_step=purge)
            text = json.dumps(config_dict, indent=2, default=str)
            writer.add_text("config", f"```json\n{text}\n```", resume_step or 0)
        return writer

    def _to_tensorboard(self, tag: str, value: float | str | None, step: int) -> None:
        if self._tensorboard is None or value is None:
            return
        add = self._tensorboard.add_text if isinstance(value, str) else self._tensorboard.add_scalar
        with _disk(self.folder / "tensorboard", "write"):
            add(tag, value, step)

    def _open_wandb(self, project: str, config_dict: Mapping[str, Any]) -> Any:
        try:
            wandb = importlib.import_module("wandb")
        except ModuleNotFoundError as error:
            if error.name != "wandb":
                raise
            raise UserError(
                f"log.wandb is {project!r}, but wandb is not installed; "
                "pip install 'sacl-fast[log]' installs it"
            ) from None
        id_file = self.folder / _WANDB_ID
        run = wandb.init(
            project=project,
            name=self.folder.name,
            dir=str(self.folder),
            config=dict(config_dict),
            id=id_file.read_text().strip() if id_file.exists() else None,
            resume="allow",
        )
        # Our own axis: W&B's internal step may not go back, a resumed run's does.
        run.define_metric("*", step_metric="step")
        with _disk(id_file, "write"), whole_file(id_file) as file:
            file.write(f"{run.id}\n".encode())
        return run


def rewind_metrics(path: Path, step: int, aside: Path) -> int:
    """Take the lines after ``step``, and those that are damaged, out of a metrics file and write
    them to ``aside``, whose folder is made where there are any. Returns how many there were.

    Raises:
        UserError: one of the files cannot be read or written; then ``path`` is as it was.
    """
    kind = kind_of(path)
    if kind is None:
        return 0
    if kind != "file":
        raise UserError(f"{path} is no file, but is where a run's metrics belong; remove it")
    with _disk(path, "read"):
        lines = path.read_bytes().splitlines(keepends=True)
    keep, rest = [], []
    for line in lines:
        row = _row(line)
        (rest if row is None or _step(row) > step or line[-1:] != b"\n" else keep).append(line)
    if rest:
        with _disk(aside, "write"):
            aside.parent.mkdir(parents=True, exist_ok=True)
            with whole_file(aside) as file:
                file.write(b"".join(rest))
        with _disk(path, "write"), whole_file(path) as file:
            file.write(b"".join(keep))
    return len(rest)


def _row(line: bytes) -> dict[str, Any] | None:
    """A line's JSON object; None if it is none."""
    try:
        row = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) and math.isfinite(_step(row)) else None


def _step(row: dict[str, Any]) -> float:
    step = row.get("step", 0)
    return step if isinstance(step, (int, float)) else math.nan


def _finite(value: float | str | None) -> float | str | None:
    """The value as JSON can hold it: NaN and infinities become None."""
    if value is None or isinstance(value, str):
        return value
    return value if math.isfinite(value) else None


@contextmanager
def _disk(path: Path, what: Literal["read", "write"]) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UserError(f"cannot {what} {path}: {reason_and_remedy(error)}") from error
