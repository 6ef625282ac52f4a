"""How autograd knows a tensor that exists in pieces; see ``slim.tensor``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable


class _Gradient(torch.autograd.Function):
    """Autograd's node of a wrapper: the gradient of its dense form goes on to its sources."""

    @staticmethod
    def forward(ctx: Any, wrapper: Tensor, dense: Callable[[], Tensor], *sources: Tensor) -> Tensor:
        ctx.dense, ctx.sources = dense, sources
        ctx.mark_dirty(wrapper)
        ctx.set_materialize_grads(False)
        return wrapper

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None) -> Any:
        if gradient is None:  # from a node that replaced this one
            return (None,) * (2 + len(ctx.sources))
        with torch.enable_grad():
            dense = ctx.dense()
        # The graph of the parts belongs to whoever else has them.
        found = torch.autograd.grad(
            dense, ctx.sources, gradient, retain_graph=True, allow_unused=True
        )
        return None, None, *found


class DenseForm(torch.autograd.Function):
    """The dense form, with the gradient going on to the wrapper's node."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.dense().clone()  # type: ignore[attr-defined,no-any-return]

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Tensor:
        return gradient


def connect(wrapper: Tensor, dense: Callable[[], Tensor], sources: Sequence[Tensor]) -> None:
    """Have autograd know the wrapper as made of ``sources``."""
    sources = [t for t in sources if t.requires_grad]
    if sources:
        with torch._C.DisableTorchFunctionSubclass():
            _Gradient.apply(wrapper, dense, *sources)
