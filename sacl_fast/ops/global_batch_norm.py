"""Batch norm with the statistics of all ranks, each bringing as many samples.

Forward, one collective: every rank's mean and spread of each channel, gathered and merged by Chan's
formula, so that nothing cancels::

    mean = mean of m_r            var = mean of (v_r + (m_r - mean)^2)
    y = (x - mean) * rstd * weight + bias                      rstd = 1 / sqrt(var + eps)

Backward, one more: the sums of dy and of dy * (x - mean), reduced::

    dx = (dy - mean of dy - (x - mean) * rstd^2 * mean of dy * (x - mean)) * rstd * weight

Only x and (C,) vectors are kept for it. torch's synchronised batch norm computes the same, but has
the host read in each norm which ranks have samples. On GPUs its kernels are used here, on CPUs
plain arithmetic. Statistics are in float32, of float64 in float64.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.overrides import handle_torch_function, has_torch_function_unary

from sacl_fast.ops.batch_norm import first_and_variance, put_back, update_running
from sacl_fast.ops.collectives import world_size

_ops = torch.ops.sacl_fast


def global_batch_norm(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None,
    bias: Tensor | None,
    momentum: float,
    eps: float,
    damped: bool = False,
    count: int | None = None,
) -> Tensor:
    """``F.batch_norm`` of (N, C, ...) in training, with the statistics of all ranks.

    Args:
        x: (N, C, ...), on each rank as many samples.
        running_mean, running_var, weight, bias: (C,) or None.
        damped: normalise ``ops.batch_norm.damped(x)``, by the first rank's first values.
        count: this rank's values of a channel that the unbiased running variance is of; None:
            those of x.
    """
    if has_torch_function_unary(x):
        norm = running_mean, running_var, weight, bias, momentum, eps
        return handle_torch_function(global_batch_norm, (x,), x, *norm, damped, count)
    count = count or x.numel() // x.shape[1]
    return _GlobalBatchNorm.apply(
        x, weight, bias, running_mean, running_var, momentum, eps, damped, count
    )


class _GlobalBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        momentum: float,
        eps: float,
        damped: bool,
        count: int,
    ) -> Tensor:
        taken = _common(*first_and_variance(x), eps) if damped else None
        if taken is not None:
            x = x - taken.to(x.dtype).view(_dims(x)[1])
        x = x.contiguous(memory_format=_format(x))
        mean, rstd = _statistics(x, running_mean, running_var, momentum, eps, count)
        if taken is not None:
            put_back(running_mean, taken, momentum)
        ctx.save_for_backward(x, weight, mean, rstd)
        ctx.eps, ctx.damped = eps, damped
        return _normalised(x, weight, bias, mean, rstd, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, mean, rstd = ctx.saved_tensors
        dy = gradients[0].contiguous(memory_format=_format(x))
        wants_x, wants_weight, wants_bias = ctx.needs_input_grad[:3]
        sums, dweight, dbias = _gradient_sums(dy, x, weight, mean, rstd)
        dx = None
        if wants_x:
            scale = None if weight is None else weight.to(mean.dtype)
            if ctx.damped:
                factor = (1 / (ctx.eps * rstd.square()) - 1).clamp(0, 1)  # variance / eps
                scale = factor if scale is None else factor * scale
            dx = _input_gradient(dy, x, scale, mean, rstd, _ops.all_reduce(sums))
        return (
            dx,
            dweight if wants_weight else None,
            dbias if wants_bias else None,
            *[None] * 6,
        )


# --- by torch's kernels on a GPU, by plain arithmetic elsewhere ----------------------------------


def _by_kernels(x: Tensor) -> bool:
    return x.is_cuda


def _common(first: Tensor, variance: Tensor, eps: float) -> Tensor:
    """What is taken away (C,) on all ranks: the first rank's first value of a channel that hardly
    varies on any, else 0."""
    own = torch.cat([first.to(variance.dtype), variance])
    firsts, variances = _ops.all_gather(own).view(world_size(), 2, -1).unbind(1)
    return torch.where((variances < eps).all(0), firsts[0], 0)


def _statistics(
    x: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    momentum: float,
    eps: float,
    count: int,
) -> tuple[Tensor, Tensor]:
    """The global batch's mean (C,) and rstd (C,); running statistics are updated."""
    ranks = world_size()
    if _by_kernels(x):
        own = torch.cat(torch.batch_norm_stats(x, eps))  # mean and rstd
        gathered = _ops.all_gather(own).view(ranks, 2, -1)
        running: Any = [None if v is None else v.detach() for v in (running_mean, running_var)]
        kind = own.dtype if running_mean is None else running_mean.dtype
        counts = torch.full((ranks,), count, dtype=kind, device=x.device)
        return torch.batch_norm_gather_stats_with_counts(
            x, gathered[:, 0], gathered[:, 1], running[0], running[1], momentum, eps, counts
        )
    dims, shape = _dims(x)
    wide = _wide(x)
    mean = wide.mean(dims)
    var = (wide - mean.view(shape)).square_().mean(dims)
    means, variances = _ops.all_gather(torch.cat([mean, var])).view(ranks, 2, -1).unbind(1)
    # From the first rank's, so that a constant that all ranks have is exactly their mean.
    means = means - (first := means[0])  # (W, C)
    shift = means.mean(0)
    mean = first + shift
    var = variances.mean(0) + (means - shift).square().mean(0)
    update_running(running_mean, running_var, mean, var, ranks * count, momentum)
    return mean, (var + eps).rsqrt()


