"""The encoders that stand in one table: the trained ones, the same untrained, supervised ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import timm
import torch
from torch import Tensor, nn

from sacl_fast.config import Config, ViewsConfig
from sacl_fast.config.choices import Width
from sacl_fast.config.evaluation import Evaluation
from sacl_fast.encoders.file import normalisation_of, read_encoder_metadata
from sacl_fast.encoders.recalibrate import recalibrated
from sacl_fast.errors import UserError, reason_and_remedy, reason_of
from sacl_fast.evaluation.features import as_features
from sacl_fast.evaluation.trained import Trained, fresh_encoder, fresh_slicer
from sacl_fast.files import kind_of, user_path

Batches = Callable[[], Iterable[Tensor]]
"""Gives images (B, 3, S, S), normalised, on the device of the evaluation."""


class GivenEncoder(nn.Module):
    """A module of anybody's as an encoder: images (N, 3, S, S) of its own type to features (N, F)
    float32."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module
        tensors = (*module.parameters(), *module.buffers())
        self.device = tensors[0].device if tensors else torch.device("cpu")
        floating = (tensor.dtype for tensor in tensors if tensor.is_floating_point())
        self.dtype = next(floating, torch.float32)

    def forward(self, images: Tensor) -> Tensor:
        return as_features(self.module(images.to(self.dtype)))


class Network(NamedTuple):
    """An encoder to be evaluated, made when its turn comes."""

    name: str
    build: Callable[[], nn.Module]
    views: ViewsConfig
    """Size and normalisation of its images."""
    control: str | None = None
    """The name of the same encoder untrained, where that is evaluated too."""


def networks_of(
    trained: Trained, settings: Evaluation, device: torch.device, batches: Batches
) -> list[Network]:
    """All that an evaluation of ``trained`` compares, the trained ones first.

    Raises:
        UserError: it does not hold the encoder that ``eval.encoders`` asks for, or there are no
            supervised weights for it.
    """
    config, asked = trained.config, settings.eval.encoders
    widths: tuple[Width, ...] = trained.widths if asked == "both" else (asked,)
    controls = settings.control

    def of_width(width: Width) -> Network:
        trained.check_width(width)

        def build() -> nn.Module:
            trained.encoder.to(device)
            if trained.slicer is not None:
                trained.slicer.to(device)
            return _loaded(config, trained.state(width, batches)).to(device)

        return Network(width, build, config.views, untrained(width) if controls else None)

    def control_of(width: Width) -> Network:
        return Network(
            untrained(width), lambda: _untrained(config, width, device, batches), config.views
        )

    found = [of_width(width) for width in widths]
    if controls:
        found += [control_of(width) for width in widths]
    if settings.supervised is not None:
        encoder, views = supervised_encoder(config, settings.supervised)
        found.append(Network("supervised", lambda: encoder.to(device), views))
    return found


def untrained(width: Width) -> str:
    """The name of an untrained encoder."""
    return f"{width}, untrained"


def _loaded(config: Config, state: dict[str, Tensor]) -> nn.Module:
    encoder = fresh_encoder(config)
    encoder.load_state_dict(state)
    return encoder


def _untrained(config: Config, width: Width, device: torch.device, batches: Batches) -> nn.Module:
    """The encoder as the run began with it, dense or slim, with statistics of these images."""
    encoder = fresh_encoder(config).to(device)
    slicer = fresh_slicer(encoder, config).to(device)
    if width == "slim":
        slicer.recalibrate(batches())
        state = slicer.slim_state()
    else:
        with recalibrated(encoder, batches()):
            state = {name: value.clone() for name, value in encoder.state_dict().items()}
    encoder.load_state_dict(state)
    return encoder


def supervised_encoder(config: Config, source: str) -> tuple[nn.Module, ViewsConfig]:
    """The configured encoder with supervised weights, on the CPU, in eval mode, and the views with
    the normalisation that the file names for them, or else timm.

    Args:
        source: ``timm`` downloads timm's weights; or the path of a file that holds some.

    Raises:
        UserError: there are none, they cannot be read, or they do not fit.
    """
    name = config.encoder.name
    made_for = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    views = config.views
    if made_for is not None:
        views = replace(views, mean=tuple(made_for.mean), std=tuple(made_for.std))
    if source == "timm":
        if made_for is None or not made_for.has_weights:
            raise UserError(
                f"timm has no supervised weights of {name}; the path of a file with some works "
                "(--supervised)"
            )
        try:
            state = timm.create_model(name, pretrained=True, num_classes=0).state_dict()
        except Exception as error:  # of whichever library timm downloads with
            raise UserError(
                f"timm's weights of {name} cannot be had: {reason_of(error)}; the path of a file "
                "with some works (--supervised)"
            ) from error
    else:
        path = user_path(source, "supervised")
        if kind_of(path) != "file":
            raise UserError(f"supervised is {path}, where there is no file; 'timm' or a file works")
        try:
            state = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
        except Exception as error:  # torch's, pickle's or safetensors's
            raise UserError(
                f"no weights can be read from {path}: {reason_and_remedy(error)}"
            ) from error
        views = _as_the_file_says(views, path)
    encoder = fresh_encoder(config)
    try:
        missing = encoder.load_state_dict(state, strict=False).missing_keys
    except (RuntimeError, AttributeError) as error:
        raise UserError(
            f"supervised weights do not fit {name} with width {config.encoder.width:g} and stem "
            f"{config.encoder.stem}: {reason_of(error)}"
        ) from error
    if missing := [key for key in missing if not key.endswith("num_batches_tracked")]:
        raise UserError(
            f"the supervised weights ({source}) are not of {name}: {len(missing)} tensors are "
            f"missing, {missing[0]} first"
        )
    return encoder, views


def _as_the_file_says(views: ViewsConfig, path: Path) -> ViewsConfig:
    """Those with the normalisation that a file of weights names, if it does."""
    try:
        said = read_encoder_metadata(path)
    except UserError:  # not of safetensors
        return views
    try:
        return replace(views, **normalisation_of(said))
    except ValueError as error:
        raise UserError(
            f"what {path} says of itself cannot be understood: {reason_of(error)}"
        ) from error
