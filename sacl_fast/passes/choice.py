"""How the encoder's passes run: what each plan is, which ones a run can have, and the rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from sacl_fast.config import Backend, Config
from sacl_fast.config.choices import Plan, SlimMode
from sacl_fast.errors import UserError
from sacl_fast.ops import norm_pointwise
from sacl_fast.ops.backend import (
    for_slim_calls,
    fused_obstacle,
    of_slim_operators,
    resolve_all,
)
from sacl_fast.passes.graph import Fusion
from sacl_fast.passes.recorded import RecordedEncoder
from sacl_fast.precision import autocast_dtype
from sacl_fast.slim import Slicer

_STEPS_WORTH_RECORDING = 30
"""Between two choices of filters. Recording the slim passes takes as long as some 20 steps with
them save (ResNet-20 at 32 px, MobileNet-V3 and EfficientNet-B0 at 32 to 112 px; 14 to 25)."""

Run = Callable[[Tensor], Tensor]
"""Of images (N, C, H, W), the features (N, F)."""


@dataclass(frozen=True)
class Passes:
    """How the dense and the slim encoder are run; without arguments, as the reference does."""

    mode: SlimMode = "mask"
    """Of the slim passes, see ``SlimConfig.mode``."""
    dense: Literal["eager", "recorded", "compiled"] = "eager"
    """The dense encoder as its code says; by the operators of ``skip``, from a recording; or by
    torch.compile, and then the slim one too."""
    recorded: bool = False
    """Whether mode ``skip`` runs from a recording of itself."""
    fused: Fusion = "none"
    """How far recordings have their batch norms fused, see ``passes.fusion``."""
    backend: Backend = "auto"
    """Of the operators; see ``ops.backend``."""
    plan: Plan = "eager"
    """What all this is called."""
    reason: str = ""
    """Why this plan, and why the slim passes are in that mode."""

    def dense_encoder(self, slicer: Slicer) -> Run:
        slicer.backend = self.backend
        if self.dense == "recorded":
            return RecordedEncoder(slicer, "whole", fused=self.fused)
        return Encoder(slicer, "dense", compiled=self.dense == "compiled")

    def slim_encoder(self, slicer: Slicer) -> Run:
        slicer.backend = self.backend
        if self.recorded:
            return RecordedEncoder(slicer, "skip", fused=self.fused)
        return Encoder(slicer, self.mode, compiled=self.dense == "compiled")


class Encoder:
    """The encoder in one of its slicer's modes, as its code says or compiled.

    Compiled code takes a convolution's weights as they are given, masked or not, so other filters
    do not compile it anew.
    """

    def __init__(
        self, slicer: Slicer, mode: Literal["dense", SlimMode], *, compiled: bool = False
    ) -> None:
        self.slicer = slicer
        self.mode: Literal["dense", SlimMode] = mode
        self.run: Any = torch.compile(slicer.encoder) if compiled else slicer.encoder

    def __call__(self, x: Tensor) -> Tensor:
        with self.slicer.mode(self.mode):
            return self.run(x)


def passes_of(
    plan: Plan, config: Config, device: torch.device, *, steps_per_epoch: int, reason: str = ""
) -> Passes:
    """What a plan is in a run on a device.

    Raises:
        UserError: it cannot be; the sentence says which can.
    """
    if obstacle := plan_obstacle(plan, config, device):
        possible = (p for p in get_args(Plan) if plan_obstacle(p, config, device) is None)
        raise UserError(
            f"engine.plan {plan} cannot be used here ({obstacle}); what works: "
            f"{', '.join(possible)}"
        )
    backends = resolve_all(config.backend, device)
    operators, calls = of_slim_operators(backends), for_slim_calls(backends)
    passes = Passes(plan=plan, backend=calls, reason=reason or "as requested")
    if plan == "eager":
        mode, why = _slim_mode(config, operators.backend, autocast_dtype(config.precision, device))
        steps = config.slim.refresh_steps or steps_per_epoch
        recorded = mode == "skip" and steps >= _STEPS_WORTH_RECORDING
        return replace(passes, mode=mode, recorded=recorded, reason=reason or why)
    if plan == "compile":
        return replace(passes, dense="compiled")
    skips = plan != "dense+mask"
    mode = "skip" if skips else "mask"
    fused: Fusion = "all" if plan == "fused" else "none"
    if plan == "dense+skip" and device.type != "cpu" and not _fusion_obstacle(config, device):
        fused = "around"
    return replace(passes, dense="recorded", mode=mode, recorded=skips, fused=fused)


def plan_obstacle(plan: Plan, config: Config, device: torch.device) -> str | None:
    """Why a run on a device cannot have a plan; None if it can."""
    if device.type == "mps" and plan not in ("eager", "compile"):
        return "recorded passes add in float64, which an Apple GPU does not have"
    if plan in ("compile", "fused") and config.engine.activation_checkpointing:
        return "it would fuse what engine.activation-checkpointing computes again"
    if plan != "fused":
        return None
    obstacle = _fusion_obstacle(config, device) or norm_pointwise.obstacle(device)
    return obstacle or fused_obstacle(device, products=True)


def _fusion_obstacle(config: Config, device: torch.device) -> str | None:
    operators = of_slim_operators(resolve_all(config.backend, device))
    if operators.backend == "torch":
        return f"the operators that are fused are those of the compiled module: {operators.reason}"
    if not config.channels_last:
        return "the fused operators are for channels-last memory"
    return fused_obstacle(device, products=False)


def choose_passes(
    config: Config,
    device: torch.device,
    *,
    steps_per_epoch: int,
    encoder: nn.Module | None = None,
) -> Passes:
    """The plan that was asked for. For ``auto``: ``eager``, which on GPUs ``engine.plan`` may
    replace; on a CPU ``dense+skip`` for an ``encoder`` with depthwise convolutions, where slim
    passes are recorded. There no time decides, so that the same run gives the same figures.

    It makes 1.05 to 1.15 times the steps of ``eager`` (MobileNet-V1 and V3, EfficientNet-B0,
    MnasNet, GhostNet; 32 and 64 px, one thread); of ResNet-18 and ResNet-50 as many, and of
    RegNet's grouped convolutions 0.96.
    """
    if config.engine.plan != "auto":
        return passes_of(config.engine.plan, config, device, steps_per_epoch=steps_per_epoch)
    eager = passes_of("eager", config, device, steps_per_epoch=steps_per_epoch)
    compiled = device.type == "cpu" and config.slim.mode == "auto" and eager.recorded
    if encoder is None or not compiled or config.deterministic:
        return eager
    convolutions = (m for m in encoder.modules() if isinstance(m, nn.Conv2d))
    if not any(1 < m.groups == m.in_channels for m in convolutions):
        return eager
    why = "the faster one on the compiled CPU operators, of depthwise convolutions"
    return passes_of("dense+skip", config, device, steps_per_epoch=steps_per_epoch, reason=why)


def _slim_mode(
    config: Config, backend: Backend, amp_dtype: torch.dtype | None
) -> tuple[SlimMode, str]:
    if config.slim.mode != "auto":
        return config.slim.mode, "as requested"
    if backend != "cpu" or amp_dtype is not None or not config.channels_last:
        return "mask", "skip is the faster one on the compiled CPU operators, in float32 only"
    return "skip", "the faster one on the compiled CPU operators"
