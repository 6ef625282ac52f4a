r"""The cross-correlation loss in plain PyTorch: the CPU path and the oracle of the kernels.

``A, B`` are the standardised embeddings with gradient, ``S, T`` their targets without, and ``c1,
c2, c3`` the diagonals of :math:`A^T B/N, A^T S/N, B^T T/N`. With the weights of :class:`Terms`::

    loss = on * sum (1 - c1)^2 + off * sum_{i != j} C(A, B)_ij^2
         + xd * sum_{i != j} [C(A, S)_ij^2 + C(B, T)_ij^2]

Two ways to it, neither of which stores a D x D matrix:

``gram`` (N <= D): ``||P^T Q||^2 = <P P^T, Q Q^T>``, so with ``K_X = X X^T`` (N x N) and the
factors ``M1 = off K_B + xd K_S``, ``M2 = off K_A + xd K_T``::

    off-diagonal sums = <K_P, K_Q> / N^2 - sum c^2
    dA = 2/N^2 M1 A + (B g - S 2 xd c2) / N,  g = -2 on (1 - c1) - 2 off c1;  dB likewise

12 N^2 D FLOP, 2 N^2 numbers kept for the backward pass besides the embeddings.

``tiles`` (N > D): C is formed ``PANEL`` rows at a time. Each panel gives its part of the value and,
at once, its part of the gradient, so that no panel is kept or made again: 14 N D^2
FLOP.

Over several ranks every rank has the standardised embeddings of the whole batch and forms its own
rows of the Gram matrices and of the gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

PANEL = 512
"""Rows of C at a time: 512 x 4096 in fp32 is 8 MB, and larger ones are no faster on a CPU."""


class Terms(NamedTuple):
    """The weights of the three terms and how embeddings are standardised."""

    on: float
    off: float
    xd: float
    unbiased: bool
    eps: float

    @classmethod
    def of(cls, fields: Sequence[float]) -> Terms:
        on, off, xd, unbiased, eps = fields
        return cls(on, off, xd, bool(unbiased), eps)


class Rows(NamedTuple):
    """Which rows of the batch are this rank's, and how to sum a tensor over all ranks in place."""

    first: int
    count: int
    sum_over_ranks: Callable[[Tensor], object] | None = None

    def of(self, x: Tensor) -> Tensor:
        return x[..., self.first : self.first + self.count, :]


