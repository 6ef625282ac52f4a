"""Batch norm of one part of a slim activation, as the dense batch norm would treat its channels.

A part holds some channels in a form that broadcasts to ``(N, K, H, W)`` (see ``slim_conv``). Every
value of it stands for equally many of the full activation, so mean and variance are those of the
part at its own size; only the running variance, which is unbiased, needs the full count
``n = N * H * W``. A constant channel has variance 0 and comes out as the norm's bias exactly.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from sacl_fast.ops.batch_norm import affine, standardize_channels, update_running
from sacl_fast.ops.collectives import world_size
from sacl_fast.ops.global_batch_norm import global_batch_norm
from sacl_fast.ops.slim_conv import take


def slim_batch_norm(
    values: Tensor,
    channel_index: Tensor | None,
    count: int,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    *,
    training: bool,
    momentum: float,
    eps: float,
    over_ranks: bool = False,
    damped: bool = False,
) -> Tensor:
    """Normalises the channels ``channel_index`` and updates their running statistics.

    Args:
        values: (1 or N, K, 1 or H, 1 or W).
        channel_index: (K,), which channels of the full vectors these are; None: all, in order.
        count: values of a channel of the full activation, N * H * W.
        running_mean, running_var, weight, bias: full, (C,) or None; as in ``F.batch_norm``.
        over_ranks: in training, with the statistics of all ranks. One sample's values are then
            those of every sample of every rank, so N must be more than 1.
        damped: as of ``global_batch_norm``, where the ranks' statistics are merged.
    """
    weight, bias, mean, var = (
        None if v is None else take(v, channel_index)
        for v in (weight, bias, running_mean, running_var)
    )
    norm = mean, var, weight, bias
    if training and over_ranks and values.shape[0] > 1:
        out = global_batch_norm(values, *norm, momentum, eps, damped, count)
    elif not training or values.numel() == count * values.shape[1]:
        out = F.batch_norm(values, *norm, training, momentum, eps)
    else:
        out, batch_mean, batch_var = standardize_channels(values, eps)
        count *= world_size() if over_ranks else 1
        update_running(mean, var, batch_mean, batch_var, count, momentum)
        out = affine(out, weight, bias).to(values.dtype)
    if training and channel_index is not None:
        for full, own in ((running_mean, mean), (running_var, var)):
            if full is not None and own is not None:
                # As torch's own kernel does, without autograd's notice: it has saved the buffers
                # of the passes before, though their gradient does not depend on them.
                full.data.index_copy_(0, channel_index, own)
    return out
