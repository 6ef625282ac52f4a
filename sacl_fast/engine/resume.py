"""Going on from a checkpoint: which one, whether it fits, where it stands, what it supersedes.

A checkpoint that is damaged is passed over for the one before, with a warning. One that is of
another architecture, of other images or of a longer run is answered with a sentence: the ones
before it are too.

A run that goes on from an earlier step than it had reached leaves nothing deleted: later
checkpoints, a later ``best.pt``, the encoder of the end and the lines of ``metrics.jsonl`` after
that step are moved to ``superseded/DATE-TIME`` in the run folder. So the highest number in
``checkpoints/`` is always the newest.
"""

from __future__ import annotations

import logging
import math
import re
import shutil
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import torch

from sacl_fast.checks import counted
from sacl_fast.config import Config, to_dict, warmup_as_trained
from sacl_fast.data.images.fingerprint import fingerprint
from sacl_fast.data.images.pixel_file import shrunk_to
from sacl_fast.data.images.source import Source
from sacl_fast.engine.checkpoint import (
    BEST,
    UnusableCheckpoint,
    changed_settings,
    list_checkpoints,
    load_checkpoint,
    restore_random_state,
    step_of,
)
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.metrics import rewind_metrics
from sacl_fast.engine.run_folder import CHECKPOINTS, METRICS, SUPERSEDED
from sacl_fast.engine.step import TrainingStep
from sacl_fast.errors import UserError, reason_and_remedy, reason_of
from sacl_fast.files import kind_of, user_path
from sacl_fast.optim import learning_rate

logger = logging.getLogger(__name__)

# What must agree between a checkpoint and the run that loads it.
_ARCHITECTURE = ("encoder.name", "encoder.width", "encoder.stem", "views.size", "projector.hidden",
                 "projector.out", "projector.layers", "slim.batch_norm", "optim.name")  # fmt: skip
# With the images, what decides which of them are still to come in an epoch.
_ORDER = ("seed", "batch_size")
_OWN = ("out", "resume", "resume_at")  # settings of a start, not of a run
# What a finished run was trained with: settings, and groups of them.
_TRAINED_WITH = re.compile(
    r"(batch_size|seed|views|encoder|projector|loss|optim"
    r"|slim\.(ratio|exclude|refresh_steps|warmup_epochs|norm_gradient))[.:]"
)


@dataclass(frozen=True)
class Continuation:
    """A checkpoint and how it is gone on with."""

    path: Path
    state: dict[str, Any]
    step: int
    """The steps done, as this run counts them."""
    moved: bool
    """Whether that is the start of the next epoch, because images or their order are others."""
    finished: bool
    """Whether nothing is left to train."""

    def is_in(self, folder: Path) -> bool:
        """Whether the checkpoint is one of that run folder's own."""
        checkpoints = folder / CHECKPOINTS
        return checkpoints.is_dir() and checkpoints.samefile(self.path.parent)


def data_record(source: Source) -> dict[str, Any]:
    """What a checkpoint tells of the images it was trained on."""
    return {
        "fingerprint": fingerprint(source),
        "images": len(source),
        "classes": len(source.classes),
        "shrunk_to": shrunk_to(source),
    }


def find_continuation(
    ranks: Ranks,
    config: Config,
    folder: Path,
    *,
    data: dict[str, Any],
    steps_per_epoch: int,
    model: dict[str, Any],
) -> Continuation | None:
    """What to go on from, on every rank; None where the run starts.

    Args:
        data: as of ``data_record``, on rank 0.
        model: this run's ``state_dict``.

    Raises:
        UserError: on every rank; there is nothing that can be gone on from, though it is asked for.
    """
    found: list[Continuation] = []

    def choose() -> tuple[Path, int, bool, bool] | None:
        path, state = _newest_readable(config, folder, model)
        if path is None:
            return None
        step = _place_to_go_on(path, state, config, data, steps_per_epoch)
        finished = _check_epochs(path, state, config, step, steps_per_epoch)
        if finished:
            _check_trained_so(path, state["config"], to_dict(config))
        else:
            _say_what_changed(state, config, ranks, step, steps_per_epoch)
        moved = step != state["step"] or state["steps_per_epoch"] != steps_per_epoch
        moved |= _other_images(state, data)
        found.append(Continuation(path, state, step, moved, finished))
        return path, step, moved, finished

    chosen = ranks.on_first(choose)
    if chosen is None:
        return None
    path, step, moved, finished = chosen
    if not found:
        return ranks.together(
            lambda: Continuation(path, load_checkpoint(path), step, moved, finished)
        )
    return ranks.together(lambda: found[0])


