"""What waits for a device: found on the CPU, where it costs nothing, by the operators that run."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}


class NoWaiting(TorchDispatchMode):
    """Within it, what reads a value on the host, or makes a size of one, is an error. (A copy from
    another device is not seen here: on the CPU it is none.)"""

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = str(func)
        if _DEPENDENT.intersection(getattr(func, "tags", ())) and not _takes_by_number(name, args):
            raise AssertionError(f"{name} waits for the device")
        if "index_put" in name and not _takes_by_number("index", args):
            raise AssertionError(f"{name} by a mask waits for the device")
        return func(*args, **kwargs)


def _takes_by_number(name: str, args: Any) -> bool:
    if "index" not in name:
        return False
    return not {t.dtype for t in args[1] if t is not None} & {torch.bool, torch.uint8}
