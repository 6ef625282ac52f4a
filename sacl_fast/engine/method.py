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
from sacl_fast.encoders.batch_norm import local_batch_norm, synchronize_batch_norm
from sacl_fast.encoders.pretrained import load_pretrained
from sacl_fast.engine.regions import region
from sacl_fast.ops.collectives import RowGather, world_size
from sacl_fast.passes import Passes, share_gradients
from sacl_fast.slim import Slicer
from sacl_fast.slim.checkpointing import blocks_of
from sacl_fast.slim.constant_channels import constant_norms_in_a_row

_AT_MOST_IN_A_ROW = 1.5
"""Batch norms of constant channels through which gradients are left to pass as they are. Through
one, the norms' largest gradient is 1 to 100 times the dense encoder's, through several 1 to 1e30
times (``benchmarks/results/constant_channels.json``)."""


class Embeddings(NamedTuple):
    """The embeddings (N, D) of the four passes; the targets only where they are distilled."""

    z1: Tensor
    z2: Tensor
    z1_t: Tensor | None = None
    z2_t: Tensor | None = None
    gathers: tuple[RowGather, ...] = ()
    """With several ranks: each embedding on its way to the others, since the pass that made it."""


class SaclXd(nn.Module):
    """Encoder, projector and slicer; ``forward`` is the four passes."""

    def __init__(
        self,
        encoder: nn.Module,
        projector: nn.Module,
        slicer: Slicer,
        *,
        passes: Passes,
        distill: bool = True,
        gather: bool = False,
    ) -> None:
        """
        Args:
            passes: how the encoder's passes run.
            distill: run the passes without gradient, too.
            gather: send every embedding to all ranks while the next pass runs.
        """
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.slicer = slicer
        self.run_by(passes)
        self.distill = distill
        self.gather = gather

    def run_by(self, passes: Passes) -> None:
        """From now on, run the encoder's passes that way."""
        self.passes = passes
        self.dense_encoder = passes.dense_encoder(self.slicer)
        self.slim_encoder = passes.slim_encoder(self.slicer)
        self.sharing = share_gradients(self.dense_encoder, self.slim_encoder)

    def dense(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, D)
        return self.projector(self.dense_encoder(x))

    def slim(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, D)
        encoder = self.slim_encoder if self.slicer.active else self.dense_encoder
        return self.projector(encoder(x))

    def forward(self, x_a: Tensor, x_b: Tensor) -> Embeddings:
        gathers: list[RowGather] = []

        def sent(z: Tensor) -> Tensor:
            if self.gather:
                gathers.append(RowGather(z))
            return z

        with region("z1 dense a"):
            z1 = sent(self.dense(x_a))
        with region("z2 slim b"):
            z2 = sent(self.slim(x_b))
        self.sharing.forget()
        if not self.distill:
            return Embeddings(z1, z2, gathers=tuple(gathers))
        with torch.no_grad():
            with region("z1_t dense b"):
                z1_t = sent(self.dense(x_b))
            with region("z2_t slim a"):
                z2_t = sent(self.slim(x_a))
        return Embeddings(z1, z2, z1_t, z2_t, tuple(gathers))


class Networks(NamedTuple):
    """What a model is made of."""

    encoder: nn.Module
    projector: nn.Module
    slicer: Slicer


def build_method(config: Config, passes: Passes, networks: Networks | None = None) -> SaclXd:
    """The configured model, untrained, on the CPU, in training mode.

    Args:
        passes: how the encoder's passes run.
        networks: what ``build_networks`` gave for this configuration; None: called here.
    """
    return SaclXd(
        *(networks or build_networks(config)),
        passes=passes,
        distill=config.loss.distillation != "none",
        gather=config.loss.statistics == "global" and world_size() > 1,
    ).train()


def build_networks(config: Config, *, pretrained: bool = False) -> Networks:
    """The configured encoder, projector and slicer, untrained, on the CPU; or, if ``pretrained``,
    with the weights of ``encoder.pretrained`` where it names some."""
    encoder = build_encoder(
        config.encoder.name,
        width=config.encoder.width,
        stem=config.encoder.stem,
        image_size=config.views.size,
        drop_path=config.encoder.drop_path,
    )
    if pretrained and config.encoder.pretrained is not None:
        load_pretrained(encoder, config.encoder.name, config.encoder.pretrained)
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
    if config.engine.activation_checkpointing:
        blocks_of(encoder)  # refuses what has none
        slicer.checkpointing = True
    if config.slim.norm_gradient != "auto":
        slicer.norm_gradient = config.slim.norm_gradient
    else:
        with local_batch_norm(nn.ModuleList((encoder, slicer))):
            if constant_norms_in_a_row(slicer, config.views.size) > _AT_MOST_IN_A_ROW:
                slicer.norm_gradient = "damped"
    return Networks(encoder, projector, slicer)