def _normalised(
    x: Tensor, weight: Tensor | None, bias: Tensor | None, mean: Tensor, rstd: Tensor, eps: float
) -> Tensor:
    if _by_kernels(x):
        return torch.batch_norm_elemt(x, weight, bias, mean, rstd, eps)
    _, shape = _dims(x)
    scale = (rstd if weight is None else rstd * weight).view(shape)
    # A new tensor: torch.compile 2.11 loses the gradient where a Function returns what in-place
    # arithmetic, or a cast to its own type, has given.
    if bias is None:
        y = (x - mean.view(shape)) * scale
    else:
        y = torch.addcmul(bias.to(mean.dtype).view(shape), x - mean.view(shape), scale)
    return y if y.dtype == x.dtype else y.to(x.dtype)


def _gradient_sums(
    dy: Tensor, x: Tensor, weight: Tensor | None, mean: Tensor, rstd: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """This rank's sums of dy and of dy * (x - mean), (2, C), and its gradients of weight and
    bias (C,)."""
    if _by_kernels(x):
        *sums, dweight, dbias = torch.batch_norm_backward_reduce(
            dy, x, mean, rstd, weight, True, True, True
        )
        return torch.stack(sums), dweight, dbias
    dims, shape = _dims(x)
    sum_dy = _wide(dy).sum(dims)
    sum_dy_x = (x - mean.view(shape)).mul_(dy).sum(dims)
    return torch.stack([sum_dy, sum_dy_x]), sum_dy_x * rstd, sum_dy


def _input_gradient(
    dy: Tensor, x: Tensor, scale: Tensor | None, mean: Tensor, rstd: Tensor, total: Tensor
) -> Tensor:
    """
    Args:
        scale: (C,), None: 1.
        total: (2, C), the sums of all ranks.
    """
    count = world_size() * (x.numel() // x.shape[1])
    if _by_kernels(x):
        counts = torch.full((1,), count, dtype=torch.int32, device=x.device)
        sum_dy, sum_dy_x = total
        return torch.batch_norm_backward_elemt(dy, x, mean, rstd, scale, sum_dy, sum_dy_x, counts)
    _, shape = _dims(x)
    mean_dy, mean_dy_x = total / count
    dx = (x - mean.view(shape)).mul_((-rstd.square() * mean_dy_x).view(shape))
    dx.add_(dy).sub_(mean_dy.view(shape))
    return dx.mul_((rstd if scale is None else rstd * scale).view(shape)).to(x.dtype)


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()


def _dims(x: Tensor) -> tuple[list[int], list[int]]:
    """All dimensions but the channels', and the shape of a vector of channels beside x."""
    return [0, *range(2, x.ndim)], [1, -1, *[1] * (x.ndim - 2)]


def _format(x: Tensor) -> torch.memory_format:
    """The one that x is in, or else the default one."""
    last = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.ndim)
    if last is not None and not x.is_contiguous() and x.is_contiguous(memory_format=last):
        return last
    return torch.contiguous_format
