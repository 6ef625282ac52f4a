"""How many values the operators of a training step read and write, by plan of its slim passes.

    python benchmarks/bench_traffic.py --encoder mobilenetv1_100 --ratio 0.5 --json a.json

No GPU is needed and no time is taken: a dispatch mode counts, on the CPU, the step's operators
(four passes, loss, backward, update) and what each is given and gives. Each operand counts once a
call, however often a kernel goes over it; a broadcast one as what lies in memory; one that is
changed in place as read and written. Views and empty tensors are free.

What grows with the batch is activations. So two small batches are counted, at the full image size,
and the difference is what a sample costs: weights, statistics and lists of channels drop out. It is
given in units of Y, the values of all convolution outputs of one dense pass, and in GB in half
precision. ``launches`` are the operators that are not free.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any

import torch
from timing import write_json
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from sacl_fast.cli import parse_config
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep
from sacl_fast.passes import Passes

PLANS = {
    "eager+mask": Passes("mask"),
    "eager+skip": Passes("skip", recorded=True),
    "dense+mask": Passes("mask", dense="recorded"),
    "dense+skip": Passes("skip", dense="recorded", recorded=True, fused="around"),
    "fused": Passes("skip", dense="recorded", recorded=True, fused="all"),
}
_SMALL = 2, 4  # samples
_WARM_UP = 3  # steps, in which slim passes are recorded
_ONLY_WRITE = {"copy_", "zero_", "fill_", "normal_", "uniform_"}


class Traffic(TorchDispatchMode):
    """Counts the operators that run within it and the values that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.values: Counter[str] = Counter()
        """Operator -> values read and written."""
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
        self.values[name] += sum(map(_in_memory, [*read, *changed.values(), *own]))
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


def convolution_outputs(encoder: nn.Module, size: int) -> int:
    """Y for one sample."""
    found = 0

    def add(_: nn.Module, __: Any, out: Tensor) -> None:
        nonlocal found
        found += out.numel()

    convolutions = [m for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    hooks = [m.register_forward_hook(add) for m in convolutions]
    training = encoder.training
    with torch.no_grad():
        encoder.eval()(torch.zeros(1, 3, size, size))
    encoder.train(training)
    for hook in hooks:
        hook.remove()
    return found


def measure(name: str, ratio: float, plan: str, *, size: int, batch: int) -> dict[str, Any]:
    options = {"encoder.name": name, "views.size": size, "slim.ratio": ratio, "device": "cpu"}
    given = [f"--{key}={value}" for key, value in options.items()]
    config = parse_config("train", ["imagenet100", *given])
    torch.manual_seed(0)
    method = build_method(config, PLANS[plan])
    y = convolution_outputs(method.slicer.encoder, size)
    step = TrainingStep(method, config, Ranks(0, 1, torch.device("cpu")), steps_per_epoch=100)
    counted = []
    for samples in _SMALL:
        images = torch.randn(2, samples, 3, size, size)
        a, b = (v.contiguous(memory_format=torch.channels_last) for v in images)
        for number in range(_WARM_UP):
            step(a, b, number)
        with Traffic() as traffic:
            step(a, b, _WARM_UP)
        counted.append(traffic)
    small, large = counted
    per_sample = {
        op: (n - small.values[op]) / (_SMALL[1] - _SMALL[0]) for op, n in large.values.items()
    }
    total = sum(per_sample.values())
    most = sorted(per_sample.items(), key=lambda item: -item[1])[:10]
    return {
        "encoder": name,
        "ratio": ratio,
        "plan": plan,
        "operators": large.operators,
        "launches": large.launches,
        "in_y": round(total / y, 2),
        "gbytes": round(2 * batch * total / 1e9, 2),
        "y_gbytes": round(2 * batch * y / 1e9, 3),
        "most": {op: round(n / y, 2) for op, n in most},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--encoder", nargs="+", default=["mobilenetv1_100"])
    parser.add_argument("--plan", nargs="+", choices=PLANS, default=list(PLANS))
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=224, help="of the images, in pixels")
    parser.add_argument("--batch", type=int, default=256, help="that the GB are of")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    print(f"{'encoder':22} {'plan':15} {'operators':>9} {'launches':>8} {'Y':>6} {'GB':>7}")
    rows = []
    for name in options.encoder:
        for plan in options.plan:
            row = measure(name, options.ratio, plan, size=options.size, batch=options.batch)
            rows.append(row)
            print(
                f"{name:22} {plan:15} {row['operators']:9} {row['launches']:8}"
                f" {row['in_y']:6.1f} {row['gbytes']:7.1f}",
                flush=True,
            )
    if options.json:
        result = {"benchmark": "bench_traffic", "size": options.size, "batch": options.batch}
        write_json(options.json, {**result, "rows": rows})


if __name__ == "__main__":
    main()
