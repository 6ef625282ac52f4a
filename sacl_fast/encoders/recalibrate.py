"""Batch-norm statistics of one network, estimated anew.

The dense and the slim encoder share their batch norms, so the running statistics are those of a
mixture that neither network ever produces; an encoder evaluated with them scores far below what
it has learnt. A few forward passes give each network its own (as slimmable networks do: Yu &
Huang, "Universally Slimmable Networks", ICCV 2019, section 3.3).

Channels that are constant, as zeroed filters leave them behind, are normalised exactly. In float32
the mean of such a channel has an error of rounding, which the norm multiplies by ``1 / sqrt(eps)``,
316, where exact arithmetic gives 0; the next norm multiplies it again. In RepViT, where norms of
constants follow one another, the fourth one gave noise as large as the signal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.encoders.batch_norm import GlobalBatchNorm
from sacl_fast.errors import UserError


@contextmanager
def recalibrated(encoder: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """The encoder in eval mode, with running statistics estimated from these batches alone.

    Inside, ``running_mean`` and ``running_var`` of every batch norm are the plain averages of the
    batches' statistics; of a channel that is one and the same number in all of them, that number
    and 1. (Any variance gives the same then, and 1 leaves rounding as small as it is. Where norms
    are synchronised, channels are not looked at.) Afterwards, also after an exception, buffers,
    momentum and training flags are what they were, bit for bit and in the same memory. An encoder
    without batch norm is only put into eval mode, and no batch is read.

    The encoder is run as it stands: enter the slicer's mode and autocast before this. With
    synchronised batch norm every process must enter, with equally many batches.

    Args:
        batches: images (N, C, H, W) on the encoder's device. Each counts the same, so they should
            be equally large.

    Raises:
        UserError: there are no batches, or one of them has one value of a channel.
    """
    norms = [m for m in encoder.modules() if isinstance(m, _BatchNorm) and m.track_running_stats]
    flags = [(module, module.training) for module in encoder.modules()]
    momenta = [(norm, norm.momentum) for norm in norms]
    buffers = [(b, b.clone()) for norm in norms for b in norm.buffers(recurse=False)]
    try:
        encoder.eval()
        if norms:
            _estimate(encoder, norms, batches)
        yield
    finally:
        for norm, momentum in momenta:
            norm.momentum = momentum
        for module, training in flags:
            module.training = training
        with torch.no_grad():
            for buffer, saved in buffers:
                buffer.copy_(saved)


@torch.no_grad()
def _estimate(encoder: nn.Module, norms: list[_BatchNorm], batches: Iterable[Tensor]) -> None:
    constants = [_Constants(norm) for norm in norms if not _is_synchronised(norm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over batches
        norm.training = True  # not norm.train(): a dropout inside a norm stays off
    seen = 0
    with ExitStack() as undo:
        for of_norm in constants:
            # Before a slicer's hooks, which take a constant's value away.
            hook = of_norm.norm.register_forward_pre_hook(of_norm.take_out, prepend=True)
            undo.callback(hook.remove)
        for seen, images in enumerate(batches, start=1):  # noqa: B007
            encoder(images)
    if seen == 0:
        raise UserError("batch-norm statistics need at least one batch of images; none was given")
    for of_norm in constants:
        of_norm.put_back()
    for norm in norms:
        norm.training = False


def _is_synchronised(norm: _BatchNorm) -> bool:
    return isinstance(norm, nn.SyncBatchNorm) or (
        isinstance(norm, GlobalBatchNorm) and norm.is_global
    )


class _Constants:
    """The constant channels that a batch norm is given, batch after batch."""

    def __init__(self, norm: _BatchNorm) -> None:
        assert norm.running_mean is not None and norm.running_var is not None
        self.norm, self.mean, self.var = norm, norm.running_mean, norm.running_var  # (C,)
        self.calls = 0
        self.sum = torch.zeros_like(self.mean)
        """Of the constants that were taken out."""
        self.value = self.sum
        """Of each channel in the first batch."""
        self.always = torch.zeros_like(self.mean, dtype=torch.bool)
        """Whether a channel was that in every batch."""

    def take_out(self, norm: nn.Module, arguments: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        """Zeros in their place, which the norm makes its bias of, without rounding."""
        x, *rest = arguments  # (N, C, ...)
        if x.shape.numel() <= x.shape[1]:
            raise UserError(
                "batch-norm statistics cannot be estimated from one image at a time: maps of shape "
                f"{tuple(x.shape)} have one value a channel; batches of at least two images work "
                "(eval.batch_size, and as many training images)"
            )
        dims = [0, *range(2, x.ndim)]
        low, high = x.amin(dims), x.amax(dims)
        constant = (low == high) & low.isfinite()
        low = low.to(self.mean.dtype)
        if self.calls == 0:
            self.value, self.always = low, constant
        self.calls += 1
        self.always = self.always & constant & (low == self.value)
        self.sum = self.sum + torch.where(constant, low, 0)
        return torch.where(constant.view(1, -1, *[1] * (x.ndim - 2)), 0, x), *rest

    def put_back(self) -> None:
        """The statistics with what was taken out."""
        mean = self.mean + self.sum / max(1, self.calls)
        self.mean.copy_(torch.where(self.always, self.value, mean))
        self.var.masked_fill_(self.always, 1)
