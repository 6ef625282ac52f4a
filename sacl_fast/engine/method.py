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

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from sacl_fast.config import Config
from sacl_fast.encoders import Projector, build_encoder, output_dim
from sacl_fast.encoders.batch_norm import local_batch_norm, synchronize_batch_norm
from sacl_fast.ops.collectives import RowGather, world_size
from sacl_fast.passes import RecordedEncoder
from sacl_fast.slim import Slicer
from sacl_fast.slim.constant_channels import constant_norms_in_a_row
from sacl_fast.slim.slicer import Mode

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
        distill: bool = True,
        gather: bool = False,
        slim_mode: Literal["mask", "skip"] = "mask",
    ) -> None:
        """``gather``: send every embedding to all ranks while the next pass runs. ``slim_mode``:
        how the slim passes run, see ``SlimConfig.mode``."""
        super().__init__()
        self.encoder = encoder
        self.projector = projector
        self.slicer = slicer
        self.distill = distill
        self.gather = gather
        self.slim_mode: Mode = slim_mode
        self.recorded: RecordedEncoder | None = None
        """Runs the slim encoder in mode ``skip``, where that pays."""

    def embed(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, D)
        return self.projector(self.encoder(x))

    def forward(self, x_a: Tensor, x_b: Tensor) -> Embeddings:
        gathers: list[RowGather] = []

        def run(width: Mode, x: Tensor) -> Tensor:
            if width == "skip" and self.recorded is not None:
                z = self.projector(self.recorded(x))
            else:
                with self.slicer.mode(width):
                    z = self.embed(x)
            if self.gather:
                gathers.append(RowGather(z))
            return z

        z1 = run("dense", x_a)
        z2 = run(self.slim_mode, x_b)
        if not self.distill:
            return Embeddings(z1, z2, gathers=tuple(gathers))
        with torch.no_grad():
            z1_t = run("dense", x_b)
            z2_t = run(self.slim_mode, x_a)
        return Embeddings(z1, z2, z1_t, z2_t, tuple(gathers))


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
    if config.slim.norm_gradient != "auto":
        slicer.norm_gradient = config.slim.norm_gradient
    else:
        with local_batch_norm(nn.ModuleList((encoder, slicer))):
            if constant_norms_in_a_row(slicer, config.views.size) > _AT_MOST_IN_A_ROW:
                slicer.norm_gradient = "damped"
    return SaclXd(
        encoder,
        projector,
        slicer,
        distill=config.loss.distillation != "none",
        gather=config.loss.statistics == "global" and world_size() > 1,
        slim_mode="mask" if config.slim.mode == "auto" else config.slim.mode,
    ).train()
