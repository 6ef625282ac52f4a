"""A training step as the supplement's pseudocode has it, in eager PyTorch: the baseline.

Written as a careful user would: autocast, channels-last images and weights, masks multiplied into
the weights of the slim passes, three D x D correlations, and LARS as published frameworks write it,
a loop over parameters with two norms read back for each (or PyTorch's AdamW, where a run has that).
It shares the encoder and the projector with our step, and nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from sacl_fast.config import Config
from sacl_fast.optim import learning_rate
from sacl_fast.slim.slicer import strongest_filters


def pseudocode_loss(
    z1: Tensor,
    z2: Tensor,
    z1_t: Tensor | None = None,
    z2_t: Tensor | None = None,
    *,
    alpha: float = 0.95,
    lambda_: float = 0.005,
) -> Tensor:
    """The supplement's listing, with the squared off-diagonal, on embeddings (N, D); without
    ``z1_t`` and ``z2_t`` the contrastive term alone."""

    def correlation(p: Tensor, q: Tensor) -> Tensor:
        p, q = ((z - z.mean(0)) / z.std(0) for z in (p, q))
        return p.T @ q / len(p)

    def off_diagonal(c: Tensor) -> Tensor:
        d = len(c)
        return c.flatten()[:-1].view(d - 1, d + 1)[:, 1:].flatten()

    c = correlation(z1, z2)
    on = torch.diagonal(c).add(-1).pow(2).sum()
    contrastive = on + lambda_ * off_diagonal(c).pow(2).sum()
    if z1_t is None or z2_t is None:
        return contrastive
    leaks = [off_diagonal(correlation(*pair)).pow(2).sum() for pair in ((z1, z1_t), (z2, z2_t))]
    return alpha * contrastive + (1 - alpha) * lambda_ / 2 * (leaks[0] + leaks[1])


class PseudocodeStep:
    """Encoder, projector, loss and LARS; called with two views it makes one step."""

    def __init__(
        self, encoder: nn.Module, projector: nn.Module, names: list[str], config: Config,
        amp_dtype: torch.dtype | None, *, compiled: bool = False,
    ) -> None:  # fmt: skip
        """``names``: of the convolutions that are slimmed. ``compiled``: the embedding of a view
        and the loss go through torch.compile."""
        self.config, self.amp_dtype = config, amp_dtype
        self.encoder, self.projector = encoder, projector
        self.masks = {
            f"{name}.weight": strongest_filters(module.weight, config.slim.ratio)[
                :, None, None, None
            ]
            for name in names
            if isinstance(module := encoder.get_submodule(name), nn.Conv2d)
        }
        self.parameters = [*encoder.parameters(), *projector.parameters()]
        self.momentum: dict[Tensor, Tensor] = {}
        optim = config.optim
        self.adamw = None
        if optim.name == "adamw":
            self.adamw = torch.optim.AdamW(
                self.parameters, betas=optim.betas, weight_decay=optim.weight_decay
            )
        self.embed, self.loss = self._embed, self._loss
        if compiled:
            self.embed, self.loss = torch.compile(self._embed), torch.compile(self._loss)

    def __call__(self, view_a: Tensor, view_b: Tensor, step: int) -> Tensor:
        distilled = self.config.loss.distillation != "none"
        device = view_a.device.type
        with torch.autocast(
            device, self.amp_dtype or torch.bfloat16, enabled=self.amp_dtype is not None
        ):
            z1 = self.embed(view_a, False)
            z2 = self.embed(view_b, True)
            with torch.no_grad():
                z1_t = self.embed(view_b, False) if distilled else z1
                z2_t = self.embed(view_a, True) if distilled else z2
            loss = self.loss(z1, z2, z1_t, z2_t)
        for p in self.parameters:
            p.grad = None
        loss.backward()
        self.update(step)
        return loss.detach()

    def _embed(self, x: Tensor, slim: bool) -> Tensor:
        if not slim:
            return self.projector(self.encoder(x))
        weights = {name: self.encoder.get_parameter(name) * m for name, m in self.masks.items()}
        return self.projector(functional_call(self.encoder, weights, (x,)))

    def _loss(self, z1: Tensor, z2: Tensor, z1_t: Tensor, z2_t: Tensor) -> Tensor:
        loss = self.config.loss
        given = (z1, z2) if loss.distillation == "none" else (z1, z2, z1_t, z2_t)
        return loss.scale * pseudocode_loss(*given, alpha=loss.alpha, lambda_=loss.lambda_)

    @torch.no_grad()
    def update(self, step: int) -> None:
        optim = self.config.optim
        lr = learning_rate(step, base=self.config.base_lr, warmup_steps=10, total_steps=100)
        if self.adamw:
            self.adamw.param_groups[0]["lr"] = lr
            self.adamw.step()
            return
        for p in self.parameters:
            if p.grad is None:
                continue
            update = p.grad
            if p.ndim > 1:
                p_norm, g_norm = torch.norm(p), torch.norm(p.grad)
                if p_norm != 0 and g_norm != 0:  # each reads a number from the device
                    trust = optim.eta * p_norm / (g_norm + optim.weight_decay * p_norm + 1e-8)
                    if optim.clip:
                        trust = min(trust / lr, 1) if lr else 1.0
                    update = update.add(p, alpha=optim.weight_decay) * trust
            buffer = self.momentum.setdefault(p, torch.zeros_like(p))
            buffer.mul_(optim.momentum).add_(update)
            p.add_(buffer, alpha=-lr)


def pseudocode_step(
    method: Any, config: Config, amp_dtype: torch.dtype | None, *, compiled: bool = False
) -> PseudocodeStep:
    """The baseline with the encoder, the projector and the choice of convolutions of ``method``."""
    names = list(method.slicer.masks)
    return PseudocodeStep(
        method.encoder, method.projector, names, config, amp_dtype, compiled=compiled
    )
