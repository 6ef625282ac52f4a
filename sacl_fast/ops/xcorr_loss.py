r"""The objective of SACL-XD: three cross-correlation losses on four embeddings.

With ``norm`` standardising each feature over the batch and :math:`C(p, q) = norm(p)^T norm(q) / N`
(the supplement of Meng et al., NeurIPS 2023)::

    L_CL = sum_i (1 - C_ii)^2 + lambda * sum_{i != j} C_ij^2                  on C(z1, z2)
    L_XD = lambda/2 * [sum_{i != j} C(z1, z1_t)_ij^2 + sum_{i != j} C(z2, z2_t)_ij^2]
    L    = alpha * L_CL + (1 - alpha) * L_XD

Gradients flow through ``z1`` and ``z2`` only. The published way forms three D x D matrices and
runs over a hundred operations on them; the operator here stores none. How: see
``xcorr_loss_reference`` (plain PyTorch, any device) and ``sacl_kernels.xcorr_loss`` (Triton). What
differs from the supplement, and why, is in docs/method.md.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import reduce
from typing import Any, Literal, NamedTuple, get_args, get_origin

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sacl_fast.checks import check, rules
from sacl_fast.config import LossConfig
from sacl_fast.config.choices import Distillation, OffDiagonal, Pairing, Statistics, Variance
from sacl_fast.errors import UserError
from sacl_fast.ops import xcorr_loss_reference
from sacl_fast.ops.backend import is_faster, triton_obstacle
from sacl_fast.ops.collectives import RowGather, gather_rows, sum_over_ranks, world_size
from sacl_fast.ops.xcorr_loss_reference import Rows, Terms

Algorithm = Literal["auto", "gram", "tiles"]


class LossParts(NamedTuple):
    """The terms of the loss, detached, each with its weight: they add up to the loss."""

    on_diagonal: Tensor  # ()
    off_diagonal: Tensor  # ()
    distillation: Tensor  # ()


# --- the custom operator -------------------------------------------------------------------------


@torch.library.custom_op("sacl_fast::xcorr_loss", mutates_args=())
def _xcorr_loss(
    z1: Tensor,
    z2: Tensor,
    batch: list[Tensor],
    ranks: list[int],
    terms: list[float],
    algorithm: str,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    """The loss (), its terms (3,) and what the backward pass needs (nothing unless ``keep``).

    Args:
        z1, z2: this rank's rows (n, D), which get the gradient: that of the global loss, times the
            number of ranks (see ``collectives``).
        batch: the rows of all ranks, z1, z2 and their targets: 2 or 4 times (N, D).
        ranks: this rank and their number.
        terms: the fields of ``Terms``.
        backend: ``torch`` or ``triton``.
    """
    implementation, rows = _implementation(backend), _rows(z1, ranks)
    forward = implementation.gram_forward if algorithm == "gram" else implementation.tiles
    with torch.autocast(z1.device.type, enabled=False):
        return forward(batch, rows, Terms.of(terms), keep=keep)


@_xcorr_loss.register_fake
def _(
    z1: Tensor,
    z2: Tensor,
    batch: list[Tensor],
    ranks: list[int],
    terms: list[float],
    algorithm: str,
    backend: str,
    keep: bool,
) -> tuple[Tensor, Tensor, list[Tensor]]:
    exact = torch.float64 if z1.dtype == torch.float64 else torch.float32
    (n, d), count, total = z1.shape, len(batch), batch[0].shape[0]
    kept: list[Tensor] = []
    if keep and algorithm == "tiles":
        kept = [z1.new_empty(2, n, d, dtype=exact)]  # the gradients
    elif keep:
        operand = z1.dtype if backend == "triton" else exact
        kept = [
            z1.new_empty(count, total, d, dtype=operand),  # x
            z1.new_empty(2, d, dtype=exact),  # rstd
            z1.new_empty(count - 1, d, dtype=exact),  # diagonals
            z1.new_empty(2, n, total, dtype=exact),  # factors
        ]
    return z1.new_empty((), dtype=exact), z1.new_empty(3, dtype=exact), kept


@torch.library.custom_op("sacl_fast::xcorr_loss_backward", mutates_args=())
def _xcorr_loss_backward(
    grad: Tensor,
    z1: Tensor,
    saved: list[Tensor],
    ranks: list[int],
    terms: list[float],
    backend: str,
) -> Tensor:
    """Gradients (2, n, D) of z1 and z2 from that of the loss (), after ``gram``."""
    backward = _implementation(backend).gram_backward
    with torch.autocast(z1.device.type, enabled=False):
        return backward(grad, saved, _rows(z1, ranks), Terms.of(terms)).to(z1.dtype)


@_xcorr_loss_backward.register_fake
def _(
    grad: Tensor,
    z1: Tensor,
    saved: list[Tensor],
    ranks: list[int],
    terms: list[float],
    backend: str,
) -> Tensor:
    return z1.new_empty(2, *z1.shape)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
    z1, _, batch, ctx.ranks, ctx.terms, ctx.algorithm, ctx.backend, _ = inputs
    ctx.batch_grads = [None] * len(batch)
    ctx.set_materialize_grads(False)  # else zeros the size of all that is kept
    ctx.save_for_backward(z1, *output[2])


def _autograd(ctx: Any, grad: Tensor, *_: Any) -> tuple[Any, ...]:
    z1, *saved = ctx.saved_tensors
    if ctx.ranks[1] > 1:
        grad = grad * ctx.ranks[1]
    if ctx.algorithm == "gram":
        dz = _xcorr_loss_backward(grad, z1, saved, ctx.ranks, ctx.terms, ctx.backend)
    else:  # they came with the value; kept in fp32, since half precision needs the loss scale
        dz = (grad * saved[0]).to(z1.dtype)
    return dz[0], dz[1], ctx.batch_grads, None, None, None, None, None


_xcorr_loss.register_autograd(_autograd, setup_context=_setup_context)


def _rows(z: Tensor, ranks: list[int]) -> Rows:
    rank, count = ranks
    return Rows(rank * len(z), len(z), dist.all_reduce if count > 1 else None)


def _implementation(backend: str) -> Any:
    if backend == "torch":
        return xcorr_loss_reference
    from sacl_kernels import xcorr_loss

    return xcorr_loss


# --- the public function -------------------------------------------------------------------------


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
    gathers: Sequence[RowGather | None] = (),
    algorithm: Algorithm = "auto",
    backend: str = "auto",
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
        variance: ``biased``: features are standardised as ``(z - mean) / sqrt(var + eps)``, as in
            batch norm. ``unbiased``: by ``z.std(0)`` without eps, as in the supplement's
            pseudocode; a constant feature then gives NaN.
        scale: factor on the whole loss.
        statistics: with W processes, ``global`` gathers the embeddings: every rank returns the
            loss of the batch of W * N, and ``DistributedDataParallel``'s average of the gradients
            is exactly that loss's gradient. ``local``: each rank's own loss.
        gathers: the ``RowGather`` of each embedding given, where it was begun while the encoder was
            still running; the others are gathered here.
        algorithm: ``gram`` forms N x N matrices, ``tiles`` panels of the D x D ones; ``auto``
            takes ``gram`` where the batch is at most D.
        backend: ``torch``, ``triton`` (CUDA, not for float64) or ``auto``.

    Returns:
        The loss () in fp32 (float64 for float64 embeddings) and :class:`LossParts`.

    Raises:
        UserError: embeddings that are not four (two for ``none``) matrices of one shape, a batch
            of 1, over which nothing can be standardised, an unknown algorithm, or a backend given
            by name that cannot run.
    """
    settings = {
        "alpha": alpha,
        "lambda_": lambda_,
        "distillation": distillation,
        "off_diagonal": off_diagonal,
        "pairing": pairing,
        "gamma": gamma,
        "variance": variance,
        "eps": eps,
        "scale": scale,
        "statistics": statistics,
        "algorithm": algorithm,
    }
    _check_settings(settings)
    given = [z1, z2] if distillation == "none" else [z1, z2, z1_t, z2_t]
    zs = _common_type([z for z in given if z is not None])
    if len(zs) < len(given):
        raise UserError(f"distillation {distillation!r} needs z1_t and z2_t; without them: 'none'")
    ranks = world_size() if statistics == "global" else 1
    _check(zs, ranks)
    backend = "triton" if is_faster("xcorr_loss", backend, _unfit, zs[0]) else "torch"
    batch = [z.detach() for z in zs]
    if ranks > 1:
        begun = [*gathers, *[None] * len(batch)]
        batch = [(g or RowGather(z)).wait().to(z.dtype) for z, g in zip(batch, begun, strict=False)]
    unbiased = variance == "unbiased"
    terms = Terms(scale, scale * lambda_, 0.0, unbiased, 0.0 if unbiased else eps)
    if distillation == "correlation":
        terms = terms._replace(on=alpha * scale, off=alpha * scale * lambda_)
    squared = distillation == "correlation" and off_diagonal == "squared"
    if squared:
        terms = terms._replace(xd=(1 - alpha) / 2 * scale * lambda_)
    if pairing == "cross_width":
        for embeddings in (batch, zs):
            embeddings[2:] = reversed(embeddings[2:])
    if algorithm == "auto":
        algorithm = "gram" if batch[0].shape[0] <= batch[0].shape[1] else "tiles"

    loss, parts, _ = _xcorr_loss(
        zs[0],
        zs[1],
        batch if squared else batch[:2],
        [dist.get_rank() if ranks > 1 else 0, ranks],
        list(terms),
        algorithm,
        backend,
        torch.is_grad_enabled() and (z1.requires_grad or z2.requires_grad),
    )
    on, off, xd = parts.detach()
    if len(zs) == 4 and not squared:  # the variants kept for study, by autograd
        with torch.autocast(z1.device.type, enabled=False):
            if distillation == "log":
                xd = scale * gamma / 2 * _cross_entropy(zs, ranks)
            else:
                assert (distillation, off_diagonal) == ("correlation", "literal")
                xd = (1 - alpha) / 2 * scale * lambda_ * _literal(zs, ranks, terms)
        loss, xd = loss + xd, xd.detach()
    return loss, LossParts(on, off, xd)


