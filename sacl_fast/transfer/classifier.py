"""An encoder with a classifier, as it is fine-tuned and as its file holds it.

The file is what ``encoders.file`` describes, with timm's classifier among the weights and two more
texts in the metadata: ``classes``, a list in JSON, and ``task``, ``one-class`` or
``present-classes``. Of the slim encoder, filters that are not kept are zeros.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import safetensors
import torch
from torch import Tensor, nn

from sacl_fast.config import Config
from sacl_fast.encoders import build_encoder, output_dim, read_encoder_metadata
from sacl_fast.encoders.file import read_weights
from sacl_fast.errors import UserError, reason_of
from sacl_fast.evaluation.trained import fresh_slicer
from sacl_fast.files import kind_of, user_path
from sacl_fast.ops.backend import of_slim_operators, resolve_all
from sacl_fast.slim.export import compact_zeroed
from sacl_fast.slim.slicer import Slicer

LAST = "last.safetensors"  # in the folder of a fine-tuning


@dataclass
class Classifier:
    """A module (N, 3, S, S) -> logits (N, C), in whose slim form some filters stay zero."""

    module: nn.Module
    slicer: Slicer | None
    head: frozenset[str]
    """Names of the parameters that are the classifier's."""

    @contextlib.contextmanager
    def slimmed(self, amp_dtype: torch.dtype | None) -> Iterator[None]:
        """Within it, a training pass leaves zeroed filters without gradient."""
        if self.slicer is None:
            yield
            return
        device = next(self.module.parameters()).device
        skips = device.type == "cpu" and amp_dtype is None
        skips = skips and of_slim_operators(resolve_all("auto", device)).backend == "cpu"
        with self.slicer.mode("skip" if skips else "mask"):
            yield


def make_classifier(
    encoder: nn.Module, config: Config, classes: int, size: int, *, slim: bool
) -> Classifier:
    """A classifier on an encoder, which becomes part of it, in training mode.

    Args:
        encoder: built by ``build_encoder``; of the slim width, with zeroed filters.
        config: of its run.
        size: side of the images, pixels.

    Raises:
        UserError: it cannot take images of that size, or a classifier.
    """
    _resize(encoder, config.views.size, size)
    output_dim(encoder, size)
    body = {name for name, _ in encoder.named_parameters()}
    _add_head(encoder, config.encoder.name, classes)
    head = frozenset(name for name, _ in encoder.named_parameters()) - body
    slicer = fresh_slicer(encoder, config) if slim else None
    if slicer is not None and not slicer.active:
        slicer = None
    return Classifier(encoder.train(), slicer, head)


def _resize(encoder: nn.Module, before: int, size: int) -> None:
    made_for = getattr(encoder, "pretrained_cfg", None) or {}
    if size == before or not made_for.get("fixed_input_size"):
        return
    resize = getattr(encoder, "set_input_size", None)
    works = f"size {before}, which it was trained with, works"
    if resize is None:
        raise UserError(f"{type(encoder).__name__} has one image size; {works}")
    try:
        resize(img_size=size)
    except (RuntimeError, ValueError, AssertionError, TypeError) as error:
        raise UserError(
            f"{type(encoder).__name__} cannot take {size} px images: {reason_of(error)}; {works}"
        ) from error


def _add_head(encoder: nn.Module, name: str, classes: int) -> None:
    reset: Any = getattr(encoder, "reset_classifier", None)
    if reset is None:
        raise UserError(f"encoder {name} has no classifier in timm, so it cannot be fine-tuned")
    reset(classes)


def load_classifier(path: str | os.PathLike[str], *, compact: bool = False) -> nn.Module:
    """A fine-tuned network, images (N, 3, S, S) -> logits (N, C), in eval mode, on the CPU.

    ``encoders.read_encoder_metadata(path)`` has its ``classes``, and ``mean``, ``std`` and
    ``image_size`` of the images.

    Args:
        path: ``last.safetensors`` or ``best.safetensors`` of ``sacl-fast finetune``, or their
            folder, for the former.
        compact: of the slim encoder, without the filters that are zeros.

    Raises:
        UserError: it is something else.
    """
    path = user_path(path, "path")
    if kind_of(path) == "folder":
        path = path / LAST
    if kind_of(path) != "file":
        raise UserError(f"no fine-tuned network at {path}; {LAST} of 'sacl-fast finetune' works")
    if path.suffix == ".pt":
        raise UserError(f"{path} is a checkpoint; {LAST} of 'sacl-fast finetune' works")
    said = read_encoder_metadata(path)
    try:
        classes = json.loads(said["classes"])
        stem: Any = said["stem"]
        size, width = int(said["image_size"]), float(said["width"])
        module = build_encoder(said["encoder"], width=width, stem=stem, image_size=size)
        _add_head(module, said["encoder"], len(classes))
        state: dict[str, Tensor] = read_weights(path)
        module.load_state_dict(state)
    except KeyError as error:
        raise UserError(
            f"{path} does not say its {error.args[0]}, so it is no fine-tuned network; "
            "last.safetensors of 'sacl-fast finetune' works"
        ) from None
    except (ValueError, TypeError, RuntimeError, OSError, safetensors.SafetensorError) as error:
        raise UserError(
            f"{path} does not hold the network that it names: {reason_of(error)}"
        ) from error
    module.eval()
    return compact_zeroed(module) if compact else module
