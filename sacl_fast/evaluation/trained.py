"""A trained encoder from whatever a run left: its folder, a checkpoint, the file of an encoder.

==============================  ==================================================================
given                           what is opened
==============================  ==================================================================
a run folder                    its newest readable checkpoint; without any, its encoders' files
``checkpoints/step_N.pt``       that checkpoint; ``best.pt`` likewise
``encoder.safetensors``         the dense encoder and nothing else
``encoder_slim.safetensors``    the slim encoder and nothing else
==============================  ==================================================================

A checkpoint knows both encoders and how they were trained. Its running batch-norm statistics mix
the two, so they are estimated anew before an encoder is used; those of the end of a run are in its
files and are taken from there.
"""

from __future__ import annotations

import logging
import math
import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.checks import Settings, rules
from sacl_fast.config import Config
from sacl_fast.config.choices import Width
from sacl_fast.config.file import layered, read_config_file
from sacl_fast.data.images.open import SOURCES
from sacl_fast.encoders import build_encoder, load_encoder, read_encoder_metadata
from sacl_fast.encoders.file import load_weights, normalisation_of
from sacl_fast.encoders.recalibrate import recalibrated
from sacl_fast.engine.checkpoint import (
    OfAnotherCommand,
    UnusableCheckpoint,
    list_checkpoints,
    load_checkpoint,
)
from sacl_fast.engine.run_folder import CHECKPOINTS, CONFIG, ENCODERS
from sacl_fast.errors import UserError, reason_of
from sacl_fast.evaluation.no_run import WORKS, in_folder, of_finetuning
from sacl_fast.files import kind_of, user_path
from sacl_fast.slim.slicer import Slicer

logger = logging.getLogger(__name__)

Kind = Literal["checkpoint", "encoder"]


@dataclass
class Trained:
    """An encoder, and what is known of its training. It is on the CPU and in eval mode."""

    path: Path
    """The file that was read."""
    kind: Kind
    """``encoder`` where the file holds an encoder alone."""
    folder: Path | None
    """The run folder that the file lies in."""
    config: Config
    """Of the run. Of an encoder's file: the defaults, but for what the file says (encoder, views'
    size, mean and std, slim ratio)."""
    has_data: bool
    """Whether ``config.data`` names the images that were trained on."""
    encoder: nn.Module = field(repr=False)
    """(N, 3, H, W) -> (N, F), with batch-norm statistics as they were stored."""
    slicer: Slicer | None = field(repr=False)
    """The slim encoder's filters and, where they are known, statistics. None for the file of an
    encoder: ``states`` has what it holds."""
    widths: tuple[Width, ...]
    """The encoders that it holds."""
    steps: int
    epochs: float
    images: int
    """In the training set; 0 where that is not known."""
    knn: dict[str, float]
    """The last kNN accuracies in percent that the run measured, ``knn_dense`` and ``knn_slim``."""
    knn_before: dict[str, float]
    """Those before training."""
    label_free: dict[str, float] = field(default_factory=dict)
    """The last effective ranks that the run measured, ``rankme_dense`` and so on."""
    own_source: str = ""
    """The ``data.source`` of a run whose images were given from Python, which no file names."""
    states: dict[Width, dict[str, Tensor]] = field(default_factory=dict, repr=False)
    """The ``state_dict`` of each width whose own batch-norm statistics are known: full size, under
    the encoder's names, filters that are not kept zeroed."""

    @property
    def size(self) -> int:
        """Side of the square images, pixels."""
        return self.config.views.size

    @contextmanager
    def as_width(self, width: Width) -> Iterator[nn.Module]:
        """Within it, ``encoder`` is the dense or the slim network, with the statistics as stored.

        Raises:
            UserError: it does not hold that one.
        """
        self.check_width(width)
        if self.slicer is None:
            self.encoder.load_state_dict(self.states[width])
            yield self.encoder
        else:
            with self.slicer.mode("mask" if width == "slim" else "dense"):
                yield self.encoder

    def check_width(self, width: Width) -> None:
        """Raise UserError where it does not hold an encoder of this width."""
        if width not in self.widths:
            (other,) = self.widths
            works = f"width {other!r} works"
            if self.kind == "encoder":
                works += ", or the folder of the run"
            raise UserError(f"{self.path} holds the {other} encoder only; {works}")

    def state(
        self, width: Width, batches: Callable[[], Iterable[Tensor]] | None = None
    ) -> dict[str, Tensor]:
        """The ``state_dict`` of one width with batch-norm statistics of its own: full size, under
        the encoder's names, filters that are not kept zeroed.

        Args:
            batches: gives images (N, 3, S, S), normalised, on the encoder's device, to estimate
                statistics from that are not known; see ``load.training_batches``.

        Raises:
            UserError: the width is not there, or its statistics are not known and no images given.
        """
        self.check_width(width)
        if width not in self.states:
            if batches is None:
                raise UserError(
                    f"the {width} encoder's batch-norm statistics are not in {self.path}: a "
                    "checkpoint in the midst of a run has those of training, which mix the dense "
                    "and the slim encoder; images to estimate them from are needed"
                )
            assert self.slicer is not None
            if width == "slim":
                self.slicer.recalibrate(batches())
                self.states[width] = _copied(self.slicer.slim_state())
            else:
                with self.slicer.mode("dense"), recalibrated(self.encoder, batches()):
                    self.states[width] = _copied(self.encoder.state_dict())
        return self.states[width]


