"""Rules for what joins or splits channels."""

from __future__ import annotations

from typing import Any

import torch

from sacl_fast.slim.channels import all_channels, channels_between, shifted
from sacl_fast.slim.parts import Part, select
from sacl_fast.slim.rules.registry import rule_for
from sacl_fast.slim.tensor import SlimTensor, from_parts


@rule_for("cat", "concat", "concatenate")
def cat(func: Any, tensors: Any, dim: int = 0, **kwargs: Any) -> Any:
    tensors = list(tensors)
    slim = next((t for t in tensors if isinstance(t, SlimTensor)), None)
    if slim is None or dim not in (1, -3) or kwargs:
        return NotImplemented
    if any(
        t.ndim != 4 or t.shape[::2] != slim.shape[::2] or t.shape[3] != slim.shape[3]
        for t in tensors
    ):
        return NotImplemented
    parts, offset = [], 0
    for t in tensors:
        own = t.parts if isinstance(t, SlimTensor) else (Part(all_channels(t.shape[1]), t),)
        # Copies, because a part that is joined with no other would stay the operand's memory.
        parts += [Part(shifted(p.channels, offset), p.values) for p in own]
        offset += t.shape[1]
    forms = [tuple(p.values.shape[i] for i in (0, 2, 3)) for p in parts]
    alone = [forms.count(f) == 1 for f in forms]
    parts = [
        p._replace(values=p.values.clone()) if own else p
        for p, own in zip(parts, alone, strict=True)
    ]
    return from_parts(parts, torch.Size((slim.shape[0], offset, *slim.shape[2:])))


@rule_for("chunk", "split", "split_with_sizes")
def split(func: Any, x: Any, size: Any = None, dim: int = 0, **kwargs: Any) -> Any:
    if not isinstance(x, SlimTensor) or dim not in (1, -3) or kwargs or size is None:
        return NotImplemented
    # The sizes are torch's own, learnt on a tensor without values.
    stop, result = 0, []
    for piece in func(torch.empty(x.shape[1], device="meta"), size, 0):
        start, stop = stop, stop + len(piece)
        parts = []
        for p in x.parts:
            chosen, positions = channels_between(p.channels, start, stop)
            if len(chosen):
                parts.append(select(p, positions, chosen))
        result.append(from_parts(parts, torch.Size((x.shape[0], stop - start, *x.shape[2:]))))
    return tuple(result)
