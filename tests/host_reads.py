"""A mode in which no operator may have the host read what a device has computed."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_READS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NoHostReads(TorchDispatchMode):
    """Raises where a value decides what Python does, or how large a result is."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _READS.intersection(func.tags) and not _is_by_number(func, args):
            raise AssertionError(f"{func} has the host wait for the device")
        return func(*args, **(kwargs or {}))


def _is_by_number(func: Any, args: Any) -> bool:
    """Whether it is ``x[i]`` by numbers, whose result has the size of i."""
    if func is not torch.ops.aten.index.Tensor:
        return False
    return not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in args[1])
