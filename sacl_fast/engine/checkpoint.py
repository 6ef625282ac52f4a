"""Checkpoints: everything a run needs to go on as if it had never stopped.

Files are written to a temporary name, synced and renamed, so that a file under its own name is
whole. They hold tensors and plain values only and are read with ``weights_only=True``.
"""

from __future__ import annotations

import os
import pickle
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import safetensors.torch
import torch

from sacl_fast.errors import UserError

FORMAT = 1
BEST = "best.pt"
_NAME = re.compile(r"step_(\d+)\.pt")
# What must agree between a checkpoint and the run that loads it.
_ARCHITECTURE = ("encoder.name", "encoder.width", "encoder.stem", "views.size", "projector.hidden",
                 "projector.out", "projector.layers", "slim.batch_norm")  # fmt: skip


def checkpoint_path(folder: Path, step: int) -> Path:
    """Where the checkpoint after ``step`` steps lies."""
    return folder / f"step_{step:08d}.pt"


def list_checkpoints(folder: Path) -> list[Path]:
    """The numbered checkpoints of a folder, oldest first."""
    found = folder.glob("step_*.pt") if folder.is_dir() else []
    return sorted(path for path in found if _NAME.fullmatch(path.name))


def save_checkpoint(path: Path, state: dict[str, Any], *, keep: int) -> None:
    """Write a checkpoint and delete all but the newest ``keep``.

    Raises:
        UserError: it cannot be written (a full disk, say). Earlier checkpoints are as they were.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with _whole_file(path) as file:
            torch.save({"format": FORMAT, **state}, file)
    except (OSError, RuntimeError) as error:  # torch's zip writer reports a full disk as the latter
        left = list_checkpoints(path.parent)
        kept = f"{left[-1].name} is kept and --resume auto goes on from it" if left else "none yet"
        raise UserError(f"cannot write checkpoint {path}: {_first_line(error)} ({kept})") from error
    for old in list_checkpoints(path.parent)[:-keep]:
        old.unlink(missing_ok=True)


def mark_best(path: Path) -> None:
    """Keep the checkpoint at ``path`` as ``best.pt`` beside it, whatever is deleted later."""
    best, temporary = path.parent / BEST, path.parent / f"{BEST}.tmp"
    try:
        temporary.unlink(missing_ok=True)
        try:
            os.link(path, temporary)
        except OSError:  # a file system without hard links
            shutil.copyfile(path, temporary)
        os.replace(temporary, best)
    except OSError as error:
        raise UserError(f"cannot write checkpoint {best}: {_first_line(error)}") from error


def save_encoder(path: Path, state: dict[str, torch.Tensor]) -> None:
    """Write an encoder's ``state_dict`` as safetensors.

    Raises:
        UserError: it cannot be written; no half of it is left.
    """
    try:
        with _whole_file(path) as file:
            file.write(safetensors.torch.save(state))
    except OSError as error:
        raise UserError(f"cannot write encoder {path}: {_first_line(error)}") from error


@contextmanager
def _whole_file(path: Path) -> Iterator[BinaryIO]:
    """A file that appears under its name when all of it is on the disk, or not at all."""
    temporary = path.with_name(f"{path.name}.tmp")
    try:
        with temporary.open("wb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def load_checkpoint(path: Path) -> dict[str, Any]:
    """A checkpoint's state, on the CPU.

    Raises:
        UserError: no such file, a damaged one, or one that is no checkpoint of this engine.
    """
    if not path.is_file():
        raise UserError(f"no checkpoint at {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        raise UserError(
            f"checkpoint {path} cannot be read ({_first_line(error)}); it is damaged or not a "
            "checkpoint of sacl-fast"
        ) from error
    if not isinstance(state, dict) or "format" not in state:
        raise UserError(f"{path} is not a checkpoint of sacl-fast")
    if state["format"] != FORMAT:
        raise UserError(
            f"checkpoint {path} has format {state['format']}, this version reads {FORMAT}"
        )
    return state


def check_architecture(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse a checkpoint of another architecture, naming what differs.

    Args:
        saved, current: configurations as of ``config.to_dict``.
    """
    differences = [
        f"{key} is {_lookup(current, key)!r} here and {_lookup(saved, key)!r} there"
        for key in _ARCHITECTURE
        if _lookup(saved, key) != _lookup(current, key)
    ]
    if differences:
        raise UserError(
            f"checkpoint {path} is of another architecture: {'; '.join(differences)}. Resume with "
            "the checkpoint's values, or start a new run with another --out"
        )


def changed_settings(saved: dict[str, Any], current: dict[str, Any], prefix: str = "") -> list[str]:
    """The settings that differ between two configurations, as ``key: there -> here``."""
    changes: list[str] = []
    for key in current.keys() | saved.keys():
        there, here = saved.get(key), current.get(key)
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
    return state


def restore_random_state(state: dict[str, torch.Tensor], device: torch.device) -> None:
    """Put back what ``random_state`` returned."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def _lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _first_line(error: BaseException) -> str:
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return str(error).partition("\n")[0][:200] or type(error).__name__
