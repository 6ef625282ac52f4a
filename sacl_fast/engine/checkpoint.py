"""Checkpoints: everything a run needs to go on as if it had never stopped.

A checkpoint is a file of ``torch.save``, which holds tensors and plain values only and is read
with ``weights_only=True``, and a seal after it: the SHA-256 of all bytes before. torch writes
checksums and never looks at them, so that without the seal a flipped bit would be trained on.
(Readers of zip archives, torch among them, pass over what stands after the end.)
"""

from __future__ import annotations

import hashlib
import logging
import os
import pickle
import re
import struct
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from sacl_fast.errors import UserError, reason_and_remedy, reason_of
from sacl_fast.files import kind_of, whole_copy, whole_file

logger = logging.getLogger(__name__)

FORMAT = 2
_UNSEALED_FORMAT = 1  # of earlier versions
BEST = "best.pt"
_NAME = re.compile(r"step_(\d+)\.pt")
_SEAL = b"\nsacl-fast sha256 "
_SEAL_LENGTH = len(_SEAL) + hashlib.sha256().digest_size * 2 + 1

_CONTENT: dict[str, type | tuple[type, ...]] = {
    "config": dict,
    "step": int,
    "steps_per_epoch": int,
    "model": dict,
    "optimizer": dict,
    "scaler": dict,
    "random": list,
    "knn": dict,
    "knn_before": dict,
    "best_knn": (int, float),
}
# What a checkpoint of each command holds, and none of the others.
_WRITTEN_BY = {
    "config": "sacl-fast train",
    "settings": "sacl-fast finetune",
    "layers": "sacl-fast eval linear",
}
# What zipfile and pickle raise of bytes that are something else: pickle's documentation names
# some and calls the list open.
_NOT_READABLE = (OSError, RuntimeError, EOFError, ValueError, TypeError, LookupError,
                 AttributeError, ArithmeticError, AssertionError, MemoryError, ImportError,
                 pickle.UnpicklingError, struct.error, zipfile.BadZipFile, zlib.error)  # fmt: skip


class UnusableCheckpoint(UserError):
    """The file is damaged or something else; the checkpoint before it may work."""


class OfAnotherCommand(UnusableCheckpoint):
    """A whole checkpoint, of something else than a run of the command that reads it."""

    def __init__(self, path: Path, command: str, own: str, state: dict[str, Any]) -> None:
        super().__init__(f"checkpoint {path} is of '{command}'; one of '{own}' works")
        self.state = state


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return folder / f"step_{step:08d}.pt"


def step_of(path: Path) -> int:
    """The step in a numbered checkpoint's name."""
    return int(path.stem.removeprefix("step_"))


def list_checkpoints(folder: Path) -> list[Path]:
    """The numbered checkpoints of a folder, oldest first; none where there is no folder.

    Raises:
        UserError: it is something else, or cannot be read.
    """
    kind = kind_of(folder)
    if kind is None:
        return []
    if kind != "folder":
        raise UserError(f"{folder} is not a folder, but is where checkpoints belong; remove it")
    try:
        names = os.listdir(folder)
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {reason_and_remedy(error)}") from None
    return sorted((folder / name for name in names if _NAME.fullmatch(name)), key=step_of)


def save_checkpoint(path: Path, state: dict[str, Any], *, keep: int) -> None:
    """Write a checkpoint and delete the ones before it but for ``keep - 1``.

    Raises:
        UserError: it cannot be written (a full disk, say). Earlier checkpoints are as they were.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with whole_file(path) as file:
            hashing = _Hashing(file)
            torch.save({"format": FORMAT, **state}, hashing)  # type: ignore[arg-type]
            file.write(hashing.seal())
    except OSError as error:
        raise UserError(
            f"cannot write checkpoint {path}: {reason_of(error)} ({_what_is_kept(path.parent)})"
        ) from error
    before = [old for old in list_checkpoints(path.parent) if step_of(old) < step_of(path)]
    for old in before[: max(0, len(before) + 1 - keep)]:
        try:
            old.unlink(missing_ok=True)
        except OSError as error:
            logger.warning("cannot delete the old checkpoint %s: %s", old, reason_of(error))


def mark_best(path: Path) -> None:
    """Keep the checkpoint at ``path`` as ``best.pt`` beside it, whatever is deleted later."""
    best = path.parent / BEST
    try:
        whole_copy(path, best)
    except OSError as error:
        raise UserError(f"cannot write checkpoint {best}: {reason_and_remedy(error)}") from error


def load_checkpoint(
    path: Path, content: Mapping[str, type | tuple[type, ...]] = _CONTENT
) -> dict[str, Any]:
    """A checkpoint's state, on the CPU. ``content``: what it must hold; the default is that of a
    pre-training run.

    Raises:
        UnusableCheckpoint: no such file, a damaged one, or one that is no checkpoint of this
            engine.
    """
    try:
        kind = kind_of(path)
    except UserError as error:
        raise UnusableCheckpoint(str(error)) from None
    if kind is None:
        raise UnusableCheckpoint(f"no checkpoint at {path}")
    if kind != "file":
        found = "a folder" if kind == "folder" else "a pipe or a device"
        raise UnusableCheckpoint(f"{path} is {found} and no checkpoint; a file works")
    try:
        sealed = _verify(path)
        state = torch.load(path, map_location="cpu", weights_only=True)
    except _NOT_READABLE as error:
        why = reason_of(error)
        if isinstance(error, pickle.UnpicklingError):  # torch advises to run whatever it holds
            why = "it holds other things than tensors and plain values"
        raise UnusableCheckpoint(
            f"checkpoint {path} cannot be read ({why}); it is damaged or not a checkpoint of "
            "sacl-fast"
        ) from error
    _check_content(path, state, sealed, content)
    return state


def changed_settings(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ between two configurations, as ``key: there -> here``. Those that
    only one of them knows are of another version, and passed over."""
    changes: list[str] = []
    for key in current.keys() & saved.keys():
        there, here = saved[key], current[key]
        if isinstance(there, dict) and isinstance(here, dict):
            changes += changed_settings(there, here, f"{prefix}{key}.")
        elif there != here:
            changes.append(f"{prefix}{key}: {there!r} -> {here!r}")
    return sorted(changes)


