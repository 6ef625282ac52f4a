"""Cases of the operators that fused passes are made of, on CUDA devices.

What they are held against is their own implementation on CPUs, plain PyTorch in ``ops``. Sums that
a kernel leaves in sets of its own choice are compared when they are one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sacl_fast.ops.batch_norm_act import ACTIVATIONS
from sacl_fast.verification.comparison import Here

_RELU6, _HARDSWISH, _SILU = (list(ACTIVATIONS).index(a) for a in ("relu6", "hardswish", "silu"))
_EPS, _MOMENTUM = 1e-2, 0.1


def norm_act(here: Here) -> dict[str, Tensor]:
    """All parts of a batch norm with its activation, forward and backward."""
    op, N, K, C = torch.ops.sacl_fast, 3, 13, 20
    x, dy = here.images(N, K, 5, 7, shift=2.0), here.images(N, K, 5, 7)
    weight, bias, mean = here.parameters(3, C).unbind()
    var, shift, drest = here.parameters(C).square(), here.parameters(K), here.parameters(4)
    order, act = here.order(C), _SILU
    lists = order[:K], order[K : K + 4]
    sums = op.norm_act_moments(x)
    affine, rest = op.norm_act_affine(
        sums, weight, bias, *lists, mean, var, shift, 140, _MOMENTUM, _EPS, act
    )
    other, gate, dmean = here.images(N, K, 5, 7), here.values(N, K), here.values(N, K)
    g, gsums = op.norm_act_gradient(dy, x, affine, act, gate, dmean)
    coefficients, dweight, dbias = op.norm_act_coefficients(
        gsums, drest, weight, bias, *lists, affine, N * 35, act
    )
    border = op.norm_act_offset_gradient(g, x, coefficients, [1, K, 5, 7], [1, 1, 2, 0])
    return {
        "affine": affine,
        "constants": rest,
        "running mean": mean,
        "running variance": var,
        "output": op.norm_act_apply(x, affine, act, other, here.affine(K), _RELU6),
        "mean": op.norm_act_mean(x, affine, act),
        "gradient of the norm's output": g,
        "gradient of the gate": op.norm_act_gate_gradient(dy, x, affine, act),
        "coefficients": coefficients,
        "gradient of weight": dweight,
        "gradient of bias": dbias,
        "gradient of x": op.norm_act_input_gradient(g, x, coefficients),
        "gradient of an offset": op.norm_act_offset_gradient(g, None, None, [1, K, 1, 7], []),
        "gradient along a border": border,
    }


def norm_depthwise(here: Here) -> dict[str, Tensor]:
    op = torch.ops.sacl_fast
    given = (
        here.images(3, 13, 9, 6), here.affine(13), _HARDSWISH, here.values(11, 3, 3),
        here.order(11)[:8], here.order(13)[:9], [2, 2], [1, 1], [1, 1],
    )  # fmt: skip
    y, sums = op.norm_depthwise(*given)
    raw, g, coefficients = here.images(*y.shape), here.images(*y.shape), here.affine(9)
    dx, gsums, dweight = op.norm_depthwise_backward(g, raw, coefficients, *given, True)
    return {"y": y, "gradient of weight": dweight, **_sums(sums), **_to_norm(dx, gsums)}


def norm_pointwise(here: Here) -> dict[str, Tensor]:
    """With all at once, and with few outputs and with many, which are different kernels."""
    op, results = torch.ops.sacl_fast, {}
    for K, outputs in ((13, 9), (24, 152)):
        inputs, filters = here.order(K + 3)[:K], here.order(outputs + 2)[:outputs]
        x, gate = here.images(2, K, 5, 7), here.values(2, K).sigmoid().to(here.precise)
        operand = x, here.affine(K), _HARDSWISH, gate
        product = here.parameters(outputs + 2, K + 3) * K**-0.5, inputs, filters
        y, sums = op.norm_pointwise(*operand, *product, here.images(1, outputs, 5, 7))
        raw, g, coefficients = here.images(*y.shape), here.images(*y.shape), here.affine(outputs)
        dx, gsums, dgate, dweight = op.norm_pointwise_backward(
            g, raw, coefficients, *operand, *product, True, True, here.images(*x.shape)
        )
        own = {"y": y, "gradient of the gate": dgate, "gradient of weight": dweight}
        own |= {**_sums(sums), **_to_norm(dx, gsums)}
        results |= {f"{name} ({K} to {outputs})": value for name, value in own.items()}
    return results


def norm_slim_add(here: Here) -> dict[str, Tensor]:
    y = torch.ops.sacl_fast.norm_slim_add(
        here.images(3, 11, 5, 3), here.affine(11), here.values(6), here.order(17)[:14],
        here.images(3, 9, 5, 3), None, here.values(8), here.order(17)[:14],
    )  # fmt: skip
    return {"y": y}


def norm_slim_gate(here: Here) -> dict[str, Tensor]:
    op, order = torch.ops.sacl_fast, here.order(20)
    given = (
        here.images(3, 11, 5, 3), here.affine(11), _SILU, here.images(1, 6, 5, 3),
        here.values(3, 20), order[:11], order[11:17],
    )  # fmt: skip
    y = op.norm_slim_gate(*given)
    dmap, dgate = op.norm_slim_gate_backward(here.images(*y.shape), *given)
    return {"y": y, "gradient of the map": dmap, "gradient of the gate": dgate}


def slim_border(here: Here) -> dict[str, Tensor]:
    op, C, S, R = torch.ops.sacl_fast, 14, 6, 5
    order, filters = here.order(C), here.values(C, 3, 3)
    running = here.parameters(C), here.parameters(C).square()
    before = here.values(S + 3), filters, order[:S], here.order(S + 3)[:S], 9, 11
    before += [2, 2], [1, 1], [1, 1], here.parameters(C), here.parameters(C), order[:S]
    # Without a large eps no offset depends on the constants, and rounding were their gradient.
    norm = *running, 500, _MOMENTUM, 0.5
    after = _RELU6, here.values(9, C), order[:S], here.order(9)[:7], here.values(R)
    after += (order[S : S + R],)
    offset, saved = op.slim_border(*before, *norm, *after)
    doffset = here.images(*offset.shape).to(here.precise)
    found = op.slim_border_backward(doffset, saved, *before, *after)
    names = ("constants", "filters", "norm's weight", "norm's bias", "weight", "rest")
    gradients = {f"gradient of {name}": g for name, g in zip(names, found, strict=True)}
    if here.checked != torch.float32:  # then it is rounding: a difference of larger numbers
        del gradients["gradient of constants"]
    statistics = zip(("running mean", "running variance"), running, strict=True)
    return {"offset": offset, **gradients, **dict(statistics)}


def _to_norm(dx: Tensor, gsums: Tensor) -> dict[str, Tensor]:
    return {"gradient of the norm's output": dx, "sums of it": gsums.double().sum(0)}


def _sums(sums: Tensor) -> dict[str, Tensor]:
    """Count, mean and squared differences from it, of all sets together."""
    counts, means, squares = sums.double().unbind(1)
    total = counts.sum(0)
    mean = (counts * means).sum(0) / total
    squares = (squares + counts * (means - mean).square()).sum(0)
    return {"count": total, "mean": mean, "squares": squares}
