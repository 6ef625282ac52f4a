"""Views by NVIDIA DALI: one graph of operators, for the CPU and for the GPU, which makes them where
the compiled operator (``compiled.py``) does not run.

Nothing here is random. ``draw.py`` draws what is random about a view, as for torchvision;
``dali_parameters.py`` packs the draws into arrays, which are fed with the images. So both loaders
show the same crops, factors and flags of the same images in the same order.

An operator that a view switches off (probability 0) is not in its graph. One that always happens
has no condition. One that happens to some images costs time for those alone. An image is (H, W, 3)
uint8 up to brightness and contrast, then three planes (S, S) float32 in 0..255 for saturation and
hue, then (3, S, S) float32: on the CPU these are the fastest forms, and conversions cost as much as
the operators. DALI's own saturation and hue are not used: its hue is a rotation in YIQ, which is
further from torchvision's (a shift in HSV) than no change at all.
"""
# pyright: reportCallIssue=false, reportArgumentType=false, reportAttributeAccessIssue=false
# (DALI's stubs know neither its enums' members nor what arithmetic gives.)

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sacl_fast.config import ViewConfig, ViewsConfig
from sacl_fast.data.views.dali_parameters import (
    Parameters,
    is_tone,
    jitter_slots,
    parameter_names,
)
from sacl_fast.data.views.dali_pipeline import (
    FedPipeline,
    decoded,
    fn,
    math,
    pipeline_def,
    types,
)

# A batch of images, encoded, (bytes,) uint8 each, or as pixels (H, W, 3), and the parameters of
# both views.
Fed = tuple[np.ndarray | Sequence[np.ndarray], tuple[Parameters, Parameters]]

_LUMA = (0.299, 0.587, 0.114)  # Pillow's grayscale
_ZERO, _ONE, _WHITE = np.float32(0), np.float32(1), np.float32(255)
# Pillow rounds down after each operation on colours. On average that is this much.
_LOST = np.float32(0.5)


class ViewPipeline(FedPipeline):
    """Batches of both views of ``batch`` images, ``ahead`` of them prepared in the background.

    ``feed`` is called for each batch in turn; ``encoded`` says which kind of images it gives.
    """

    def __init__(
        self,
        views: ViewsConfig,
        feed: Callable[[], Fed],
        *,
        encoded: bool,
        batch: int,
        ahead: int = 1,
        threads: int = 1,
        device: torch.device,
        dtype: torch.dtype = torch.float32,
        hw_decoder_load: float = 0.65,
    ) -> None:
        super().__init__(feed, device)
        self._names = (parameter_names(views.a), parameter_names(views.b))
        self._build(
            _graph,
            views,
            self._flat,
            encoded,
            device.type,
            {torch.float32: types.FLOAT, torch.float16: types.FLOAT16}[dtype],
            hw_decoder_load,
            batch_size=batch,
            num_threads=threads,
            prefetch_queue_depth=ahead,
        )

    def run(self) -> tuple[Tensor, Tensor]:
        """The next batch: both views (n, 3, S, S), normalised, channels last in memory.

        Raises DaliError, or what ``feed`` raises.
        """
        a, b = self._outputs()
        return _to_torch(a), _to_torch(b)

    def _flat(self) -> list[Any]:
        """What ``feed`` gives as one list, as the graph takes it apart."""
        images, parameters = self._call_feed()
        named = zip(parameters, self._names, strict=True)
        return [images, *(given[name] for given, names in named for name in names)]


def _to_torch(views: Any) -> Tensor:
    return torch.from_dlpack(views.as_tensor()).permute(0, 3, 1, 2)


# --- the graph -----------------------------------------------------------------------------------
#
# DALI rewrites these functions: an `if` over what is fed becomes a condition per image, and every
# other `if` decides what is in the graph. Hence no `and` between the two.


@pipeline_def(enable_conditionals=True)
def _graph(
    views: ViewsConfig,
    feed: Callable[[], list[Any]],
    encoded: bool,
    device: str,
    dtype: types.DALIDataType,
    hw_decoder_load: float,
):
    names_a, names_b = parameter_names(views.a), parameter_names(views.b)
    count = len(names_a)
    image, *given = fn.external_source(feed, num_outputs=1 + count + len(names_b), batch=True)
    if encoded:
        image = decoded(image, device, hw_decoder_load)
    else:
        image = _on(device, fn.reinterpret(image, layout="HWC"))
    given_a = {name: given[i] for i, name in enumerate(names_a)}
    given_b = {name: given[count + i] for i, name in enumerate(names_b)}
    a = _view(image, given_a, views, views.a, device, dtype)
    b = _view(image, given_b, views, views.b, device, dtype)
    return a, b


def _on(device: str, node):
    return node.gpu() if device == "cuda" else node


