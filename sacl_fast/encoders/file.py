"""The trained encoder as a safetensors file that says what it is.

``encoder.safetensors`` holds the dense encoder and ``encoder_slim.safetensors`` the slim one, both
under timm's names, with batch-norm statistics of their own. The slim one has its zeroed filters as
zeros: as it stands it loads wherever the dense one does, and ``slim.export.load_compact`` makes it
smaller.

The file's metadata are texts; lists and numbers among them are JSON:

==============  ===============================================================================
key             value
==============  ===============================================================================
``encoder``     timm's name, or ``resnet20``: ``encoder.name`` of the run
``width``       width multiplier
``stem``        ``imagenet``, ``stride1`` or ``cifar``
``image_size``  side of the square views, pixels
``mean, std``   normalisation for values scaled to 0..1, a list of three each
``sacl_fast``   version of this package
``preset``      preset that the configuration started from
``method``      ``sacl-xd``, or ``barlow-twins`` where nothing was distilled
``epochs``      trained
``steps``       optimiser steps taken
``images``      in the training set
``knn_dense``   last kNN accuracy of the dense encoder in percent; absent without labels
``knn_slim``    that of the slim encoder
``rankme_*``    effective rank of the features, ``dense`` and ``slim``; ``lidar_*`` likewise
``best_by``     in the file of the best evaluation: the figure that was highest then
``pretrained``  what training started from, if not from random weights
``slim_ratio``  share of the filters that are kept; only in the slim encoder's file
``format``      ``pt``, for the libraries that ask for it
==============  ===============================================================================
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors
import safetensors.torch
import torch
from torch import nn

from sacl_fast import _version
from sacl_fast.config import Config
from sacl_fast.encoders.build import build_encoder
from sacl_fast.errors import UserError, reason_and_remedy, reason_of
from sacl_fast.files import kind_of, user_path, whole_file


def encoder_metadata(
    config: Config,
    *,
    epochs: float,
    steps: int,
    images: int,
    knn: Mapping[str, float],
    slim: bool = False,
    best_by: str | None = None,
) -> dict[str, str]:
    """The metadata of the dense or slim encoder that a run with ``config`` trained so far.

    Args:
        knn: kNN accuracies and effective ranks, by name.
        best_by: the figure that made it the best.
    """
    encoder, views = config.encoder, config.views
    distilled = config.loss.distillation != "none"
    values = {
        "encoder": encoder.name,
        "width": encoder.width,
        "stem": encoder.stem,
        "image_size": views.size,
        "mean": list(views.mean),
        "std": list(views.std),
        "sacl_fast": _version.__version__,
        "preset": config.preset,
        "method": "sacl-xd" if distilled else "barlow-twins",
        "epochs": epochs,
        "steps": steps,
        "images": images,
        **{name: round(accuracy, 4) for name, accuracy in knn.items()},
        **({"best_by": best_by} if best_by else {}),
        **({"pretrained": encoder.pretrained} if encoder.pretrained else {}),
        **({"slim_ratio": config.slim.ratio} if slim else {}),
    }
    texts = {k: v if isinstance(v, str) else json.dumps(v) for k, v in values.items()}
    return texts | {"format": "pt"}


def save_encoder(path: Path, state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> int:
    """Write an encoder's ``state_dict`` as safetensors; returns the file's size in bytes.

    Raises:
        UserError: it cannot be written; no half of it is left.
    """
    content = encode_encoder(state, metadata)
    try:
        with whole_file(path) as file:
            return file.write(content)
    except OSError as error:
        raise UserError(f"cannot write encoder {path}: {reason_and_remedy(error)}") from error


def encode_encoder(state: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> bytes:
    """The content of the file. Tensors that an encoder has under several names (modules that are
    used twice) are written under each, so that ``load_state_dict`` finds all it looks for.

    Raises:
        UserError: the state holds something that safetensors cannot.
    """
    seen: set[int] = set()
    own: dict[str, torch.Tensor] = {}
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor):
            raise UserError(
                f"the encoder's state holds {name}, a {type(tensor).__name__}, which no "
                "safetensors file can; encoders whose state is tensors work"
            )
        own[name] = tensor.detach()
    try:
        for name, tensor in own.items():
            tensor = tensor.cpu().contiguous()
            address = tensor.untyped_storage().data_ptr()
            own[name] = tensor.clone() if address in seen else tensor
            seen.add(address)
        return safetensors.torch.save(own, dict(metadata))
    except (safetensors.SafetensorError, ValueError, RuntimeError, TypeError, LookupError) as error:
        raise UserError(
            f"the encoder cannot be written as safetensors: {reason_of(error)}"
        ) from error


def load_encoder(path: str | os.PathLike[str]) -> nn.Module:
    """The encoder of a file that a run wrote, dense or slim: (N, 3, H, W) -> (N, F), in eval mode.

    Images are to be normalised by the ``mean`` and ``std`` of ``read_encoder_metadata``.

    Raises:
        UserError: there is no such file, it does not say which encoder it holds, or it holds
            another, or a fine-tuned classifier.
    """
    metadata = read_encoder_metadata(path)
    if "finetuned_steps" in metadata:
        raise UserError(
            f"{path} holds a fine-tuned classifier, which sacl_fast.load_classifier opens; "
            "the encoder.safetensors of a run works here"
        )
    if missing := [
        key for key in ("encoder", "width", "stem", "image_size") if key not in metadata
    ]:
        raise UserError(
            f"{path} does not say which encoder it holds (no {', '.join(missing)} in its "
            "metadata); an encoder.safetensors that a run wrote works, and --encoder.pretrained "
            "starts a run from other weights"
        )
    try:
        width, size = float(metadata["width"]), int(metadata["image_size"])
        stem: Any = metadata["stem"]
        encoder = build_encoder(metadata["encoder"], width=width, stem=stem, image_size=size)
        load_weights(encoder, read_weights(path))
    except (ValueError, RuntimeError, OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path} does not hold the encoder that it names: {reason_of(error)}"
        ) from error
    return encoder.eval()


def read_weights(path: str | os.PathLike[str]) -> dict[str, torch.Tensor]:
    """The tensors of a safetensors file. Its library takes no path that is no UTF-8.

    Raises:
        OSError, safetensors.SafetensorError: it cannot be read.
    """
    return safetensors.torch.load(user_path(path, "path").read_bytes())


def load_weights(encoder: nn.Module, state: Mapping[str, torch.Tensor]) -> None:
    """``encoder.load_state_dict(state)``, with a sentence on what does not fit.

    Raises:
        UserError: tensors are missing, unknown or of another shape.
    """
    own = encoder.state_dict()
    if missing := [name for name in own if name not in state]:
        raise UserError(f"{_first(missing)} of the encoder is not in it")
    if unknown := [name for name in state if name not in own]:
        raise UserError(f"the encoder has no {_first(unknown)}, which is in it")
    for name, value in own.items():
        given = state[name]
        if isinstance(value, torch.Tensor) and given.shape != value.shape:
            raise UserError(f"{name} is {tuple(given.shape)}, the encoder's {tuple(value.shape)}")
    encoder.load_state_dict(state)


def _first(names: list[str]) -> str:
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]}{more}"


def is_encoder_of(path: Path, metadata: Mapping[str, str]) -> bool:
    """Whether a whole file that says this of itself is at ``path``."""
    try:
        return read_encoder_metadata(path) == dict(metadata)
    except UserError:
        return False


def read_encoder_metadata(path: str | os.PathLike[str]) -> dict[str, str]:
    """What an encoder's file says of itself, see above; empty for files without metadata.

    Raises:
        UserError: there is no such file, or it is no safetensors file.
    """
    path = user_path(path, "path")
    if kind_of(path) != "file":
        raise UserError(f"no encoder at {path}")
    try:
        with safetensors.safe_open(path, framework="np") as file:
            return dict(file.metadata() or {})
    except (OSError, safetensors.SafetensorError) as error:
        raise UserError(f"{path} is no safetensors file: {reason_of(error)}") from None


def normalisation_of(metadata: Mapping[str, str]) -> dict[str, Any]:
    """``mean`` and ``std`` of images, as an encoder's file says them, if it does.

    Raises:
        ValueError: they are no JSON.
    """
    return {key: json.loads(metadata[key]) for key in ("mean", "std") if key in metadata}
