"""Is the encoder collapsing? Two numbers of a batch of embeddings, and an alarm on them.

A joint-embedding loss can be driven down by embeddings that say nothing about the image. All the
same (complete collapse): their spread is 0. On a few directions (dimensional collapse): their
effective rank is small.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


@torch.no_grad()
def embedding_std(z: Tensor) -> Tensor:
    """Mean over dimensions of ``sqrt(D) * std`` of the length-normalised embeddings.

    1: spread evenly over the sphere; 0: all the same (Chen & He, "Exploring Simple Siamese
    Representation Learning", CVPR 2021, section 4.1). Biased std, so one embedding gives 0.

    Args:
        z: embeddings (N, D).

    Returns:
        float32 scalar on z's device.
    """
    unit = F.normalize(z.float(), dim=1)
    return unit.std(dim=0, correction=0).mean() * z.shape[1] ** 0.5


@torch.no_grad()
def effective_rank(z: Tensor) -> Tensor:
    """Entropy of the centred embeddings' singular values s, as a number of directions.

    ``exp(-sum_i p_i log p_i)`` with ``p = s / sum(s)``:

    from 1 (one direction) to min(N - 1, D) (all alike), 0 where all embeddings are the same (Roy &
    Vetterli, EUSIPCO 2007; Garrido et al., "RankMe", ICML 2023).

    Singular values are roots of the eigenvalues of the smaller Gram matrix, in float64: squaring
    in float32 would leave noise of 3e-4 of the largest in each, which 250 of them add up to a
    visible rank. Those that rounding in z's own type explains count as 0. On a GPU the eigenvalue
    solver itself waits for the device, so this belongs where metrics are read, not in every step.

    Args:
        z: embeddings (N, D).

    Returns:
        float32 scalar on z's device; NaN if z holds a value that is not finite.
    """
    rounding = torch.finfo(z.dtype).eps / max(1, min(z.shape)) ** 0.5
    z = z.double()
    centred = z - z.mean(dim=0)
    gram = centred @ centred.T if z.shape[0] <= z.shape[1] else centred.T @ centred
    finite = gram.isfinite().all()
    # The solver raises on values that are not finite; asking first would wait for the device.
    eigenvalues = torch.linalg.eigvalsh(torch.where(finite, gram, 0.0))
    s = eigenvalues.clamp(min=0).sqrt()
    s = torch.where(s > rounding * torch.linalg.vector_norm(z), s, 0.0)
    total = s.sum()
    p = s / total.clamp(min=torch.finfo(s.dtype).tiny)
    rank = torch.special.entr(p).sum().exp() * (total > 0)
    return torch.where(finite, rank, torch.nan).float()


class CollapseAlarm:
    """Says so once when embeddings collapse, and again only if they had recovered.

    Args:
        min_std: alarm where ``embedding_std`` is below (0: never).
        min_rank: alarm where ``effective_rank`` is below (0: never).
    """

    def __init__(self, min_std: float, min_rank: float) -> None:
        self.min_std = min_std
        self.min_rank = min_rank
        self._low_readings = 0

    def check(self, std: float, rank: float, step: int) -> str | None:
        """The alarm's sentence at the second reading in a row below a threshold, else None."""
        signs = []
        if std < self.min_std:
            signs.append(f"their spread is {std:.2g} (alarm below {self.min_std:g}, healthy: 1)")
        if rank < self.min_rank:
            signs.append(f"their effective rank is {rank:.3g} (alarm below {self.min_rank:g})")
        self._low_readings = self._low_readings + 1 if signs else 0
        if self._low_readings != 2:
            return None
        return (
            f"The embeddings are collapsing at step {step}: {' and '.join(signs)}; "
            "a lower learning rate, a longer warm-up or a larger batch may help."
        )
