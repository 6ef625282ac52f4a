"""What the operators of a step read, write and multiply, counted as they run, on any device.

Each operand counts once a call, however often a kernel goes over it; a broadcast one as what lies
in memory; one that is changed in place as read and written. Views and empty tensors are free.
"""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

_ONLY_WRITE = {"copy_", "zero_", "fill_", "normal_", "uniform_"}


class Traffic(TorchDispatchMode):
    """Counts the operators that run within it, and what they do."""

    def __init__(self) -> None:
        super().__init__()
        self.values: Counter[str] = Counter()
        """Operator -> values read and written."""
        self.bytes = 0
        """Of those values."""
        self.flops = 0
        """Of PyTorch's own convolutions and products, a multiplication and addition being two."""
        self.operators = self.launches = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name = func.overloadpacket.__name__
        self.operators += 1
        given = {id(t): t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        made = {id(t): t for t in tree_leaves(out) if isinstance(t, Tensor)}
        memory = {t.untyped_storage().data_ptr() for t in given.values()}
        own = [t for t in made.values() if t.untyped_storage().data_ptr() not in memory]
        is_view = not func._schema.is_mutable and not own
        if is_view or "empty" in name:
            return out
        self.launches += 1
        changed = _changed(func, args, kwargs)
        read = [t for t in given.values() if name not in _ONLY_WRITE or id(t) not in changed]
        for t in (*read, *changed.values(), *own):
            count = _in_memory(t)
            self.values[name] += count
            self.bytes += count * t.element_size()
        self.flops += _flops(func.overloadpacket, args, kwargs, out)
        return out


def _changed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[int, Tensor]:
    found: dict[int, Tensor] = {}
    for i, argument in enumerate(func._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[i] if i < len(args) else kwargs.get(argument.name)
            found |= {id(t): t for t in tree_leaves(value) if isinstance(t, Tensor)}
    return found


def _in_memory(x: Tensor) -> int:
    """Its values, without the copies that a broadcast makes of them."""
    count = 1
    for size, stride in zip(x.shape, x.stride(), strict=True):
        count *= size if stride or not size else 1
    return count


def _flops(operator: Any, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> int:
    """By torch's formulas, but for a convolution's gradients: those are wrong for groups."""
    if operator is torch.ops.aten.convolution_backward:
        gradient, x, weight, _, _, _, _, transposed, *_, wanted = args
        pixels = x if transposed else gradient
        return 2 * pixels.numel() * weight[0].numel() * sum(wanted[:2])
    if operator not in flop_registry:
        return 0
    return flop_registry[operator](*args, **kwargs, out_val=out)
