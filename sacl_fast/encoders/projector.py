"""The projector h between the encoder's features and the embeddings the loss compares."""

from __future__ import annotations

from itertools import pairwise

from torch import nn


class Projector(nn.Sequential):
    """(Linear, batch norm, ReLU) x (layers - 1), Linear: (N, in_dim) -> (N, out)."""

    def __init__(self, in_dim: int, *, hidden: int = 2048, out: int = 2048, layers: int = 3):
        dims = [in_dim, *[hidden] * (layers - 1)]
        stages: list[nn.Module] = []
        for d_in, d_out in pairwise(dims):
            stages += [nn.Linear(d_in, d_out), nn.BatchNorm1d(d_out), nn.ReLU(inplace=True)]
        super().__init__(*stages, nn.Linear(dims[-1], out))