def random_state(device: torch.device) -> dict[str, torch.Tensor]:
    """The state of torch's generators on the CPU and on a GPU."""
    state = {"cpu": torch.get_rng_state()}
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    if device.type == "mps":
        state["mps"] = torch.mps.get_rng_state()
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what ``random_state`` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
    if device.type == "mps" and "mps" in state:
        torch.mps.set_rng_state(state["mps"])


class _Hashing:
    """Passes on what ``torch.save`` writes, which it does from front to back, and hashes it."""

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._hash = file, hashlib.sha256()

    def write(self, data: bytes) -> int:
        self._hash.update(data)
        return self._file.write(data)

    def flush(self) -> None:
        self._file.flush()

    def seal(self) -> bytes:
        return _SEAL + self._hash.hexdigest().encode() + b"\n"


def _verify(path: Path) -> bool:
    """Read a checkpoint through and hold it against its seal; False where it has none, and is
    held against the checksums that torch wrote.

    Raises:
        ValueError: they differ.
    """
    with open(path, "rb") as file:
        length = max(0, os.fstat(file.fileno()).st_size - _SEAL_LENGTH)
        file.seek(length)
        seal = file.read()
        if seal.startswith(_SEAL):
            file.seek(0)
            hashed = hashlib.sha256()
            while length and (block := file.read(min(length, 1 << 20))):
                hashed.update(block)
                length -= len(block)
            if seal != _SEAL + hashed.hexdigest().encode() + b"\n":
                raise ValueError("its checksum is another")
            return True
        file.seek(0)
        if not zipfile.is_zipfile(file):
            raise ValueError("its end is missing, or it never was a file of torch.save")
        with zipfile.ZipFile(file) as archive:
            if (damaged := archive.testzip()) is not None:
                raise ValueError(f"the checksum of {damaged} is another")
    return False


def _check_content(
    path: Path, state: Any, sealed: bool, content: Mapping[str, type | tuple[type, ...]]
) -> None:
    if not isinstance(state, dict) or "format" not in state:
        raise UnusableCheckpoint(f"{path} is not a checkpoint of sacl-fast")
    found = state["format"]
    if not isinstance(found, int) or found not in (_UNSEALED_FORMAT, FORMAT):
        raise UnusableCheckpoint(
            f"checkpoint {path} has format {str(found)[:40]}, this version reads "
            f"{_UNSEALED_FORMAT} and {FORMAT}"
        )
    if found == FORMAT and not sealed:
        raise UnusableCheckpoint(f"checkpoint {path} is damaged: its checksum is missing")
    lacking = [key for key, kind in content.items() if not isinstance(state.get(key), kind)]
    command = _command_of(state)
    if lacking and command and command != _command_of(content):
        raise OfAnotherCommand(path, command, _command_of(content), state)
    if lacking or state.get("steps_per_epoch", 1) < 1 or state["step"] < 0:
        raise UnusableCheckpoint(
            f"checkpoint {path} is not whole: it lacks {', '.join(lacking) or 'a valid step'}"
        )


def _command_of(content: Mapping[str, Any]) -> str:
    return next((name for key, name in _WRITTEN_BY.items() if key in content), "")


def _what_is_kept(folder: Path) -> str:
    try:
        left = list_checkpoints(folder)
    except UserError:
        left = []
    return f"{left[-1].name} is kept and --resume auto goes on from it" if left else "none yet"