def standardize(
    z: Tensor, *, unbiased: bool, eps: float, out: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Each feature of ``z`` (N, D) with mean 0 and standard deviation 1, and 1 / deviation (D,).

    ``(z - mean) / sqrt(var + eps)``. Deviations are taken from a first mean, whose rounding error
    is then corrected, so an offset of the embeddings costs no digits. ``unbiased``: the variance
    over N - 1. Differentiable without ``out``.
    """
    n = len(z)
    deviation = z - z.mean(0)
    rest = deviation.mean(0)
    variance = deviation.square().sum(0).addcmul_(rest, rest, value=-n) / (n - unbiased)
    rstd = variance.clamp_(min=0).add_(eps).rsqrt_()
    return torch.addcmul(-rest * rstd, deviation, rstd, out=out), rstd


def gram_forward(
    batch: Sequence[Tensor], rows: Rows, terms: Terms, *, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The value by Gram matrices.

    Args:
        batch: z1, z2 and, unless ``terms.xd`` is 0, their targets: (N, D) each.
        keep: whether ``gram_backward`` follows.

    Returns:
        The loss (), its on-diagonal, off-diagonal and XD terms (3,), and what the backward pass
        needs: embeddings x (2 or 4, N, D), rstd (2, D), diagonals (1 or 3, D), factors (2, n, N).
    """
    x, rstd, diagonals = _standardize_all(batch, terms)
    n = x.shape[1]
    grams = [_gram(p, rows) for p in x]  # each (n, N)
    factors = torch.stack([terms.off * grams[1], terms.off * grams[0]])
    sums = torch.zeros(2, dtype=x.dtype, device=x.device)
    sums[0] = terms.off * torch.dot(grams[0].view(-1), grams[1].view(-1))
    if len(x) == 4:
        for i in range(2):
            factors[i].add_(grams[2 + i], alpha=terms.xd)
            sums[1] += terms.xd * torch.dot(grams[i].view(-1), grams[2 + i].view(-1))
    if rows.sum_over_ranks is not None:
        rows.sum_over_ranks(sums)
    sums = sums / n**2
    squares = diagonals.square().sum(1)
    sums[0] -= terms.off * squares[0]
    sums[1] -= terms.xd * squares[1:].sum()
    parts = torch.cat([_on_diagonal(diagonals, terms), sums])
    return parts.sum(), parts, [x, rstd, diagonals, factors] if keep else []


def gram_backward(grad: Tensor, saved: Sequence[Tensor], rows: Rows, terms: Terms) -> Tensor:
    """Gradients (2, n, D) of this rank's rows of z1 and z2, from the gradient () of the loss."""
    x, rstd, diagonals, factors = saved
    n = x.shape[1]
    on = (-2 / n) * (terms.on * (1 - diagonals[0]) + terms.off * diagonals[0])
    dx = x.new_empty(2, rows.count, x.shape[2])
    for i in range(2):
        torch.mm(factors[i], x[i], out=dx[i])
        dx[i].mul_(2 / n**2).addcmul_(rows.of(x[1 - i]), on)
        if len(x) == 4:
            dx[i].addcmul_(rows.of(x[2 + i]), diagonals[1 + i], value=-2 * terms.xd / n)
    return _through_standardization(dx, x, rstd * grad, rows, terms)


def tiles(
    batch: Sequence[Tensor], rows: Rows, terms: Terms, *, keep: bool
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The value by panels of C, and if ``keep`` the gradients (2, n, D) of z1 and z2 with it.

    Arguments and terms as in ``gram_forward``.
    """
    x, rstd, diagonals = _standardize_all(batch, terms)
    n, d = x.shape[1:]
    sums = torch.zeros(2, dtype=x.dtype, device=x.device)
    own = rows.of(x)
    dx = own[:2].flip(0) * ((-2 * terms.on / n) * (1 - diagonals[0]))
    pairs = [(0, 1, terms.off), (0, 2, terms.xd), (1, 3, terms.xd)]
    for start in range(0, d, PANEL):
        panel = slice(start, min(start + PANEL, d))
        for p, q, weight in pairs if len(x) == 4 else pairs[:1]:
            c = (x[p, :, panel].T @ x[q]).div_(n)  # (P, D)
            c.diagonal(start).zero_()
            flat = c.view(-1)
            sums[int(q > 1)] += weight * torch.dot(flat, flat)
            if not keep:
                continue
            c.mul_(2 * weight / n)
            dx[p, :, panel].addmm_(own[q], c.T)
            if q == 1:
                dx[1].addmm_(own[0, :, panel], c)
    parts = torch.cat([_on_diagonal(diagonals, terms), sums])
    if not keep:
        return parts.sum(), parts, []
    return parts.sum(), parts, [_through_standardization(dx, x, rstd, rows, terms)]


def _standardize_all(batch: Sequence[Tensor], terms: Terms) -> tuple[Tensor, Tensor, Tensor]:
    """Standardised embeddings (2 or 4, N, D), rstd (2, D) and the diagonals (1 or 3, D)."""
    dtype = torch.float64 if batch[0].dtype == torch.float64 else torch.float32
    x = torch.empty(len(batch), *batch[0].shape, dtype=dtype, device=batch[0].device)
    rstd = []
    for i, z in enumerate(batch):
        z = z.to(dtype)
        rstd.append(standardize(z, unbiased=terms.unbiased, eps=terms.eps, out=x[i])[1])
    pairs = [(0, 1), (0, 2), (1, 3)] if len(batch) == 4 else [(0, 1)]
    diagonals = torch.stack([(x[p] * x[q]).mean(0) for p, q in pairs])
    return x, torch.stack(rstd[:2]), diagonals


def _gram(x: Tensor, rows: Rows) -> Tensor:
    """This rank's rows of X X^T: (N, D) -> (n, N)."""
    n = len(x)
    if rows.count < n or n < 64:
        return rows.of(x) @ x.T
    # The blocks on and below the diagonal, mirrored: 5/8 of the work, 3/4 of the time on a CPU.
    k = x.new_zeros(n, n)
    for start in range(0, n, -(-n // 4)):
        stop = min(start + -(-n // 4), n)
        torch.mm(x[start:stop], x[:stop].T, out=k[start:stop, :stop])
    return k.tril_().add_(k.tril(-1).T)


def _on_diagonal(diagonals: Tensor, terms: Terms) -> Tensor:
    return terms.on * (1 - diagonals[:1]).square().sum(1)


def _through_standardization(
    dx: Tensor, x: Tensor, factor: Tensor, rows: Rows, terms: Terms
) -> Tensor:
    """``factor * (dx - mean(dx) - x sum(dx x) / m)`` for both embeddings, in place: (2, n, D).

    The means and sums run over the rows of all ranks; m is N, or N - 1 if ``unbiased``.
    """
    n, own = x.shape[1], rows.of(x)
    sums = torch.stack([s for i in range(2) for s in (dx[i].sum(0), (dx[i] * own[i]).sum(0))])
    if rows.sum_over_ranks is not None:
        rows.sum_over_ranks(sums)
    for i in range(2):
        dx[i].sub_(sums[2 * i] / n).addcmul_(own[i], sums[2 * i + 1] / (terms.unbiased - n))
        dx[i].mul_(factor[i])
    return dx
