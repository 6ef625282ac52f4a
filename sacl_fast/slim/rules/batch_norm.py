"""The rules for batch norms: every part is normalised at its own size.

In training, a norm waits for the activation after it, which it can do along with its own work; the
zeros of filters that are not kept become constants in it, without having been made.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from sacl_fast.ops.batch_norm import DAMPED, damped, put_back
from sacl_fast.ops.batch_norm_act import Activation, batch_norm_act
from sacl_fast.ops.global_batch_norm import global_batch_norm
from sacl_fast.ops.slim_batch_norm import slim_batch_norm
from sacl_fast.ops.slim_conv import BACKEND
from sacl_fast.slim.channels import Channels
from sacl_fast.slim.parts import Part, arranged
from sacl_fast.slim.rules.registry import rule_for
from sacl_fast.slim.tensor import SlimTensor, by_part, deferred, dense


@rule_for("batch_norm")
def batch_norm(
    func: Any,
    input: Any,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
    **over_ranks: bool,
) -> Any:
    if not isinstance(input, SlimTensor):
        return NotImplemented
    shape, count = input.shape, input.numel() // input.shape[1]
    options: dict[str, Any] = {"momentum": momentum, "eps": eps}

    def index(channels: Channels) -> Tensor | None:
        return channels.index(input.device, shape[1])

    all_taken: list[tuple[Tensor, Tensor | None]] = []

    def given(p: Part) -> Tensor:
        if not (training and DAMPED.get()) or (over_ranks and len(p.values) > 1):
            return p.values
        values, taken = damped(p.values, eps)
        all_taken.append((taken, index(p.channels)))
        return values

    def put_all_back(running_mean: Tensor | None) -> None:
        for taken, own in all_taken:
            put_back(running_mean, taken, momentum, own)
        all_taken.clear()

    if not training or over_ranks or weight is None or bias is None:
        norm = running_mean, running_var, weight, bias
        options |= {"training": training, **over_ranks}
        out = by_part(
            input, lambda p: slim_batch_norm(given(p), index(p.channels), count, *norm, **options)
        )
        put_all_back(running_mean)
        return out
    parts, zeroed = input.nonzero_parts, input.zeroed
    zeroed_index = None if zeroed is None else zeroed.on(input.device)
    running: tuple[Tensor | None, Tensor | None] = running_mean, running_var

    def resolve(act: Activation) -> tuple[Part, ...]:
        nonlocal running
        live, *others = parts
        maps = [p for p in others if p.values.shape[0] == 1 and not p.is_constant]
        mapped = maps[0] if maps else None
        norm: Any = weight, bias, *running
        options.update(count=count, act=act, backend=BACKEND.get())
        y, rest, out = batch_norm_act(
            *(given(live), *norm),
            kept_index=index(live.channels),
            zeroed_index=zeroed_index,
            map=None if mapped is None else given(mapped),
            map_index=None if mapped is None else index(mapped.channels),
            **options,
        )
        outputs = [live._replace(values=y)]
        if zeroed is not None:
            outputs.append(Part(zeroed, rest))
        if mapped is not None and out is not None:
            outputs.append(mapped._replace(values=out))
        for p in others:
            if p is not mapped:
                values, *_ = batch_norm_act(
                    given(p), *norm, kept_index=index(p.channels), **options
                )
                outputs.append(p._replace(values=values))
        put_all_back(running[0])
        running = None, None  # whoever asks again has the same batch
        return arranged(outputs, shape)

    return deferred(resolve, shape, parts[0].values, [*(p.values for p in parts), weight, bias])


@rule_for(global_batch_norm)
def global_norm(func: Any, input: Any, *args: Any) -> Any:
    running_mean, running_var, weight, bias, momentum, eps, _, _ = args
    damp, norm = DAMPED.get(), (running_mean, running_var, weight, bias)
    if input.shape[0] == 1:  # a rank's own value cannot be told from one that all ranks have
        return global_batch_norm(dense(input), *norm, momentum, eps, damp)
    return batch_norm(func, input, *norm, True, momentum, eps, over_ranks=True, damped=damp)
