"""How the slim passes of a run are run, and why: decided once, before the model is built."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from sacl_fast.config import Backend, Config
from sacl_fast.config.choices import SlimMode
from sacl_fast.ops.backend import of_slim_operators, resolve_all
from sacl_fast.passes.recorded import RecordedEncoder
from sacl_fast.precision import autocast_dtype
from sacl_fast.slim import Slicer

_STEPS_WORTH_RECORDING = 30
"""Between two choices of filters. Recording the slim passes takes as long as some 20 steps with
them save (ResNet-20 at 32 px, MobileNet-V3 and EfficientNet-B0 at 32 to 112 px; 14 to 25)."""


@dataclass(frozen=True)
class SlimPasses:
    """How the slim encoder is run; without arguments, as the reference does."""

    mode: SlimMode = "mask"
    """See ``SlimConfig.mode``."""
    recorded: bool = False
    """Whether mode ``skip`` runs from a recording of itself."""
    backend: Backend = "auto"
    """Of the operators of ``skip``; see ``ops.backend``."""
    reason: str = ""
    """Why in this mode."""

    def slim_encoder(self, slicer: Slicer) -> Callable[[Tensor], Tensor]:
        """What gives the slim encoder's features (N, F) of images (N, C, H, W)."""
        slicer.backend = self.backend
        return RecordedEncoder(slicer) if self.recorded else SlimEncoder(slicer, self.mode)


@dataclass(frozen=True)
class SlimEncoder:
    """The slim encoder, run as its code says."""

    slicer: Slicer
    mode: SlimMode

    def __call__(self, x: Tensor) -> Tensor:  # (N, C, H, W) -> (N, F)
        with self.slicer.mode(self.mode):
            return self.slicer.encoder(x)


def choose_slim_passes(config: Config, device: torch.device, *, steps_per_epoch: int) -> SlimPasses:
    """How the slim passes of a run on a device are run."""
    operators = of_slim_operators(resolve_all(config.backend, device))
    mode, reason = _mode(config, operators.backend, autocast_dtype(config.precision, device))
    steps = config.slim.refresh_steps or steps_per_epoch
    recorded = mode == "skip" and steps >= _STEPS_WORTH_RECORDING
    return SlimPasses(mode, recorded, operators.for_calls, reason)


def _mode(config: Config, backend: Backend, amp_dtype: torch.dtype | None) -> tuple[SlimMode, str]:
    if config.slim.mode != "auto":
        return config.slim.mode, "as requested"
    if backend != "cpu" or amp_dtype is not None or not config.channels_last:
        return "mask", "skip is the faster one on the compiled CPU operators, in float32 only"
    return "skip", "the faster one on the compiled CPU operators"
