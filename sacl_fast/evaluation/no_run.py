"""What to say of a path that holds no trained encoder, but something else that sacl-fast wrote."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from sacl_fast.encoders import read_encoder_metadata
from sacl_fast.engine.checkpoint import list_checkpoints
from sacl_fast.engine.run_folder import CHECKPOINTS, CONFIG
from sacl_fast.errors import UserError, reason_and_remedy
from sacl_fast.files import kind_of

WORKS = "a run folder, a checkpoint (.pt) or an encoder (.safetensors) works"
_EXPORTED = (".safetensors", ".onnx", ".pt2", ".pte", ".tflite", ".mlpackage")


def of_finetuning(path: Path, state: dict[str, Any] | None = None) -> UserError:
    """For the files of a fine-tuning; ``state``: of its checkpoint."""
    said = f": {state['path']}" if state and isinstance(state.get("path"), str) else ""
    return UserError(
        f"{path} is of a fine-tuning, whose last.safetensors sacl_fast.load_classifier opens; "
        f"what was fine-tuned works here{said}"
    )


def in_folder(folder: Path) -> UserError:
    """For a folder without a run's checkpoints and encoders."""
    files, folders = _content(folder)
    weights = [file for file in files if file.suffix == ".safetensors"]
    if any(_is_classifier(file) for file in weights):
        return of_finetuning(folder)
    if exported := [path for path in (*files, *folders) if _is_exported(path)]:
        names = ", ".join(path.name for path in exported)
        opened = [path for path in exported if path in weights]
        works = (
            f"the path of a .safetensors file works, such as {opened[0]}"
            if opened
            else "their own runtimes open these; the run that they were exported from works here"
        )
        return UserError(f"{folder} holds exported files ({names}); {works}")
    runs = [child for child in folders if _is_run(child)]
    around = [outer for outer in folder.absolute().parents[:2] if _is_run(outer)]
    where = f"{runs[-1]} in it" if runs else f"{around[0]} that it is in" if around else ""
    hint = f"the run folder {where} works" if where else WORKS
    return UserError(f"{folder} holds no run: no checkpoint and no encoder; {hint}")


def _content(folder: Path) -> tuple[list[Path], list[Path]]:
    """The files and the folders in it."""
    try:
        there = sorted(folder.iterdir())
        return [path for path in there if path.is_file()], [p for p in there if p.is_dir()]
    except OSError as error:
        raise UserError(f"cannot read folder {folder}: {reason_and_remedy(error)}") from None


def _is_exported(path: Path) -> bool:
    return path.name.startswith("encoder_") and path.suffix in _EXPORTED


def _is_classifier(file: Path) -> bool:
    try:
        return "finetuned_steps" in read_encoder_metadata(file)
    except UserError:
        return False


def _is_run(folder: Path) -> bool:
    try:
        return kind_of(folder / CONFIG) == "file" and bool(list_checkpoints(folder / CHECKPOINTS))
    except UserError:
        return False
