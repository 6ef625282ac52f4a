"""Batch norms of modules, damped: see ``ops.batch_norm.damped``."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.encoders.batch_norm import GlobalBatchNorm
from sacl_fast.ops.batch_norm import damped, put_back
from sacl_fast.slim.tensor import SlimTensor


def damp(norm: nn.Module) -> Callable[[], None]:
    """Damp what a batch norm is given in training, but for slim activations, which their rule does;
    returns what undoes it."""
    if isinstance(norm, GlobalBatchNorm) and norm.is_global:
        norm.damped = True
        return lambda: setattr(norm, "damped", False)

    all_taken: list[Tensor] = []

    def before(norm: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        x, *rest = arguments
        if isinstance(x, SlimTensor) or not norm.training:
            return None
        x, taken = damped(x, norm.eps)  # type: ignore[arg-type]
        all_taken.append(taken)
        return x, *rest

    def after(norm: nn.Module, *_: object) -> None:
        assert isinstance(norm, _BatchNorm)
        if all_taken and norm.running_mean is not None:
            momentum = norm.momentum
            if momentum is None:  # the plain average over batches
                assert norm.num_batches_tracked is not None
                momentum = 1 / float(norm.num_batches_tracked)
            put_back(norm.running_mean, all_taken[-1], momentum)
        all_taken.clear()

    hooks = norm.register_forward_pre_hook(before), norm.register_forward_hook(after)

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo
