"""LARS, layer-wise adaptive rate scaling (You et al., 2017), as Barlow Twins' recipes use it.

For each parameter p with gradient g::

    trust = eta * |p| / (|g| + weight_decay * |p| + 1e-8)      with clip: min(trust / lr, 1)
    buffer = momentum * buffer + trust * (g + weight_decay * p)
    p = p - lr * buffer

One-dimensional parameters (biases, norms) have trust 1 and no decay; so does a parameter whose
norm, or whose gradient's norm, is 0. All arithmetic stays on the device, in multi-tensor calls.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sacl_fast.checks import BelowOne, NotNegative, check, checked

# Of what a parameter group may have in place of the defaults.
_RULES: dict[str, Any] = {
    **dict.fromkeys(("lr", "weight_decay", "eta"), NotNegative),
    "momentum": BelowOne,
    **dict.fromkeys(("clip", "exclude_1d"), bool),
}


class Lars(Optimizer):
    """LARS with momentum.

    Args:
        params: parameters or parameter groups.
        lr: learning rate.
        momentum: of the update.
        weight_decay: added to the gradient before it is scaled.
        eta: trust coefficient.
        clip: bound the trust ratio so that no layer's rate exceeds ``lr``.
        exclude_1d: leave parameters of at most one dimension unscaled and undecayed.
    """

    @checked
    def __init__(
        self,
        params: Any,
        lr: NotNegative,
        momentum: BelowOne = 0.9,
        weight_decay: NotNegative = 0.0,
        eta: NotNegative = 0.001,
        clip: bool = False,
        exclude_1d: bool = True,
    ) -> None:
        defaults = dict(
            lr=lr,
            momentum=momentum,
            weight_decay=weight_decay,
            eta=eta,
            clip=clip,
            exclude_1d=exclude_1d,
        )
        super().__init__(params, defaults)
        for group in self.param_groups:
            for name in defaults:
                check(group[name], _RULES[name], f"Lars: {name} of a group")

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            updates = [p.grad for p in params]
            scaled = [i for i, p in enumerate(params) if p.ndim > 1 or not group["exclude_1d"]]
            if scaled:
                for i, update in zip(
                    scaled,
                    _scaled([params[i] for i in scaled], [updates[i] for i in scaled], group),
                    strict=True,
                ):
                    updates[i] = update
            buffers = [self._momentum_buffer(p) for p in params]
            torch._foreach_mul_(buffers, group["momentum"])
            torch._foreach_add_(buffers, updates)
            torch._foreach_sub_(params, torch._foreach_mul(buffers, group["lr"]))
        return loss

    def _momentum_buffer(self, p: Tensor) -> Tensor:
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        return state["momentum_buffer"]


def _scaled(params: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
    """trust * (g + weight_decay * p) for each parameter."""
    decay = group["weight_decay"]
    p_norms = torch.stack(torch._foreach_norm(params))  # (P,)
    g_norms = torch.stack(torch._foreach_norm(grads))  # (P,)
    trust = group["eta"] * p_norms / (g_norms + decay * p_norms + 1e-8)
    if group["clip"]:
        trust = (trust / group["lr"]).clamp(max=1.0)
    nonzero = (p_norms > 0) & (g_norms > 0)
    trust = torch.where(nonzero, trust, 1.0)
    decays = torch.where(nonzero, decay * trust, 0.0)
    updates = list(torch._foreach_mul(grads, list(trust.unbind())))
    if decay:
        torch._foreach_add_(updates, torch._foreach_mul(params, list(decays.unbind())))
    return updates
