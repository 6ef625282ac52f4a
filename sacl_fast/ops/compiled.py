"""The compiled module ``sacl_fast._C``, whose operators are registered with PyTorch's dispatcher.

Importing it registers the implementations. What PyTorch further needs to know of an operator, its
shapes and FLOPs, is registered by the operator's file here when it is first used; gradients are
those of that file's public function.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def obstacle() -> str | None:
    """Why the compiled operators cannot be used; None if they can."""
    try:
        from sacl_fast import _C  # noqa: F401  (after torch, whose libraries it needs)
    except ImportError as error:
        return f"sacl_fast._C cannot be imported ({error})"
    if not hasattr(torch.ops.sacl_fast, "draw_views"):  # the newest name
        return "sacl_fast._C is of an older build; install again"
    return None


def there(describe: Callable[[], None]) -> Callable[[], bool]:
    """``is_compiled`` of an operator's file: whether the compiled module can be used. If so, the
    first question has ``describe`` tell PyTorch the operator's shapes and FLOPs."""

    @cache
    def is_compiled() -> bool:
        if obstacle() is None:
            describe()
        return obstacle() is None

    return is_compiled


@torch.compiler.assume_constant_result
@cache
def cuda_obstacle(device: torch.device) -> str | None:
    """Why the compiled operators cannot be used on a CUDA device; None if they can."""
    if (reason := obstacle()) is not None:
        return reason
    from sacl_fast import _C

    held = _C.build_info()["architectures"]
    if not held:
        return "sacl_fast._C was built without CUDA"
    major, minor = torch.cuda.get_device_capability(device)
    if not any(runs_on(architecture, (major, minor)) for architecture in held):
        return f"sacl_fast._C holds code for {', '.join(held)}; the device is sm_{major}{minor}"
    return None


def runs_on(architecture: str, capability: tuple[int, int]) -> bool:
    """Whether code for an architecture, such as ``sm_80``, ``sm_90a`` or ``compute_90``, runs on a
    device of this compute capability: machine code on later minor versions, PTX on all later ones,
    and neither, with an ``a``, on any but its own."""
    kind, _, number = architecture.partition("_")
    own = int(number.rstrip("af")[:-1]), int(number.rstrip("af")[-1])
    if number.endswith("a"):
        return capability == own
    if kind == "compute" and not number.endswith("f"):
        return capability >= own
    return capability[0] == own[0] and capability >= own


CUDA_DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def unfit(x: Tensor, *others: Tensor | None) -> str | None:
    """Why the compiled operators are not for images ``x``; None if they are.

    They are for (N, C, H, W) in channels-last memory, not empty, with ``others`` on the same device
    and of the same number type: float32 on the CPU, one of ``CUDA_DTYPES`` on a GPU that the module
    holds code for.
    """
    if x.device.type == "cpu":
        if x.dtype != torch.float32:
            return f"on the CPU it takes float32, not {x.dtype}"
    elif not x.is_cuda:
        return f"it runs on the CPU and on CUDA devices, not on {x.device}"
    elif x.dtype not in CUDA_DTYPES:
        return f"on a GPU it takes float32, float16 and bfloat16, not {x.dtype}"
    elif (reason := cuda_obstacle(x.device)) is not None:
        return reason
    for t in others:
        if t is not None and (t.dtype != x.dtype or t.device != x.device):
            return f"it takes one number type and one device, not {_kind(x)} and {_kind(t)}"
    if not x.is_contiguous(memory_format=torch.channels_last):
        return "it takes images (N, C, H, W) in channels-last memory"
    return None if x.numel() > 0 else "there are no values"


def _kind(x: Tensor) -> str:
    return f"{x.dtype} on {x.device}"


def images(like: Tensor, *shape: int) -> Tensor:
    """An empty (N, C, H, W) in channels-last memory."""
    return like.new_empty(shape).contiguous(memory_format=torch.channels_last)


def as_under_autocast(x: Tensor, *others: Tensor | None) -> Any:
    """As autocast hands them to a convolution: in its number type, but for float64."""
    device = x.device.type
    if not torch.is_autocast_enabled(device):
        return x, *others
    dtype = torch.get_autocast_dtype(device)
    return tuple(t if t is None or t.dtype == torch.float64 else t.to(dtype) for t in (x, *others))
