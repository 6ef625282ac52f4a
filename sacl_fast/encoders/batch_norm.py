"""Batch norm over the global batch, on any device.

``torch.nn.SyncBatchNorm`` refuses CPU tensors, and so does DDP for it. These take
``ops.global_batch_norm``, which runs everywhere.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.ops.collectives import world_size
from sacl_fast.ops.global_batch_norm import global_batch_norm


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of (N, C, ...) with statistics over all ranks, each bringing N samples."""

    synchronize = True
    damped = False
    """See ``ops.batch_norm.damped``; of a norm that communicates."""

    @property
    def is_global(self) -> bool:
        """Whether statistics are those of all ranks now."""
        return self.training and self.synchronize and world_size() > 1

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim >= 2, f"batch norm of a tensor of {input.ndim} dimensions"

    def forward(self, input: Tensor) -> Tensor:
        if not self.is_global:
            return super().forward(input)
        momentum = self._count_batch()
        return global_batch_norm(
            input,
            self.running_mean,
            self.running_var,
            self.weight,
            self.bias,
            momentum,
            self.eps,
            self.damped,
        )

    def _count_batch(self) -> float:
        """Count this batch; the weight it has in the running statistics."""
        if self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum


class GlobalBatchNormAct(GlobalBatchNorm):
    """The same for timm's ``BatchNormAct2d``: batch norm, drop, activation."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: Tensor) -> Tensor:
        return self.act(self.drop(super().forward(input)))


def synchronize_batch_norm(module: nn.Module) -> nn.Module:
    """Replace every batch norm by its global form, sharing parameters and buffers."""
    for name, child in module.named_children():
        setattr(module, name, synchronize_batch_norm(child))
    if not isinstance(module, _BatchNorm) or isinstance(module, GlobalBatchNorm):
        return module
    with_act = isinstance(module, BatchNormAct2d)
    twin = (GlobalBatchNormAct if with_act else GlobalBatchNorm)(
        module.num_features,
        eps=module.eps,
        momentum=module.momentum,
        affine=module.affine,
        track_running_stats=module.track_running_stats,
    )
    twin._parameters.update(module._parameters)
    twin._buffers.update(module._buffers)
    if with_act:
        twin.add_module("drop", module.get_submodule("drop"))
        twin.add_module("act", module.get_submodule("act"))
    return twin.train(module.training)


@contextmanager
def local_batch_norm(module: nn.Module) -> Iterator[None]:
    """Within it, batch norms do not communicate: for work that only one rank does."""
    norms = [m for m in module.modules() if isinstance(m, GlobalBatchNorm)]
    for norm in norms:
        norm.synchronize = False
    try:
        yield
    finally:
        for norm in norms:
            norm.synchronize = True
