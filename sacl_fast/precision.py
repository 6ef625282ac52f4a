"""In which number type a run computes: the choice, and the autocast that carries it out."""

from __future__ import annotations

import torch

from sacl_fast.errors import UserError


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of ``auto``, ``fp32``, ``bf16`` or ``fp16`` on a device; None: fp32.

    ``auto`` is bf16 where the GPU computes in it. Older ones emulate it, slowly, and the range of
    fp16 is not always enough for the gradients of the slim passes, so there it is fp32.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and _computes_bf16(device) else "fp32"
    if precision == "fp16" and device.type != "cuda":
        where = "an Apple GPU" if device.type == "mps" else "a CPU"
        raise UserError(f"precision 'fp16' needs a CUDA GPU; 'fp32' and 'bf16' work on {where}")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def precision_reason(precision: str, device: torch.device) -> str | None:
    """A line for whoever could train faster; None where ``auto`` is the fastest already."""
    if precision != "auto" or device.type != "cuda" or _computes_bf16(device):
        return None
    return (
        f"precision auto: fp32, because {torch.cuda.get_device_name(device)} is older than bf16; "
        "--precision fp16 is faster where its range is enough"
    )


def _computes_bf16(device: torch.device) -> bool:
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def autocast(device: torch.device, dtype: torch.dtype | None) -> torch.autocast:
    """Autocast to a type on a device; None switches it off."""
    return torch.autocast(device.type, dtype=dtype or torch.bfloat16, enabled=dtype is not None)
