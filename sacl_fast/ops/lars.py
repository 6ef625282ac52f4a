r"""LARS, layer-wise adaptive rate scaling (You et al., 2017), with momentum: one update of tensors.

For each parameter p with gradient g and momentum m::

    trust = eta * |p| / (|g| + weight_decay * |p| + 1e-8)      with clip: min(trust / lr, 1)
    m = momentum * m + trust * (g + weight_decay * p)
    p = p - lr * m

Some tensors (one-dimensional ones, as a rule) have trust 1 and no decay; so has a tensor whose
norm, or whose gradient's norm, is 0. With a loss scale, g is the gradient divided by it, and
nothing changes where an overflow was found. All of it stays on the device: no number is waited for.

``update_one`` is the reference: the formula for one tensor, of any type and layout. The backends
are for many at once, and a tensor that one is not made for goes to the next of them:

=========  ==========================  =====================================================
triton     float32 on a GPU            ``sacl_kernels.lars``: 2 launches, 3 where addresses moved
apex       float32 on a GPU            ``lars_apex``: norms and decay by NVIDIA's apex, else torch's
torch      float32, float64            at most 12 calls of PyTorch, 13 with a loss scale
reference  all others                  ``update_one``
=========  ==========================  =====================================================

A call of ``torch._foreach_*`` is one kernel for some dozens of tensors. It takes a factor for each
tensor from the host only (from the device, each is a launch), so the trust ratios are spread over
tensors of the parameters' shapes, and one multiplication takes those.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sacl_fast.config import Backend
from sacl_fast.ops.backend import resolve

_ROW = 256  # values with one trust ratio, as the ratios are spread: a tensor has whole rows
_TYPES = (torch.float32, torch.float64)  # that ``update_many`` is for
_DEVICES = ("cpu", "cuda")
_HAS_FUSED_SGD = hasattr(torch, "_fused_sgd_")  # no public name
_TINY = 2e-38  # in place of 0, by which nothing can be divided


class Settings(NamedTuple):
    """What an update has in common for all tensors of a group."""

    lr: float | Tensor
    """A number, or one on the parameters' device ()."""
    momentum: float
    weight_decay: float
    eta: float
    clip: bool
    grad_scale: Tensor | None = None
    """Gradients are divided by it ()."""
    found_inf: Tensor | None = None
    """Where it is not 0, nothing changes ()."""

    def on(self, device: torch.device) -> Settings:
        """With all of its tensors there."""
        tensors = {
            name: value.to(device, non_blocking=True)
            for name, value in self._asdict().items()
            if isinstance(value, Tensor)
        }
        return self._replace(**tensors)


class Item(NamedTuple):
    """A parameter, its gradient, its momentum, and whether it has a trust ratio and decay."""

    p: Tensor
    g: Tensor
    m: Tensor
    scaled: bool


# --- the reference -------------------------------------------------------------------------------


def update_one(item: Item, settings: Settings) -> None:
    """The formula, in float32 at least."""
    p, m = item.p, item.m
    exact = torch.promote_types(p.dtype, torch.float32)
    g, weight = item.g.to(exact), p.to(exact)
    if settings.grad_scale is not None:
        g = g / settings.grad_scale
    if item.scaled:
        trust, live = trust_ratio(weight.norm(), g.norm(), settings)
        g = trust * (g + settings.weight_decay * torch.where(live, weight, 0.0))
    moved = settings.momentum * m.to(exact) + g
    weight = weight - settings.lr * moved
    if settings.found_inf is not None:
        skip = settings.found_inf != 0
        moved, weight = torch.where(skip, m, moved), torch.where(skip, p, weight)
    m.copy_(moved)
    p.copy_(weight)


def trust_ratio(p_norm: Tensor, g_norm: Tensor, settings: Settings) -> tuple[Tensor, Tensor]:
    """The ratio of a tensor (), and whether both norms are above 0."""
    trust = settings.eta * p_norm / (g_norm + settings.weight_decay * p_norm + 1e-8)
    if settings.clip:
        trust = (trust / _above_zero(settings.lr)).clamp(max=1.0)
    live = (p_norm > 0) & (g_norm > 0)
    return torch.where(live, trust, 1.0), live


def _above_zero(lr: float | Tensor) -> float | Tensor:
    return lr.clamp(min=_TINY) if isinstance(lr, Tensor) else max(lr, _TINY)


# --- many tensors in PyTorch ---------------------------------------------------------------------


Norms = Callable[[list[Tensor]], Sequence[Tensor]]
Decayed = Callable[[list[Tensor], list[Tensor], float], list[Tensor]]


def norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Their Euclidean norms, () each."""
    return torch._foreach_norm(tensors)


def decayed(params: list[Tensor], grads: list[Tensor], weight_decay: float) -> list[Tensor]:
    """g + weight_decay * p, new tensors."""
    return list(torch._foreach_add(grads, params, alpha=weight_decay))


def update_many(
    items: list[Item],
    settings: Settings,
    norms: Norms = norms,
    decayed: Decayed = decayed,
) -> None:
    """The same for tensors of one type on one device, those of an item with the same strides and
    no gaps in memory."""
    params, grads, momenta, count = _lists(items)
    if settings.grad_scale is not None:
        grads = list(torch._foreach_div(grads, settings.grad_scale))
    updates = grads
    if count:
        trusts = _spread_trust(params[:count], grads[:count], settings, norms)
        if settings.weight_decay:
            scaled = decayed(params[:count], grads[:count], settings.weight_decay)
            torch._foreach_mul_(scaled, trusts)
        else:
            scaled = torch._foreach_mul(grads[:count], trusts)
        updates = [*scaled, *grads[count:]]
    # What is left is plain momentum: PyTorch's fused SGD, which also skips where it has to.
    torch._fused_sgd_(
        params,
        updates,
        momenta,
        weight_decay=0.0,
        momentum=settings.momentum or _TINY,  # without momentum it takes no buffers
        lr=settings.lr,
        dampening=0.0,
        nesterov=False,
        maximize=False,
        is_first_step=False,
        found_inf=settings.found_inf,
    )


def _spread_trust(
    params: list[Tensor], grads: list[Tensor], settings: Settings, norms: Norms
) -> list[Tensor]:
    """A tensor for each parameter, of its shape and strides, full of its trust ratio.

    To save launches, a ratio is 0 where the gradient is 0, which stops its decay as well.
    """
    rows = [-(-p.numel() // _ROW) for p in params]
    found = norms([*params, *grads])
    by_row = torch.cat([norm.expand(n) for norm, n in zip(found, 2 * rows, strict=True)])
    # With infinity for 0, a ratio is 0 where g is 0, and else not finite where p is 0.
    p, g = F.threshold(by_row, 0.0, math.inf, inplace=True).view(2, -1)
    zero, ones = _constants(p.dtype, p.device)
    bottom = torch.add(g, p, alpha=settings.weight_decay).add_(1e-8)
    trust = torch.addcdiv(zero, p, bottom, value=settings.eta)  # (rows,)
    spread = torch.empty(len(trust), _ROW, dtype=trust.dtype, device=trust.device)
    if settings.clip:
        if isinstance(settings.lr, Tensor):
            lr = settings.lr.expand(_ROW).clamp(min=_TINY)  # (_ROW,)
        else:
            lr = ones * max(settings.lr, _TINY)
        torch.div(torch.fmin(trust, lr[:1])[:, None], lr, out=spread)  # 1 where not a number
    else:
        torch.nan_to_num(trust[:, None].expand_as(spread), nan=1.0, posinf=1.0, out=spread)
    starts = [0]
    for n in rows:
        starts.append(starts[-1] + n * _ROW)
    return [
        spread.as_strided(p.shape, p.stride(), start)
        for p, start in zip(params, starts, strict=False)
    ]


@cache  # none is ever freed, since a CUDA graph may read it
def _constants(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """0 () and ones (_ROW,)."""
    like = {"dtype": dtype, "device": device}
    return torch.zeros((), **like), torch.ones(_ROW, **like)


# --- which backend -------------------------------------------------------------------------------


class Updater:
    """Updates tensors on a device by the backend that ``ops.backend.resolve`` gives for it."""

    def __init__(self, backend: Backend, device: torch.device) -> None:
        self.backend = resolve(backend, "lars", device).backend
        self.device = device
        self._tables: Any = None
        if self.backend == "triton":
            from sacl_kernels.lars import Tables

            self._tables = Tables()

    def __call__(self, items: list[Item], settings: Settings) -> None:
        """One update of a group's tensors, in place. What the backend is not made for goes to
        ``torch``, and what that is not made for to the reference."""
        settings = settings.on(self.device)
        many: dict[torch.dtype, list[Item]] = {}
        for item in items:
            p = item.p
            if p.numel() == 0:
                continue
            if (
                p.dtype in _TYPES
                and self.device.type in _DEVICES
                and _HAS_FUSED_SGD
                and is_dense(p)
            ):
                many.setdefault(p.dtype, []).append(_with_its_layout(item))
            else:
                update_one(item, settings)
        for dtype, group in many.items():
            if dtype == torch.float32 and self.backend == "triton":
                self._by_triton(group, settings)
            elif dtype == torch.float32 and self.backend == "apex":
                from sacl_fast.ops import lars_apex

                update_many(group, settings, lars_apex.norms, lars_apex.decayed)
            else:
                update_many(group, settings)

    def _by_triton(self, items: list[Item], settings: Settings) -> None:
        from sacl_kernels import lars

        params, grads, momenta, count = _lists(items)
        lars.update(params, grads, momenta, count, **settings._asdict(), tables=self._tables)
        # So that autograd knows, as it does of PyTorch's own operators.
        torch.autograd.graph.increment_version([*params, *momenta])


def _lists(items: list[Item]) -> tuple[list[Tensor], list[Tensor], list[Tensor], int]:
    """Parameters, gradients and momenta, and how many of them have a trust ratio: the first."""
    items = sorted(items, key=lambda item: not item.scaled)
    count = sum(item.scaled for item in items)
    return [item.p for item in items], [item.g for item in items], [item.m for item in items], count


def _with_its_layout(item: Item) -> Item:
    """A gradient of another type or memory format is copied into the parameter's."""
    if lies_like(item.g, item.p):
        return item
    return item._replace(g=torch.empty_like(item.p).copy_(item.g))


def lies_like(x: Tensor, p: Tensor) -> bool:
    """Whether x, of the shape of p, has its type and device, and its values the same order."""
    same_strides = x.stride() == p.stride() or _strides(x) == _strides(p)
    return same_strides and x.dtype == p.dtype and x.device == p.device


def _strides(x: Tensor) -> list[int]:
    """Those that tell where a value lies."""
    return [stride for size, stride in zip(x.shape, x.stride(), strict=True) if size > 1]


def is_dense(x: Tensor) -> bool:
    """Whether the values fill a piece of memory, in whatever order."""
    if x.is_contiguous() or (x.ndim == 4 and x.is_contiguous(memory_format=torch.channels_last)):
        return True
    expected = 1
    for stride, size in sorted(zip(x.stride(), x.shape, strict=True)):
        if size > 1 and stride != expected:
            return False
        expected *= size
    return True
