r"""The objective of SACL-XD: three cross-correlation losses on four embeddings.

With ``norm`` standardising each feature over the batch and :math:`C(p, q) = norm(p)^T norm(q) / N`
(the supplement of Meng et al., NeurIPS 2023)::

    L_CL = sum_i (1 - C_ii)^2 + lambda * sum_{i != j} C_ij^2                  on C(z1, z2)
    L_XD = lambda/2 * [sum_{i != j} C(z1, z1_t)_ij^2 + sum_{i != j} C(z2, z2_t)_ij^2]
    L    = alpha * L_CL + (1 - alpha) * L_XD

Gradients flow through ``z1`` and ``z2`` only. No D x D matrix is formed where N <= D:
``||P^T Q||_F^2 = <P P^T, Q Q^T>`` needs two N x N Gram matrices instead. What differs from the
supplement, and why, is in the README ("The method").
"""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from sacl_fast.errors import UserError
from sacl_fast.ops.collectives import gather_rows, world_size

Distillation = Literal["correlation", "log", "none"]
OffDiagonal = Literal["squared", "literal"]
Pairing = Literal["same_width", "cross_width"]
Variance = Literal["biased", "unbiased"]
Statistics = Literal["global", "local"]


class LossParts(NamedTuple):
    """The terms of the loss, detached, each with its weight: they add up to the loss."""

    on_diagonal: Tensor  # ()
    off_diagonal: Tensor  # ()
    distillation: Tensor  # ()


def standardize(z: Tensor, *, variance: Variance = "biased", eps: float = 1e-5) -> Tensor:
    """Each feature of ``z`` (N, D) with mean 0 and standard deviation 1 over the batch.

    ``biased``: ``(z - mean) / sqrt(var + eps)``, as batch norm. ``unbiased``: ``z.std(0)`` and no
    eps, as the supplement's pseudocode; a constant feature then gives NaN.
    """
    centered = z - z.mean(0)
    if variance == "unbiased":
        return centered / (centered.square().sum(0) / (len(z) - 1)).sqrt()
    return centered * (centered.square().mean(0) + eps).rsqrt()


def _diagonal(p: Tensor, q: Tensor) -> Tensor:
    """The diagonal of C(p, q): (D,)."""
    return (p * q).mean(0)


def _sum_of_squares(p: Tensor, q: Tensor) -> Tensor:
    """The sum of squares of C(p, q), by the smaller of the N x N and the D x D matrices: ()."""
    n, d = p.shape
    if n <= d:
        return ((p @ p.T) * (q @ q.T)).sum() / n**2
    return (p.T @ q).square().sum() / n**2


def _off_diagonal(p: Tensor, q: Tensor, form: OffDiagonal) -> Tensor:
    """Sum over the off-diagonal of C(p, q), of the squares or ``literal``-ly of the values: ()."""
    diagonal = _diagonal(p, q)
    if form == "literal":
        return (p.sum(1) * q.sum(1)).mean() - diagonal.sum()
    return _sum_of_squares(p, q) - diagonal.square().sum()


def _cross_entropy(z: Tensor, target: Tensor) -> Tensor:
    """-softmax(target) log softmax(z), summed over features and averaged over the batch: ()."""
    return F.cross_entropy(z, target.softmax(1))


def sacl_xd_loss(
    z1: Tensor,
    z2: Tensor,
    z1_t: Tensor | None = None,
    z2_t: Tensor | None = None,
    *,
    alpha: float = 0.95,
    lambda_: float = 0.005,
    distillation: Distillation = "correlation",
    off_diagonal: OffDiagonal = "squared",
    pairing: Pairing = "same_width",
    gamma: float = 1e-3,
    variance: Variance = "biased",
    eps: float = 1e-5,
    scale: float = 1.0,
    statistics: Statistics = "global",
) -> tuple[Tensor, LossParts]:
    """The SACL-XD loss and its parts.

    Args:
        z1: dense embedding of view a, with gradient (N, D).
        z2: slim embedding of view b, with gradient (N, D).
        z1_t: dense embedding of view b, without gradient (N, D). Not needed for ``none``.
        z2_t: slim embedding of view a, without gradient (N, D). Not needed for ``none``.
        alpha: weight of L_CL against L_XD.
        lambda_: weight of off-diagonal correlations.
        distillation: ``correlation`` (L_XD); ``log`` (supplement, Eq. 1-2:
            ``L_CL + gamma * mean of -softmax(z_t) log softmax(z)``); ``none`` (L_CL alone).
        off_diagonal: of the XD term; ``literal`` is the pseudocode, unbounded below.
        pairing: ``same_width`` pairs z1 with z1_t and z2 with z2_t (same encoder, other view);
            ``cross_width`` z1 with z2_t and z2 with z1_t (same view, other encoder).
        gamma: weight of the ``log`` distillation.
        variance, eps: see :func:`standardize`.
        scale: factor on the whole loss.
        statistics: with W processes, ``global`` gathers the embeddings: every rank returns the
            loss of the batch of W * N, and ``DistributedDataParallel``'s average of the gradients
            is exactly that loss's gradient. ``local``: each rank's own loss.

    Returns:
        The loss () in fp32 (float64 for float64 embeddings) and :class:`LossParts`.

    Raises:
        UserError: embeddings that are not four (two for ``none``) matrices of one shape, or a
            batch of 1, over which nothing can be standardised.
    """
    if distillation == "none":
        given = [z1, z2]
    elif z1_t is None or z2_t is None:
        raise UserError(f"distillation {distillation!r} needs z1_t and z2_t; without them: 'none'")
    else:
        given = [z1, z2, z1_t.detach(), z2_t.detach()]
    ranks = world_size() if statistics == "global" else 1
    _check(given, ranks)

    with torch.autocast(z1.device.type, enabled=False):
        if statistics == "global":
            given = [gather_rows(z) for z in given]
        # Standardising and reducing in half precision loses the small correlations.
        given = [z if z.dtype == torch.float64 else z.float() for z in given]
        normed = [standardize(z, variance=variance, eps=eps) for z in given[:2]]
        on = (1 - _diagonal(*normed)).square().sum()
        off = lambda_ * _off_diagonal(normed[0], normed[1], "squared")

        if distillation == "none":
            weight, xd = 1.0, torch.zeros_like(on)
        else:
            (z1, z2), targets = given[:2], given[2:]
            if pairing == "cross_width":
                targets.reverse()
            if distillation == "log":
                weight = 1.0
                xd = gamma / 2 * (_cross_entropy(z1, targets[0]) + _cross_entropy(z2, targets[1]))
            else:
                weight = alpha
                normed_t = [standardize(t, variance=variance, eps=eps) for t in targets]
                pairs = zip(normed, normed_t, strict=True)
                leaks = [_off_diagonal(p, q, off_diagonal) for p, q in pairs]
                xd = (1 - alpha) * lambda_ / 2 * (leaks[0] + leaks[1])
        on, off, xd = scale * weight * on, scale * weight * off, scale * xd
        return on + off + xd, LossParts(on.detach(), off.detach(), xd.detach())


def _check(embeddings: list[Tensor], ranks: int) -> None:
    shapes = [tuple(z.shape) for z in embeddings]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2:
        given = ", ".join(map(str, shapes))
        raise UserError(f"embeddings of shapes {given}; matrices of one shape (N, D) work")
    if shapes[0][0] * ranks < 2:
        raise UserError(
            "a batch of 1: the loss standardises every feature over the batch; 2 or more work"
        )
