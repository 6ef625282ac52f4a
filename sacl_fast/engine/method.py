"""SACL-XD's model: one encoder and projector, run four times (Meng et al., NeurIPS 2023, Sec. 3).

=====  =======  ====  ========
name   encoder  view  gradient
=====  =======  ====  ========
z1     dense    a     yes
z2     slim     b     yes
z1_t   dense    b     no
z2_t   slim     a     no
=====  =======  ====  ========

The passes share the weights and are separate forwards, so that batch statistics are those of one
view and one width, and running statistics are updated in this order. The passes with gradient
come first: autocast caches its half-precision weights, and a cache filled without gradient would
cut the later ones off.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from sacl_fast.config import Config
from sacl_fast.encoders import Projector, build_encoder, output_dim
from sacl_fast.encoders.batch_norm import synchronize_batch_norm
from sacl_fast.ops.collectives import world_size
from sacl_fast.slim import Slicer


class Embeddings(NamedTuple):
    """The embeddings (N, D) of the four passes; the last two only where they are distilled."""

    z1: Tensor
    z2: Tensor
    z1_t: Tensor | None
    z2_t: Tensor | None


class SaclXd(nn.Module):
    """Encoder, projector and slicer; ``forward`` is the four passes."""

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, slicer: Slicer, *, distill: bool = True
    ) -> None:
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.slicer = slicer
        self.distill = distill

    def embed(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, D)
        return self.projector(self.encoder(x))

    def forward(self, x_a: Tensor, x_b: Tensor) -> Embeddings:
        dense, slim = "dense", "mask"
        with self.slicer.mode(dense):
            z1 = self.embed(x_a)
        with self.slicer.mode(slim):
            z2 = self.embed(x_b)
        if not self.distill:
            return Embeddings(z1, z2, None, None)
        with torch.no_grad():
            with self.slicer.mode(dense):
                z1_t = self.embed(x_b)
            with self.slicer.mode(slim):
                z2_t = self.embed(x_a)
        return Embeddings(z1, z2, z1_t, z2_t)


def build_method(config: Config) -> SaclXd:
    """The configured model, untrained, on the CPU, in training mode."""
    encoder = build_encoder(
        config.encoder.name,
        width=config.encoder.width,
        stem=config.encoder.stem,
        image_size=config.views.size,
        drop_path=config.encoder.drop_path,
    )
    projector: nn.Module = Projector(
        output_dim(encoder, config.views.size),
        hidden=config.projector.hidden,
        out=config.projector.out,
        layers=config.projector.layers,
    )
    if config.encoder.sync_batch_norm and world_size() > 1:
        encoder, projector = map(synchronize_batch_norm, (encoder, projector))
    slicer = Slicer(
        encoder,
        config.slim.ratio,
        exclude=config.slim.exclude,
        batch_norm=config.slim.batch_norm,
    )
    distill = config.loss.distillation != "none"
    return SaclXd(encoder, projector, slicer, distill=distill).train()