def _common_type(zs: list[Tensor]) -> list[Tensor]:
    dtype = reduce(torch.promote_types, [z.dtype for z in zs])
    return [z.to(dtype) for z in zs]


_RULES = rules(LossConfig) | {"algorithm": Algorithm}
_CHOICES = {name: get_args(kind) for name, kind in _RULES.items() if get_origin(kind) is Literal}


def _check_settings(settings: dict[str, Any]) -> None:
    if not torch.compiler.is_compiling():
        for name, value in settings.items():
            check(value, _RULES[name], f"sacl_xd_loss: {name}")
        return
    for name, choices in _CHOICES.items():  # what torch.compile can follow
        if settings[name] not in choices:
            raise UserError(f"sacl_xd_loss: {name} is {settings[name]!r}; one of {choices} works")


def _check(zs: list[Tensor], ranks: int) -> None:
    shapes = [tuple(z.shape) for z in zs]
    if len(set(shapes)) != 1 or len(shapes[0]) != 2 or shapes[0][1] < 1:
        given = ", ".join(map(str, shapes))
        raise UserError(f"embeddings of shapes {given}; matrices of one shape (N, D) work")
    if len(devices := {str(z.device) for z in zs}) > 1:
        raise UserError(f"embeddings on {', '.join(sorted(devices))}; those of one device work")
    if not zs[0].is_floating_point():
        raise UserError(f"embeddings of type {zs[0].dtype}; floating-point ones work")
    if shapes[0][0] * ranks < 2:
        size = f"a batch of {shapes[0][0] * ranks}"
        raise UserError(
            f"{size}: the loss standardises every feature over the batch; 2 or more work"
        )


