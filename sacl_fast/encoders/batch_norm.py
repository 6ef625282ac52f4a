"""Batch norm over the global batch, on any device.

``torch.nn.SyncBatchNorm`` refuses CPU tensors, and so does DDP for it. This one computes the same
there with two differentiable sums over the ranks (mean first, then the centred squares, so that
nothing cancels); on a GPU it calls torch's fused kernels.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist
from timm.layers import BatchNormAct2d
from torch import Tensor, nn
from torch.nn.modules._functions import SyncBatchNorm as _FusedSyncBatchNorm
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.ops.collectives import sum_over_ranks, world_size


class GlobalBatchNorm(_BatchNorm):
    """Batch norm of (N, C, ...) with statistics over all ranks, each bringing N samples."""

    synchronize = True

    def _check_input_dim(self, input: Tensor) -> None:
        assert input.ndim >= 2, f"batch norm of a tensor of {input.ndim} dimensions"

    def forward(self, input: Tensor) -> Tensor:
        if not (self.training and self.synchronize and world_size() > 1):
            return super().forward(input)
        momentum = self._count_batch()
        if input.is_cuda:
            return _FusedSyncBatchNorm.apply(
                input,
                self.weight,
                self.bias,
                self.running_mean,
                self.running_var,
                self.eps,
                momentum,
                dist.group.WORLD,
                world_size(),
            )  # type: ignore[return-value]
        return self._normalize(input, momentum)

    def _count_batch(self) -> float:
        """Count this batch; the weight it has in the running statistics."""
        if self.num_batches_tracked is None:
            return 0.0
        self.num_batches_tracked.add_(1)
        return 1.0 / float(self.num_batches_tracked) if self.momentum is None else self.momentum

    def _normalize(self, x: Tensor, momentum: float) -> Tensor:
        dims = [0, *range(2, x.ndim)]
        shape = [1, -1, *[1] * (x.ndim - 2)]
        wide = x if x.dtype == torch.float64 else x.float()
        count = x.numel() // x.shape[1] * world_size()
        mean = sum_over_ranks(wide.sum(dims)) / count  # (C,)
        centered = wide - mean.view(shape)
        var = sum_over_ranks(centered.square().sum(dims)) / count  # (C,)
        if self.running_mean is not None and self.running_var is not None:
            unbiased = var.detach() * (count / max(1, count - 1))
            self.running_mean.lerp_(mean.detach().to(self.running_mean.dtype), momentum)
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), momentum)
        out = centered * (var + self.eps).rsqrt().view(shape)
        if self.affine:
            out = out * self.weight.view(shape) + self.bias.view(shape)
        return out.to(x.dtype)


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
        momentum=module.momentum,  # type: ignore[arg-type]
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