def open_trained(path: str | os.PathLike[str]) -> Trained:
    """What a run folder, a checkpoint or an encoder's file holds; see the module's table.

    A damaged checkpoint of a run folder is passed over for the one before, with a warning.

    Raises:
        UserError: there is nothing at ``path``, or something else; or it is damaged, or of an
            encoder that cannot be built here.
    """
    given = user_path(path, "the trained encoder's path")
    kind = kind_of(given)
    if kind is None:
        raise UserError(f"nothing at {given} (from {Path.cwd()}); {WORKS}")
    if kind == "folder":
        return _open_folder(given)
    if kind == "other":
        raise UserError(f"{given} is a pipe or a device; {WORKS}")
    if given.suffix == ".safetensors":
        return _open_encoder(given)
    if given.suffix == ".pt":
        return _open_checkpoint(given)
    beside = f"; its folder {given.parent} works" if given.name == CONFIG else f"; {WORKS}"
    raise UserError(f"{given} is neither a checkpoint nor an encoder{beside}")


def fresh_encoder(config: Config) -> nn.Module:
    """The configured encoder as a run with this seed began with it, on the CPU, in eval mode."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.seed)
        encoder = build_encoder(
            config.encoder.name,
            width=config.encoder.width,
            stem=config.encoder.stem,
            image_size=config.views.size,
        )
    return encoder.eval()


def fresh_slicer(encoder: nn.Module, config: Config) -> Slicer:
    """The configured slicer of an encoder, with the filters that its weights call for."""
    slim = config.slim
    return Slicer(encoder, slim.ratio, exclude=slim.exclude, batch_norm=slim.batch_norm)


# --- a run folder ---------------------------------------------------------------------------------


def _open_folder(folder: Path) -> Trained:
    checkpoints = folder if folder.name == CHECKPOINTS else folder / CHECKPOINTS
    found = list_checkpoints(checkpoints)[::-1]
    for i, path in enumerate(found):
        try:
            return _open_checkpoint(path)
        except UnusableCheckpoint as error:
            if i + 1 == len(found):
                raise
            logger.warning("%s; opening the one before", error)
    own = [name for name in ENCODERS.values() if kind_of(folder / name) == "file"]
    if ENCODERS["dense"] in own or (own and kind_of(folder / CONFIG) == "file"):
        return _open_encoders_of(folder)
    raise in_folder(folder)


def _open_encoders_of(folder: Path) -> Trained:
    """A run folder without checkpoints: its encoders, with the data of its ``config.yaml``."""
    files = [_open_encoder(folder / n) for n in ENCODERS.values() if kind_of(folder / n) == "file"]
    trained = files[0]
    for other in files[1:]:
        trained = replace(
            trained,
            widths=trained.widths + other.widths,
            states=trained.states | other.states,
            config=replace(trained.config, slim=other.config.slim),
        )
    if kind_of(folder / CONFIG) != "file":
        return trained
    config, own_source = _config(read_config_file(folder / CONFIG), folder / CONFIG)
    same = {part: getattr(trained.config, part) for part in ("encoder", "slim")}
    size, mean, std = trained.size, trained.config.views.mean, trained.config.views.std
    views = replace(config.views, size=size, mean=mean, std=std)
    config = replace(config, views=views, **same)
    return replace(trained, config=config, has_data=not own_source, own_source=own_source)


# --- a checkpoint ---------------------------------------------------------------------------------


def _open_checkpoint(path: Path) -> Trained:
    try:
        state = load_checkpoint(path)
    except OfAnotherCommand as error:
        raise (of_finetuning(path, error.state) if "settings" in error.state else error) from None
    config, own_source = _config(state["config"], path)
    folder = path.absolute().parent.parent if path.absolute().parent.name == CHECKPOINTS else None
    try:
        encoder = fresh_encoder(config)
        slicer = fresh_slicer(encoder, config)
        load_weights(encoder, _part(state["model"], "encoder."))
        slicer.load_state_dict(_part(state["model"], "slicer."))
    except (UserError, RuntimeError, TypeError, LookupError, AttributeError) as error:
        raise UnusableCheckpoint(
            f"checkpoint {path} does not hold the encoder that it names: {reason_of(error)}"
        ) from error
    epochs = state["step"] / state["steps_per_epoch"]
    begun = math.ceil(epochs) - 1  # the epoch that was trained last
    slicer.enabled = max(0, begun) >= config.slim.warmup_epochs
    trained = Trained(
        path=path,
        kind="checkpoint",
        folder=folder,
        config=config,
        has_data=not own_source,
        encoder=encoder.eval(),
        slicer=slicer.eval(),
        widths=("dense", "slim") if slicer.active else ("dense",),
        steps=state["step"],
        epochs=epochs,
        images=int(state.get("data", {}).get("images", 0)),
        knn=dict(state["knn"]),
        knn_before=dict(state["knn_before"]),
        label_free=dict(state.get("label_free", {})),
        own_source=own_source,
    )
    trained.states.update(_known_states(trained))
    return trained


def _part(model: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    return {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}


def _known_states(trained: Trained) -> dict[Width, dict[str, Tensor]]:
    """The states whose statistics a checkpoint, or the encoders' files beside it, have."""
    encoder, slicer, known = trained.encoder, trained.slicer, {}
    assert slicer is not None
    if not any(isinstance(m, _BatchNorm) and m.track_running_stats for m in encoder.modules()):
        slicer.note_statistics()
        known["dense"] = _copied(encoder.state_dict())
    elif (beside := _dense_beside(trained)) is not None:
        known["dense"] = beside
    if slicer.active and slicer.statistics is not None:
        known["slim"] = _copied(slicer.slim_state())
    return known