def _unfit(z: Tensor) -> str | None:
    if z.dtype == torch.float64:
        return "it takes float32, bfloat16 and float16, not float64"
    return triton_obstacle(z.device)


# --- variants of the distillation, in the order of the sources ------------------------------------


def _cross_entropy(zs: list[Tensor], ranks: int) -> Tensor:
    """-softmax(target) log softmax(z), summed over features, averaged over the batch; of both."""
    z1, z2, t1, t2 = (_exact(z) for z in zs)
    terms = [F.cross_entropy(z, t.detach().softmax(1)) for z, t in ((z1, t1), (z2, t2))]
    total = terms[0] + terms[1]
    return sum_over_ranks(total) / ranks if ranks > 1 else total


def _literal(zs: list[Tensor], ranks: int, terms: Terms) -> Tensor:
    """Sum over the off-diagonals of both XD correlations, not squared, in O(N D)."""
    batch = [_exact(z if i < 2 else z.detach()) for i, z in enumerate(zs)]
    if ranks > 1:
        batch = [gather_rows(z) for z in batch]
    norm = [
        xcorr_loss_reference.standardize(z, unbiased=terms.unbiased, eps=terms.eps)[0]
        for z in batch
    ]
    pairs = ((norm[0], norm[2]), (norm[1], norm[3]))
    sums = [(p.sum(1) * q.sum(1)).mean() - (p * q).mean(0).sum() for p, q in pairs]
    return sums[0] + sums[1]


def _exact(z: Tensor) -> Tensor:
    return z if z.dtype == torch.float64 else z.float()
