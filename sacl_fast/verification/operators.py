"""Cases of the operators that models, the loss and the optimiser call: values, gradients, and
running statistics or state where there are any.

Shapes are odd in the kernels' eyes: channels that fill no vector, index lists, one pixel, more
samples than features and fewer.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sacl_fast.ops.batch_norm_act import Activation
from sacl_fast.ops.batch_norm_act import batch_norm_act as _batch_norm_act
from sacl_fast.ops.depthwise_conv import depthwise_conv as _depthwise_conv
from sacl_fast.ops.lars import Item, Settings, Updater, update_one
from sacl_fast.ops.slim_add import slim_add as _slim_add
from sacl_fast.ops.slim_gate import slim_gate as _slim_gate
from sacl_fast.ops.slim_pointwise import slim_pointwise as _slim_pointwise
from sacl_fast.ops.xcorr_loss import Algorithm, sacl_xd_loss
from sacl_fast.verification.comparison import Here


def slim_pointwise(here: Here) -> dict[str, Tensor]:
    inputs, outputs = here.order(24), here.order(31)
    leaves = {
        "x": here.images(3, 13, 5, 7),
        "weight": here.parameters(31, 24, 1, 1),
        "rest": here.images(3, 4, 1, 1),
        "offset": here.images(1, 17, 1, 1),
        "map": here.images(1, 3, 5, 7),
    }
    x, weight, rest, offset, map = _require_grad(leaves)
    y = _slim_pointwise(
        x, weight, inputs[:13], outputs[:17], rest, inputs[13:17], offset, map, inputs[17:20],
        backend=here.backend,
    )  # fmt: skip
    results = here.with_gradients({"y": y}, leaves)
    plain = {"x": here.images(2, 16, 3, 3), "weight": here.parameters(24, 16, 1, 1)}
    y = _slim_pointwise(*_require_grad(plain), backend=here.backend)
    return {**results, **_of("all channels", here.with_gradients({"y": y}, plain))}


def depthwise_conv(here: Here) -> dict[str, Tensor]:
    results = {}
    for kernel, stride, lists in ((3, 1, False), (5, 2, True)):
        leaves = {
            "x": here.images(3, 13, 9, 6),
            "weight": here.values(13 + 3 * lists, 1, kernel, kernel),
        }
        inputs, outputs = (here.order(13)[:9], here.order(16)[:7]) if lists else (None, None)
        x, weight = _require_grad(leaves)
        y = _depthwise_conv(
            x,
            weight,
            inputs,
            outputs,
            stride=(stride, stride),
            padding=(kernel // 2, kernel // 2),
            backend=here.backend,
        )
        results |= _of(f"{kernel}x{kernel}", here.with_gradients({"y": y}, leaves))
    return results


def batch_norm_act(here: Here) -> dict[str, Tensor]:
    results = {}
    cases: tuple[tuple[Activation, bool], ...] = (("relu", False), ("hardswish", True))
    for act, lists in cases:
        channels = 29 if lists else 21
        leaves = {
            "x": here.images(4, 21, 5, 3, shift=2.0),
            "weight": here.parameters(channels),
            "bias": here.parameters(channels),
        }
        options: dict[str, Tensor] = {}
        if lists:
            leaves["map"] = here.images(1, 5, 5, 3)
            order = here.order(channels)
            names = ("kept_index", "map_index", "zeroed_index")
            options = dict(zip(names, order.split([21, 5, 3]), strict=True))
            options["map"] = leaves["map"].requires_grad_()
        x, weight, bias, *_ = _require_grad(leaves)
        running = here.parameters(channels), here.parameters(channels).square()
        found = _batch_norm_act(
            x, weight, bias, *running, count=60, act=act, backend=here.backend,
            **options,  # pyright: ignore[reportArgumentType]
        )  # fmt: skip
        outputs = {n: y for n, y in zip(("y", "rest", "map"), found, strict=True) if y is not None}
        if not lists:
            del outputs["rest"]  # of no channels
        own = here.with_gradients(outputs, leaves)
        own |= zip(("running mean", "running variance"), running, strict=True)
        results |= _of(act, own)
    return results


def slim_add(here: Here) -> dict[str, Tensor]:
    leaves = {
        "a": here.images(3, 11, 5, 3),
        "constants of a": here.images(1, 6, 1, 1),
        "b": here.images(3, 9, 5, 3),
        "constants of b": here.images(1, 8, 1, 1),
    }
    a, a_rest, b, b_rest = _require_grad(leaves)
    a_index, b_index = here.order(17)[:14], here.order(17)[:14]
    y = _slim_add(a, a_rest, a_index, b, b_rest, b_index, backend=here.backend)
    return here.with_gradients({"y": y}, leaves)


def slim_gate(here: Here) -> dict[str, Tensor]:
    leaves = {
        "x": here.images(3, 11, 5, 3),
        "map": here.images(1, 6, 5, 3),
        "gate": here.images(3, 20, 1, 1),
    }
    x, map, gate = _require_grad(leaves)
    order = here.order(20)
    y = _slim_gate(x, map, gate, order[:11], order[11:17], backend=here.backend)
    return here.with_gradients({"y": y}, leaves)


def xcorr_loss(here: Here) -> dict[str, Tensor]:
    results = {}
    algorithms: tuple[tuple[Algorithm, int], ...] = (("gram", 21), ("tiles", 13))
    for algorithm, features in algorithms:
        common = here.drawn(18, features)
        zs = [
            (common + here.drawn(18, features)).to(here.checked).to(here.device, here.dtype)
            for _ in range(4)
        ]
        leaves = {"z1": zs[0].requires_grad_(), "z2": zs[1].requires_grad_()}
        loss, _ = sacl_xd_loss(
            *zs, alpha=0.5, lambda_=0.1, algorithm=algorithm, backend=here.backend
        )
        found = torch.autograd.grad(loss, list(leaves.values()))
        own = {"loss": loss}
        own |= {f"gradient of {n}": g for n, g in zip(leaves, found, strict=True)}
        results |= _of(algorithm, own)
    return results


def lars(here: Here) -> dict[str, Tensor]:
    """Two updates, by the formula where it is plain PyTorch that is asked."""
    device = here.device
    shapes = ((19, 7, 3, 3), (5, 11), (1,), (31,))
    parameters = [here.parameters(*shape) for shape in shapes]
    before = [p.clone() for p in parameters]
    momenta = [torch.zeros_like(p) for p in parameters]
    settings = Settings(
        lr=torch.tensor(0.3, device=device, dtype=here.precise),
        momentum=0.9,
        weight_decay=0.05,
        eta=0.3,
        clip=True,
        grad_scale=torch.tensor(4.0, device=device),
        found_inf=torch.tensor(0.0, device=device),
    )
    update = Updater(here.backend, device) if here.backend != "torch" else None  # pyright: ignore[reportArgumentType]
    for step in range(2):
        gradients = [here.parameters(*shape) * (step + i) for i, shape in enumerate(shapes)]
        items = [
            Item(p, g, m, p.ndim > 1)
            for p, g, m in zip(parameters, gradients, momenta, strict=True)
        ]
        if update is not None:
            update(items, settings)
        else:
            for item in items:
                update_one(item, settings)
    results = {}
    for shape, p, start, m in zip(shapes, parameters, before, momenta, strict=True):
        results |= _of(str(shape), {"update": p - start, "momentum": m})
    return results


def _require_grad(leaves: dict[str, Tensor]) -> list[Tensor]:
    return [leaf.requires_grad_() for leaf in leaves.values()]


def _of(what: str, results: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{name} ({what})": value for name, value in results.items()}