def _dense_beside(trained: Trained) -> dict[str, Tensor] | None:
    """The state of the run's ``encoder.safetensors``, if it is of these very weights."""
    if trained.folder is None or kind_of(trained.folder / ENCODERS["dense"]) != "file":
        return None
    try:
        state = load_encoder(trained.folder / ENCODERS["dense"]).state_dict()
    except UserError:
        return None
    own = dict(trained.encoder.named_parameters())
    same = all(name in state and torch.equal(state[name], p) for name, p in own.items())
    return _copied(state) if same and state.keys() == trained.encoder.state_dict().keys() else None


# --- an encoder's file ----------------------------------------------------------------------------


def _open_encoder(path: Path) -> Trained:
    encoder = load_encoder(path)
    said = read_encoder_metadata(path)
    width: Width = "slim" if "slim_ratio" in said else "dense"
    parent = path.absolute().parent
    config = Config()
    try:
        values = normalisation_of(said)
        config = replace(
            config,
            preset=said.get("preset", config.preset),
            encoder=replace(
                config.encoder,
                name=said["encoder"],
                width=float(said["width"]),
                stem=cast(Any, said["stem"]),
            ),
            views=replace(config.views, size=int(said["image_size"]), **values),
            slim=replace(config.slim, ratio=float(said.get("slim_ratio", config.slim.ratio))),
        )
        knn = {k: float(said[k]) for k in ("knn_dense", "knn_slim") if k in said}
        label_free = {k: float(v) for k, v in said.items() if k.startswith(("rankme_", "lidar_"))}
        numbers = {k: float(said.get(k, 0)) for k in ("steps", "epochs", "images")}
    except (ValueError, TypeError, LookupError) as error:
        raise UserError(
            f"what {path} says of itself cannot be understood: {reason_of(error)}"
        ) from error
    return Trained(
        path=path,
        kind="encoder",
        folder=parent if kind_of(parent / CONFIG) == "file" else None,
        config=config,
        has_data=False,
        encoder=encoder,
        slicer=None,
        widths=(width,),
        steps=int(numbers["steps"]),
        epochs=numbers["epochs"],
        images=int(numbers["images"]),
        knn=knn,
        knn_before={},
        label_free=label_free,
        states={width: _copied(encoder.state_dict())},
    )


# --- parts ----------------------------------------------------------------------------------------


def _config(values: Mapping[str, Any], path: Path) -> tuple[Config, str]:
    """The configuration that a run saved, and the source of its images where that is none that can
    be opened by name: images given from Python. Settings of other versions are passed over, as
    where a run is resumed."""
    known, own = _known_settings(values, Config), ""
    data = known.get("data")
    if not isinstance(data, dict):
        data = {}
    if isinstance(source := data.get("source"), str) and source not in SOURCES:
        own = source
        known["data"] = {k: v for k, v in data.items() if k not in ("source", "root")}
    try:
        return layered(Config(), known), own
    except UserError as error:
        raise UnusableCheckpoint(f"the settings in {path} are not valid: {error}") from error


def _known_settings(values: Mapping[str, Any], owner: type[Settings]) -> dict[str, Any]:
    known: dict[str, Any] = {}
    for name, annotation in rules(owner).items():
        given = values.get(name)
        inner = isinstance(annotation, type) and issubclass(annotation, Settings)
        if name in values:
            known[name] = (
                _known_settings(given, annotation) if inner and isinstance(given, dict) else given
            )
    return known


def _copied(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().cpu().clone() for name, value in state.items()}