def restore(found: Continuation, method: torch.nn.Module, step: TrainingStep, ranks: Ranks) -> None:
    """Put a checkpoint's weights, optimiser state and random numbers into place. Weight decay,
    momentum and the like stay as they are configured now.

    Raises:
        UserError: it does not fit.
    """
    state, optimizer = found.state, step.optimizer
    configured = [{k: v for k, v in g.items() if k != "params"} for g in optimizer.param_groups]
    try:
        method.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        if step.scaler.is_enabled() and state["scaler"]:
            step.scaler.load_state_dict(state["scaler"])
        if len(state["random"]) == ranks.world_size:
            restore_random_state(state["random"][ranks.rank], ranks.device)
    except (RuntimeError, ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"checkpoint {found.path} does not fit this run: {reason_of(error)}"
        ) from error
    for group, settings in zip(optimizer.param_groups, configured, strict=True):
        group.update(settings)


def resume_candidates(config: Config, folder: Path) -> list[Path]:
    """The checkpoints to resume from, the one to try first at the front."""
    if config.resume == "never":
        return []
    if config.resume == "auto":
        return list_checkpoints(folder / CHECKPOINTS)[::-1]
    given = user_path(config.resume, "resume")
    kind = kind_of(given)
    if kind is None:
        raise UserError(
            f"resume is {given}, where there is nothing; 'auto', 'never' or the path of a "
            "checkpoint works"
        )
    if kind == "folder":
        inside = given / CHECKPOINTS
        found = list_checkpoints(given) or (list_checkpoints(inside) if kind_of(inside) else [])
        if not found:
            raise UserError(f"no checkpoint in {given}")
        return found[::-1]
    return [given]


def set_aside(folder: Path, *, after: int, spare: Path | None = None) -> None:
    """Move what a run folder has of steps beyond ``after`` (-1: all) to ``superseded/DATE-TIME``,
    and say so. ``spare`` stays.

    Raises:
        UserError: something cannot be moved.
    """
    aside = _new_folder(folder / SUPERSEDED)
    checkpoints = folder / CHECKPOINTS
    later = [path for path in list_checkpoints(checkpoints) if step_of(path) > after]
    best = checkpoints / BEST
    if kind_of(best) is not None and best != spare and _step_inside(best, after) > after:
        later.append(best)
    later += sorted(folder.glob("encoder*.safetensors"))
    moved: list[str] = []
    for path in later:
        if path == spare:
            continue
        try:
            aside.mkdir(parents=True, exist_ok=True)
            shutil.move(path, aside / path.name)  # checkpoints/ may be a link to another disk
        except OSError as error:
            raise UserError(f"cannot move {path} to {aside}: {reason_and_remedy(error)}") from error
        moved.append(path.name)
    if lines := rewind_metrics(folder / METRICS, after, aside / METRICS):
        moved.append(f"{counted(lines, 'line')} of {METRICS}")
    if moved:
        begins = "begins at step 0" if after < 0 else f"goes on from step {after}"
        logger.warning("the run %s, so this is moved to %s: %s", begins, aside, ", ".join(moved))


def _newest_readable(
    config: Config, folder: Path, model: dict[str, Any]
) -> tuple[Path | None, dict[str, Any]]:
    candidates = resume_candidates(config, folder)
    for i, path in enumerate(candidates):
        try:
            state = load_checkpoint(path)
            _check_architecture(path, state["config"], to_dict(config))
            _check_state(path, state, model)
            return path, state
        except UnusableCheckpoint as error:
            if i + 1 == len(candidates):
                raise UnusableCheckpoint(
                    f"{error}. Another checkpoint (--resume PATH) works, or a new run (another "
                    "--out)"
                ) from error
            logger.warning("%s; trying the one before", error)
    return None, {}


def _check_architecture(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
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
            f"checkpoint {path} is of another architecture or optimiser: {'; '.join(differences)}. "
            "Resume with the checkpoint's values, or start a new run with another --out"
        )


def _check_state(path: Path, state: dict[str, Any], model: dict[str, Any]) -> None:
    """Refuse a checkpoint whose tensors are not this model's."""
    saved = state["model"]
    wrong = [
        name
        for name, here in model.items()
        if getattr(saved.get(name), "shape", None) != getattr(here, "shape", None)
    ]
    wrong += [name for name in saved if name not in model]
    if wrong:
        raise UnusableCheckpoint(
            f"checkpoint {path} does not fit this run: {len(wrong)} tensors are missing, of "
            f"another shape or unknown, {wrong[0]} first"
        )


