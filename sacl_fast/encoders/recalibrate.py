"""Batch-norm statistics of one network, estimated anew.

The dense and the slim encoder share their batch norms, so the running statistics are those of a
mixture that neither network ever produces; an encoder evaluated with them scores far below what
it has learnt. A few forward passes give each network its own (as slimmable networks do: Yu &
Huang, "Universally Slimmable Networks", ICCV 2019, section 3.3).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.errors import UserError


@contextmanager
def recalibrated(encoder: nn.Module, batches: Iterable[Tensor]) -> Iterator[None]:
    """The encoder in eval mode, with running statistics estimated from these batches alone.

    Inside, ``running_mean`` and ``running_var`` of every batch norm are the plain averages of the
    batches' statistics. Afterwards, also after an exception, buffers, momentum and training flags
    are what they were, bit for bit and in the same memory. An encoder without batch norm is only
    put into eval mode, and no batch is read.

    The encoder is run as it stands: enter the slicer's mode and autocast before this. With
    synchronised batch norm every process must enter, with equally many batches.

    Args:
        batches: images (N, C, H, W) on the encoder's device. Each counts the same, so they should
            be equally large.
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
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # the plain average over batches
        norm.training = True  # not norm.train(): a dropout inside a norm stays off
    seen = 0
    for seen, images in enumerate(batches, start=1):  # noqa: B007
        encoder(images)
    if seen == 0:
        raise UserError("batch-norm statistics need at least one batch of images; none was given")
    for norm in norms:
        norm.training = False
