"""Weights to start from (``encoder.pretrained``): timm's own, or those of a file.

A file holds a ``state_dict`` under timm's names (.safetensors, .pt, .pth; also below ``model`` or
``state_dict``), is an ``encoder.safetensors`` of a run, or a run's checkpoint. The classifier is
left out. What timm adapts to another image or patch size (position embeddings, the weights of
patches) is adapted by timm's function for the model; all else must fit.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import timm
import torch
from torch import Tensor, nn

from sacl_fast.encoders.file import read_encoder_metadata
from sacl_fast.errors import UserError, reason_of
from sacl_fast.files import kind_of, user_path

logger = logging.getLogger(__name__)

State = dict[str, Tensor]
_WORKS = "'timm', or a file of weights under timm's names (.safetensors, .pt, .pth), works"
_NO_WEIGHTS = "no file of weights (a state_dict of tensors, no pickled model)"
_IN_A_CHECKPOINT = "encoder."  # before the names of a checkpoint's encoder


def load_pretrained(encoder: nn.Module, name: str, source: str) -> None:
    """Give an encoder, built by ``name`` with any width and stem, its weights.

    Raises:
        UserError: there are none, they cannot be read, or they do not fit; the encoder is then as
            it was.
    """
    state = _timms(name) if source == "timm" else _of_file(name, source)
    state, wrong = _fitting(encoder, state)
    if wrong:
        raise UserError(
            f"encoder.pretrained {source} does not fit encoder {name} as it is configured: {wrong}"
        )
    if unusable := _unusable(encoder, state):
        raise UserError(f"encoder.pretrained {source} holds no weights to start from: {unusable}")
    encoder.load_state_dict(state, strict=False)  # but for what ``_fitting`` lets be missing
    logger.info("the encoder starts from the weights of %s", source)


def _timms(name: str) -> State:
    config = timm.get_pretrained_cfg(name) if timm.is_model(name.partition(".")[0]) else None
    if config is None or not config.has_weights:
        raise UserError(
            f"encoder.pretrained is timm, which has no weights of {name}; the path of a file works"
        )
    try:
        with torch.random.fork_rng(devices=[]):
            return timm.create_model(name, pretrained=True, num_classes=0).state_dict()
    except Exception as error:  # of whichever library timm downloads with
        raise UserError(
            f"encoder.pretrained is timm, and its weights of {name} cannot be had: "
            f"{reason_of(error)}; the path of a file works"
        ) from error


def _of_file(name: str, source: str) -> State:
    path = user_path(source, "encoder.pretrained")
    if kind_of(path) != "file":
        raise UserError(f"encoder.pretrained is {path}, where there is no file; {_WORKS}")
    if path.suffix == ".safetensors":
        said = read_encoder_metadata(path)
        held = said.get("encoder", name)
        if held.partition(".")[0] != name.partition(".")[0]:
            raise UserError(
                f"encoder.pretrained is {path}, which holds {held}, but encoder.name is {name}; "
                f"--encoder.name {held} works"
            )
        if "slim_ratio" in said:
            dense = path.name.replace("_slim", "")
            dense = dense if dense != path.name else "the file of a dense encoder"
            raise UserError(
                f"encoder.pretrained is {path}, a slim network, in which filters are zeros that "
                f"would stay dead; {dense} works"
            )
    try:
        state = timm.models.load_state_dict(str(path), use_ema=False, weights_only=True)
        tensors = {k: v for k, v in state.items() if isinstance(v, Tensor)}
    except OSError as error:
        raise UserError(f"cannot read encoder.pretrained {path}: {reason_of(error)}") from error
    except Exception as error:  # torch's, pickle's or safetensors's, who speak to programmers
        raise UserError(f"encoder.pretrained {path} is {_NO_WEIGHTS}; {_WORKS}") from error
    if not tensors:
        raise UserError(f"encoder.pretrained {path} is {_NO_WEIGHTS}; {_WORKS}")
    if any(key.startswith("slicer.") for key in tensors):  # a checkpoint of ours
        return {
            key.removeprefix(_IN_A_CHECKPOINT): value
            for key, value in tensors.items()
            if key.startswith(_IN_A_CHECKPOINT)
        }
    return tensors


def _fitting(encoder: nn.Module, state: State) -> tuple[State, str]:
    """The weights as the encoder takes them, and "", or what is wrong with them."""
    state = _without_classifier(encoder, state)
    wrong = _misfit(encoder, state)
    adapt: Any = getattr(sys.modules[type(encoder).__module__], "checkpoint_filter_fn", None)
    if not wrong or adapt is None:
        return state, wrong
    try:
        adapted = _without_classifier(encoder, adapt(dict(state), encoder))
    except Exception as error:  # of one of timm's functions, for what is no state of the model
        logger.debug("timm does not adapt the weights: %s", reason_of(error))
        return state, wrong
    return (state, wrong) if _misfit(encoder, adapted) else (adapted, "")


def _without_classifier(encoder: nn.Module, state: Mapping[str, Tensor]) -> State:
    layers = (getattr(encoder, "pretrained_cfg", None) or {}).get("classifier") or ()
    layers = (layers,) if isinstance(layers, str) else layers
    heads = tuple(f"{layer}." for layer in layers)
    own = encoder.state_dict().keys()
    return {k: v for k, v in state.items() if k in own or not (heads and k.startswith(heads))}


def _misfit(encoder: nn.Module, state: Mapping[str, Tensor]) -> str:
    own = encoder.state_dict()
    missing = [k for k in own if k not in state and not k.endswith("num_batches_tracked")]
    unknown = [k for k in state if k not in own]
    other = [k for k in own if k in state and own[k].shape != state[k].shape]
    said = [
        f"{len(keys)} tensors are {what} ({', '.join(keys[:3])}{', ...' if keys[3:] else ''})"
        for keys, what in ((missing, "missing"), (unknown, "not the encoder's"))
        if keys
    ]
    if other:
        key = other[0]
        said.append(
            f"{len(other)} are of another shape ({key} is {tuple(state[key].shape)}, not "
            f"{tuple(own[key].shape)}); encoder.width and encoder.stem of the weights work"
        )
    return ", ".join(said)


def _unusable(encoder: nn.Module, state: Mapping[str, Tensor]) -> str:
    """What no training starts from, among the tensors of a state that fits; "" if nothing."""
    own = [k for k, v in encoder.state_dict().items() if k in state and v.is_floating_point()]
    whole = [k for k in own if not state[k].is_floating_point()]
    if whole:
        return f"{_several(whole)} no floating-point numbers"
    infinite = [k for k in own if not state[k].float().isfinite().all()]
    return f"{_several(infinite)} NaN or infinite numbers" if infinite else ""


def _several(keys: Sequence[str]) -> str:
    more = ", ..." if keys[3:] else ""
    return f"{len(keys)} of its tensors ({', '.join(keys[:3])}{more}) hold"
