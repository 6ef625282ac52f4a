"""The projector h between the encoder's features and the embeddings the loss compares."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from sacl_fast.checks import Count, checked


class Projector(nn.Sequential):
    """(Linear, batch norm, ReLU) x (layers - 1), Linear: (N, in_dim) -> (N, out)."""

    @checked
    def __init__(
        self, in_dim: Count, *, hidden: Count = 2048, out: Count = 2048, layers: Count = 3
    ) -> None:
        dims = [in_dim, *[hidden] * (layers - 1)]
        stages: list[nn.Module] = []
        for d_in, d_out in pairwise(dims):
            stages += [nn.Linear(d_in, d_out), nn.BatchNorm1d(d_out), nn.ReLU(inplace=True)]
        super().__init__(*stages, nn.Linear(dims[-1], out))
