"""The losses as modules, thin over ``sacl_fast.ops.xcorr_loss``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sacl_fast.checks import NotNegative, check, checked
from sacl_fast.config import Backend, LossConfig
from sacl_fast.ops.collectives import RowGather
from sacl_fast.ops.xcorr_loss import LossParts, sacl_xd_loss


class SaclXdLoss(nn.Module):
    """SACL-XD's objective (Meng et al., NeurIPS 2023) with the settings of a ``LossConfig``.

    >>> import torch
    >>> z1, z2, z1_t, z2_t = torch.randn(4, 8, 16, requires_grad=True)  # (N, D) each
    >>> loss, parts = SaclXdLoss(alpha=0.9)(z1, z2, z1_t, z2_t)
    >>> loss.backward()
    """

    @checked
    def __init__(
        self, config: LossConfig | None = None, *, backend: str = "auto", **settings: Any
    ) -> None:
        """Takes a ``LossConfig``, its fields as keywords, or both: the keywords are later."""
        super().__init__()
        check(backend, Backend, "SaclXdLoss: backend")
        self.config = replace(config or LossConfig(), **settings)
        self.backend = backend
        self._settings = dict(vars(self.config))  # torch.compile cannot see through a dataclass

    def forward(
        self,
        z1: Tensor,
        z2: Tensor,
        z1_t: Tensor | None = None,
        z2_t: Tensor | None = None,
        gathers: Sequence[RowGather | None] = (),
    ) -> tuple[Tensor, LossParts]:
        """Four embeddings (N, D) to the loss () and its parts; see ``sacl_xd_loss``."""
        return sacl_xd_loss(
            z1, z2, z1_t, z2_t, gathers=gathers, backend=self.backend, **self._settings
        )

    def extra_repr(self) -> str:
        return ", ".join(f"{key}={value!r}" for key, value in vars(self.config).items())


class BarlowTwinsLoss(nn.Module):
    """Barlow Twins (Zbontar et al., ICML 2021): SACL-XD's contrastive term on two embeddings.

    Used as ``lightly.loss.BarlowTwinsLoss``: takes two embeddings (N, D), returns the loss ().
    ``gather_distributed``: the correlation is over the batch of all processes, with exact
    gradients; else over each process's own.
    """

    @checked
    def __init__(self, lambda_param: NotNegative = 5e-3, gather_distributed: bool = False) -> None:
        super().__init__()
        self.lambda_param = lambda_param
        self.gather_distributed = gather_distributed

    def forward(self, z_a: Tensor, z_b: Tensor) -> Tensor:
        loss, _ = sacl_xd_loss(
            z_a,
            z_b,
            lambda_=self.lambda_param,
            distillation="none",
            statistics="global" if self.gather_distributed else "local",
        )
        return loss
