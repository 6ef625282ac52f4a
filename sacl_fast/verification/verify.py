"""Which case an operator has, and in which number types."""

from __future__ import annotations

from collections.abc import Callable

import torch

from sacl_fast.ops import (
    norm_act,
    norm_depthwise,
    norm_pointwise,
    norm_slim_add,
    norm_slim_gate,
    slim_border,
)
from sacl_fast.verification import fused, operators, views
from sacl_fast.verification.comparison import Case, compare

CASES: dict[str, Case] = {
    "xcorr_loss": operators.xcorr_loss,
    "slim_pointwise": operators.slim_pointwise,
    "depthwise_conv": operators.depthwise_conv,
    "batch_norm_act": operators.batch_norm_act,
    "slim_add": operators.slim_add,
    "slim_gate": operators.slim_gate,
    "lars": operators.lars,
    "norm_act": fused.norm_act,
    "norm_depthwise": fused.norm_depthwise,
    "norm_pointwise": fused.norm_pointwise,
    "norm_slim_add": fused.norm_slim_add,
    "norm_slim_gate": fused.norm_slim_gate,
    "slim_border": fused.slim_border,
}
OF_VIEWS: dict[str, Callable[[torch.device], None]] = {
    "augment": views.augment,
    "draw_views": views.draw_views,
}


def verify(op: str, backend: str, device: torch.device) -> None:
    """Hold an operator's backend against plain PyTorch on a device.

    Raises:
        Wrong: its results are others.
        Exception: whatever it raises itself.
    """
    if op in OF_VIEWS:
        OF_VIEWS[op](device)
        return
    if op in vars(fused):
        _register()
    half = device.type == "cuda" and op != "lars"  # which is for float32
    dtypes = (torch.float32, torch.bfloat16) if half else (torch.float32,)
    compare(CASES[op], device, backend, dtypes)


def _register() -> None:
    """Tell PyTorch of the implementations on CPUs."""
    for module in (norm_act, norm_depthwise, norm_slim_add, norm_slim_gate, slim_border):
        module.is_compiled()
    norm_pointwise.register()