def _place_to_go_on(
    path: Path, state: dict[str, Any], config: Config, data: dict[str, Any], steps_per_epoch: int
) -> int:
    """The steps done: the checkpoint's, or those at the start of the next epoch, where images or
    their order are others and ``resume_at`` allows that."""
    there, step = state["steps_per_epoch"], state["step"]
    differences: list[str] = []
    if _other_images(state, data):
        differences.append(_images_differ(state["data"], data))
    elif "data" not in state:
        logger.warning("%s does not say which images it was trained on", path)
    if there != steps_per_epoch:
        differences.append(f"{counted(there, 'step')} an epoch there, {steps_per_epoch} here")
    if step % there:  # the rest of the epoch would be other images
        differences += [
            f"{key} is {_lookup(state['config'], key)} there, {here} here"
            for key in _ORDER
            if (here := getattr(config, key)) != _lookup(state["config"], key)
        ]
    if not differences:
        return step
    if config.resume_at == "step":
        raise UserError(
            f"checkpoint {path} was trained on other images or in another order: "
            f"{'; '.join(differences)}. The images, seed and batch_size of then work, or "
            "--resume-at next_epoch, which goes on with those of now from the next epoch"
        )
    logger.warning("going on from the next epoch: %s", "; ".join(differences))
    return math.ceil(step / there) * steps_per_epoch


def _other_images(state: dict[str, Any], data: dict[str, Any]) -> bool:
    return "data" in state and state["data"]["fingerprint"] != data["fingerprint"]


def _images_differ(there: dict[str, Any], here: dict[str, Any]) -> str:
    for what in ("images", "classes"):
        if there[what] != here[what]:
            return f"{there[what]:,} {what} there, {here[what]:,} here"
    was, now = there.get("shrunk_to", 0), here["shrunk_to"]
    if was != now:
        sides = [f"shrunk to {side} px" if side else "in their own size" for side in (was, now)]
        return f"images are {sides[0]} there, {sides[1]} here"
    images = counted(there["images"], "image")
    return f"{images} there and here, but not the same (names, sizes, labels or order differ)"


def _check_epochs(
    path: Path, state: dict[str, Any], config: Config, step: int, steps_per_epoch: int
) -> bool:
    """Whether the checkpoint is the finished run's; refuse one that is beyond its end, or at the
    end of a run that was to be longer: its learning rate has not come down."""
    total = config.epochs * steps_per_epoch
    planned = _lookup(state["config"], "epochs")
    if step < total:
        return False
    if step == total and planned == config.epochs:
        return True
    raise UserError(
        f"checkpoint {path} is of step {state['step']} in epoch "
        f"{math.ceil(state['step'] / state['steps_per_epoch'])} of {planned}, so epochs "
        f"{config.epochs} leaves nothing to train; more epochs work, or an earlier checkpoint "
        "(--resume PATH)"
    )


def _check_trained_so(path: Path, saved: dict[str, Any], current: dict[str, Any]) -> None:
    """Refuse a finished run that was trained otherwise than is asked for now."""
    if told := "; ".join(filter(_TRAINED_WITH.match, changed_settings(saved, current))):
        raise UserError(
            f"checkpoint {path} is of a finished run, which was trained with other settings: "
            f"{told}. Those of then work, or a new run (another --out)"
        )


def _say_what_changed(
    state: dict[str, Any], config: Config, ranks: Ranks, step: int, steps_per_epoch: int
) -> None:
    saved, current = state["config"], to_dict(config)
    for change in changed_settings(saved, current):
        if not change.startswith(tuple(f"{key}:" for key in _OWN)):
            logger.warning("resuming with another %s", change)
    was = _rate(saved, state["step"], state["steps_per_epoch"])
    now = _rate(current, step, steps_per_epoch)
    if was is not None and now is not None and abs(now - was) > 0.01 * max(now, was):
        logger.warning("the learning rate goes on at %.3g; it would have been %.3g", now, was)
    if (there := len(state["random"])) != ranks.world_size:
        logger.warning(
            "resuming in %s what %d trained: the same batches in the same order; drop path draws "
            "other numbers",
            *(counted(ranks.world_size, "process"), there),
        )


def _rate(config: dict[str, Any], step: int, steps_per_epoch: int) -> float | None:
    """The learning rate after ``step`` steps; None of a configuration that does not say."""
    keys = "optim.lr", "batch_size", "optim.warmup_epochs", "epochs"
    lr, batch_size, warmup, epochs = (_lookup(config, key) for key in keys)
    if None in (lr, batch_size, warmup, epochs):
        return None
    return learning_rate(
        step,
        base=lr * batch_size / 256,
        warmup_steps=round(warmup_as_trained(warmup, epochs) * steps_per_epoch),
        total_steps=epochs * steps_per_epoch,
    )


def _lookup(config: dict[str, Any], key: str) -> Any:
    value: Any = config
    for part in key.split("."):
        value = value.get(part) if isinstance(value, dict) else None
    return value


def _step_inside(best: Path, after: int) -> float:
    """The step of a checkpoint without a number; infinite where it cannot be read."""
    if after < 0:
        return math.inf
    try:
        return load_checkpoint(best)["step"]
    except UnusableCheckpoint:
        return math.inf


def _new_folder(parent: Path) -> Path:
    """A name for a folder that is not there yet."""
    stamp, number = datetime.now().strftime("%Y%m%d-%H%M%S"), 2
    folder = parent / stamp
    while kind_of(folder) is not None:
        folder, number = parent / f"{stamp}-{number}", number + 1
    return folder
