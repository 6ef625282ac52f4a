"""How much an encoder's features tell, without labels: two effective ranks.

Both are the exponential of an entropy, a number of directions from 1 (collapsed) to the smaller
side of the matrix: exp(-sum_k p_k log p_k) for p = s / sum(s).

RankMe (Garrido et al., ICML 2023) takes the singular values s of the features (N, F) of N images.
LiDAR (Thilak et al., ICLR 2024) takes the eigenvalues of the matrix of linear discriminant
analysis, S_w^(-1/2) S_b S_w^(-1/2), where the classes are images and their members q random views
of each, so that directions in which views of one image differ count for little.

Unlike there, no epsilon is added to p (0 log 0 is 0), and what makes S_w invertible is relative to
it: 1e-4 of its mean variance, so that LiDAR does not depend on the features' scale. With few
images both are low whatever the encoder: at most N, and n - 1.

Both are measured on the encoder's features here, since those are what is used afterwards; Garrido
et al. measure embeddings, after the projector. What is known of how they order epochs is in
docs/training.md.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_RIDGE = 1e-4


def rankme(features: Tensor) -> float:
    """The effective rank of features (N, F), in float64; NaN where they are not finite, 0 where
    there are none or all are 0."""
    features = features.detach().cpu().double()  # not all devices have float64
    if not features.isfinite().all():
        return math.nan
    return _effective_rank(torch.linalg.svdvals(features)) if features.numel() else 0.0


def lidar(features: Tensor) -> float:
    """The effective rank of the matrix of linear discriminant analysis of features (n, q, F) of q
    views of n images, in float64; NaN where they are not finite, 0 where images do not differ."""
    n, q, dims = features.shape
    if n < 2 or q < 2:
        raise ValueError(f"LiDAR needs 2 images and 2 views of each, not {n} and {q}")
    features = features.detach().cpu().double()
    if not features.isfinite().all():
        return math.nan
    means = features.mean(1)  # (n, F)
    between = (means - means.mean(0)) / math.sqrt(n - 1)  # its square is S_b
    within = (features - means[:, None]).flatten(0, 1) / math.sqrt(n * (q - 1))
    scatter = within.T @ within
    variance = float(scatter.trace()) / dims
    # Of rounding alone, as where all views of an image are one.
    if variance > 1e-24 * float(features.square().mean()):
        scatter.diagonal().add_(_RIDGE * variance)
        factor = torch.linalg.cholesky(scatter)
        between = torch.linalg.solve_triangular(factor, between.T, upper=False)
    return _effective_rank(torch.linalg.svdvals(between).square())


def _effective_rank(values: Tensor) -> float:
    """Of singular values or eigenvalues (K,), none below 0."""
    total = values.sum()
    if not total > 0:
        return 0.0
    p = values / total
    return float(torch.special.entr(p).sum().exp())
