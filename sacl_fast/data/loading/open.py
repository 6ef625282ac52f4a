"""Which loader makes the views, decided once, with the reason.

``open_view_loader`` is what trains; the contact sheet and ``sacl-fast doctor`` ask the same
questions of ``resolve_loader``.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import logging
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch

from sacl_fast.config import Config
from sacl_fast.data.images.source import Source, as_packed
from sacl_fast.data.loading.bad_images import BadImages
from sacl_fast.data.loading.batch import Plan
from sacl_fast.data.loading.pixel_stream import PixelStream, pixel_views
from sacl_fast.data.loading.readers import CompiledViewReader, ViewReader, Views
from sacl_fast.data.loading.torchvision_stream import PillowStream, TorchvisionStream
from sacl_fast.data.loading.view_loader import ViewLoader
from sacl_fast.data.loading.waiting import no_stop
from sacl_fast.data.views.operator import are_compiled, why_not_compiled
from sacl_fast.errors import UserError

logger = logging.getLogger(__name__)

# Both views of an image on one core, ms (AMD EPYC, DALI 2.4), where DALI decodes and the compiled
# operator augments, by DALI alone, by torchvision: at 32 px from memory 0.10, 0.42, 0.35; at 64 px
# 0.09, 0.80, 1.17; at 224 px from JPEGs 1.8, 7.9, 10.9.
_SMALL = 32
_CPU = torch.device("cpu")


class LoaderResolution(NamedTuple):
    """What makes the views, ``compiled``, ``dali``, ``pillow`` or ``torchvision``, and why that
    one."""

    loader: str
    reason: str


def open_view_loader(
    source: Source,
    config: Config,
    *,
    device: torch.device,
    rank: int = 0,
    world_size: int = 1,
    check: Callable[[], None] = no_stop,
) -> ViewLoader:
    """The batches of pre-training for one rank, by the loader of ``data.loader``. What ``check``
    raises ends a wait for a batch."""
    packed = as_packed(source) is not None
    loader, reason = resolve_loader(config, device, packed=packed)
    if loader != "compiled" and (asked := config.data.residence) != "auto":
        works = "data.loader auto" if packed else "data.source cache (see sacl-fast cache)"
        raise UserError(
            f"data.residence is {asked}, which is for loader compiled, but the views are made by "
            f"{loader} ({reason}); {works} works, and so does data.residence auto"
        )
    if loader == "compiled":
        kind, operator = PixelStream, " operator"
    elif loader == "dali":
        from sacl_fast.data.loading.dali_stream import DaliStream

        kind = DaliStream
        operator = " and the compiled operator" if are_compiled(config, device) else ""
    elif loader == "pillow":
        kind, operator = PillowStream, " and the compiled operator"
    else:
        kind, operator = TorchvisionStream, ""
    logger.info("views by %s%s (%s)", loader, operator, reason)
    plan = Plan(config, len(source), rank, world_size)
    bad = BadImages(source, config.data.max_bad_share)
    stream = kind(source, config, plan, bad, device=device, check=check)
    return ViewLoader(source, plan, bad, stream)


def read_views(source: Source, config: Config, epoch: int, indices: np.ndarray) -> Views:
    """Both views of some images, 8-bit pixels, by the loader that would train on the CPU."""
    packed = as_packed(source)
    loader = resolve_loader(config, _CPU, packed=packed is not None).loader
    if loader == "compiled":
        assert packed is not None, "resolve_loader takes it for packed sources only"
        return pixel_views(packed, config, epoch, indices)
    if loader == "dali":
        from sacl_fast.data.loading.dali_stream import dali_views

        return dali_views(source, config, epoch, indices)
    reader = CompiledViewReader if loader == "pillow" else ViewReader
    return reader(source, config)[epoch, indices]


def resolve_loader(
    config: Config, device: torch.device, *, packed: bool = False
) -> LoaderResolution:
    """The loader of the views on ``device``; ``packed``: of images that are pixels in one buffer
    (``as_packed``).

    ``auto`` takes ``compiled`` for those, and else DALI where it is installed and faster,
    ``pillow`` where it is not installed. ``dali`` where it cannot run is a UserError that names the
    package, as are ``compiled`` and ``pillow`` without the compiled operator, and ``compiled`` for
    images that are files.
    """
    requested = config.data.loader
    if requested == "compiled":
        if not packed:
            raise UserError(
                "data.loader is compiled, which is for images that are pixels, and these are to be "
                "decoded; data.loader auto works, and so does data.source cache: sacl-fast cache "
                "decodes them once"
            )
        if (why_not := why_not_compiled(config, _CPU)) is not None:
            raise UserError(
                f"data.loader is compiled, which needs the compiled operator augment ({why_not}); "
                "data.loader torchvision works without"
            )
        return LoaderResolution("compiled", "as requested")
    if requested == "torchvision":
        return LoaderResolution("torchvision", "as requested")
    if requested == "pillow":
        if (why_not := why_not_compiled(config, _CPU)) is not None:
            raise UserError(
                f"data.loader is pillow, which needs the compiled operator augment ({why_not}); "
                "data.loader torchvision works without"
            )
        return LoaderResolution("pillow", "as requested")
    obstacle = dali_obstacle()
    if requested == "dali":
        if obstacle is not None:
            raise UserError(f"data.loader is dali, but {obstacle}; data.loader auto works without")
        return LoaderResolution("dali", "as requested")
    if config.backend == "torch":
        return LoaderResolution("torchvision", "backend torch")
    if packed and (reason := _why_compiled(config, device, obstacle)):
        return LoaderResolution("compiled", reason)
    if obstacle is not None:
        return LoaderResolution("pillow" if are_compiled(config, _CPU) else "torchvision", obstacle)
    if device.type == "cuda":
        if (why_not := why_not_compiled(config, device)) is None:
            return LoaderResolution("dali", "decodes on the GPU, where the operator augments")
        return LoaderResolution("dali", f"decodes and augments on the GPU (operator: {why_not})")
    if are_compiled(config, device):
        return LoaderResolution("dali", "the fastest on the CPU")
    if config.views.size <= _SMALL:
        reason = f"DALI alone gains little on the CPU for views of {_SMALL} px and below"
        return LoaderResolution("torchvision", reason)
    return LoaderResolution("dali", f"the faster one on the CPU above {_SMALL} px")


def _why_compiled(config: Config, device: torch.device, no_dali: str | None) -> str | None:
    """Why the compiled operator makes the views of packed images; None where it does not."""
    if are_compiled(config, device):
        return f"the images are pixels; the fastest on the {device.type.upper()}"
    if no_dali is not None and are_compiled(config, _CPU):  # beside a GPU
        return f"the images are pixels; {no_dali}"
    return None


@functools.cache
def dali_obstacle() -> str | None:
    """Why DALI cannot be used and what to install; None if it can."""
    version = (torch.version.cuda or "13.0").split(".")[0]
    package = f"nvidia-dali-cuda{max(12, min(13, int(version)))}0"
    try:
        found = importlib.util.find_spec("nvidia.dali") is not None
    except ModuleNotFoundError:  # not even another package of NVIDIA's
        found = False
    if not found:
        cuda = f"CUDA {torch.version.cuda}" if torch.version.cuda else "a PyTorch without CUDA"
        return f"NVIDIA DALI is not installed (pip install {package}, for {cuda})"
    try:
        importlib.import_module("sacl_fast.data.views.dali")
    except (ImportError, OSError) as error:
        return f"NVIDIA DALI does not import ({error}); pip install {package} mends it"
    return None