def _view(image, given: dict[str, Any], views: ViewsConfig, view: ViewConfig, device: str, dtype):
    """A view (S, S, 3) of the ``image``, with its parameters ``given``."""
    x = fn.resize(
        image,
        roi_start=given["start"],
        roi_end=given["end"],
        size=[views.size, views.size],
        interp_type=types.INTERP_CUBIC,
        antialias=True,
    )
    slots = jitter_slots(view)
    early = [slot for slot in slots if slot.startswith("early")]
    later = [slot for slot in slots if not slot.startswith("early")]
    if early:
        x = _early(x, given, early)
    if later or view.grayscale > 0:
        x = _floats(x)
        r, g, b = x[0], x[1], x[2]
        if later:
            r, g, b = _later(r, g, b, given, later, device)
        if view.grayscale > 0:
            if given.get("grayscale", True):
                r, g, b = _gray(r, g, b)
        x = fn.reinterpret(fn.stack(r, g, b, axis=0), layout="CHW")
    elif view.blur > 0 or view.solarize > 0:
        x = _floats(x)
    if view.blur > 0:
        if given.get("blur", True):
            x = fn.gaussian_blur(x, sigma=given["sigma"], window_size=given["window"])
    if view.solarize > 0:
        if given.get("solarize", True):
            x = _solarize(x, view.solarize_threshold)
    return fn.crop_mirror_normalize(
        x,
        dtype=dtype,
        output_layout="HWC",
        mean=[255 * value for value in views.mean],
        std=[255 * value for value in views.std],
    )


def _floats(x):
    """(S, S, 3) uint8 to (3, S, S) float32, by the fastest operator that does it."""
    return fn.crop_mirror_normalize(
        x, dtype=types.FLOAT, output_layout="CHW", mean=[0.0] * 3, std=[1.0] * 3
    )


def _early(x, given: dict[str, Any], slots: list[str]):
    """Brightness and contrast on (S, S, 3) uint8."""
    shift = -float(_LOST) / 255
    for slot in slots:
        factor = given[slot]
        if given[f"{slot}_on"]:
            if given[f"{slot}_contrast"]:
                gray = fn.color_space_conversion(x, image_type=types.RGB, output_type=types.GRAY)
                mean = fn.reductions.mean(gray).cpu()
                x = fn.brightness_contrast(
                    x, contrast=factor, contrast_center=mean, brightness_shift=shift
                )
            else:
                x = fn.brightness_contrast(x, brightness=factor, brightness_shift=shift)
    return x


def _later(r, g, b, given: dict[str, Any], slots: list[str], device: str):
    """Saturation, hue, and brightness and contrast after them, on planes."""
    for slot in slots:
        factor = _on(device, given[slot])
        if given.get(f"{slot}_on", True):
            if slot == "hue":
                r, g, b = _hue(r, g, b, factor, given)
            elif is_tone(slot):
                if given[f"{slot}_contrast"]:
                    mean = fn.reductions.mean(_luma(r, g, b))
                    r, g, b = _blend(r, g, b, factor, mean * (_ONE - factor) - _LOST)
                else:
                    r, g, b = _blend(r, g, b, factor, factor * _ZERO - _LOST)
            else:
                gray = _luma(r, g, b)
                r, g, b = _blend(r, g, b, factor, gray * (_ONE - factor) - _LOST)
    return r, g, b


def _blend(r, g, b, factor, offset):
    return (
        _clip(r * factor + offset, _ZERO, _WHITE),
        _clip(g * factor + offset, _ZERO, _WHITE),
        _clip(b * factor + offset, _ZERO, _WHITE),
    )


def _clip(x, low, high):
    return math.max(math.min(x, high), low)  # math.clamp takes three times as long on the CPU


def _luma(r, g, b):
    return r * np.float32(_LUMA[0]) + g * np.float32(_LUMA[1]) + b * np.float32(_LUMA[2])


def _gray(r, g, b):
    gray = _luma(r, g, b)
    return gray, gray, gray


def _hue(r, g, b, shift, given: dict[str, Any]):
    """Hue moved by ``shift`` sixths of the circle, 0 to 1, value and chroma kept (HSV)."""
    if "hue_turns" in given:
        if given["hue_turns"] == 1:
            r, g, b = b, r, g
        elif given["hue_turns"] == 2:
            r, g, b = g, b, r
    if given["hue_backward"]:  # forward, with the circle's direction reversed
        g, b = b, g
    high, low = math.max(math.max(r, g), b), math.min(math.min(r, g), b)
    moved = (high - low) * shift
    falling, rising = high - moved, low + moved
    change = rising - falling
    new_r = _turned(r, g, b, falling, change, low, high)
    new_g = _turned(g, b, r, falling, change, low, high)
    new_b = _turned(b, r, g, falling, change, low, high)
    if given["hue_backward"]:
        new_g, new_b = new_b, new_g
    return new_r, new_g, new_b


def _turned(x, ahead, behind, falling, change, low, high):
    """A channel after the turn; ``ahead`` follows it in the order red, green, blue, red.

    Around the circle a channel is a trapezoid between ``low`` and ``high``: it falls while the one
    behind it is the lowest, and it rises while the one ahead is. So where ``behind`` <= ``ahead``
    it is x - ahead + high - moved, elsewhere x - ahead + low + moved, within low..high.
    """
    return _clip(x - ahead + falling + (behind > ahead) * change, low, high)


def _solarize(x, threshold: int):
    inverted = x >= np.float32(threshold - 0.5)
    return x + inverted * (_WHITE - np.float32(2) * x)
