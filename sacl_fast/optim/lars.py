"""LARS as an optimiser; ``ops/lars.py`` has the formula and the backends."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sacl_fast.checks import BelowOne, NotNegative, check, checked
from sacl_fast.config import Backend
from sacl_fast.errors import UserError
from sacl_fast.ops.lars import Item, Settings, Updater, is_dense, lies_like

# Of what a parameter group may have in place of the defaults.
_RULES: dict[str, Any] = {
    **dict.fromkeys(("weight_decay", "eta"), NotNegative),
    "lr": NotNegative | Tensor,
    "momentum": BelowOne,
    **dict.fromkeys(("clip", "exclude_1d"), bool),
}


class Lars(Optimizer):
    """LARS with momentum: layer-wise adaptive rates (You et al., 2017), as Barlow Twins' recipes
    use them.

    A step waits for nothing and can be captured in a CUDA graph, after a first one that was not. It
    works with ``torch.amp.GradScaler``: gradients are divided by its scale, and a step after an
    overflow changes nothing, which is decided on the device.

    Args:
        params: parameters or parameter groups.
        lr: learning rate; a number, or one on the parameters' device (), float32, which is read
            there in every step.
        momentum: of the update.
        weight_decay: added to the gradient before it is scaled.
        eta: trust coefficient.
        clip: bound the trust ratio so that no layer's rate exceeds ``lr``.
        exclude_1d: leave parameters of at most one dimension unscaled and undecayed.
        backend: ``triton``, ``apex`` (NVIDIA's), ``torch``, or ``auto`` for the first of them that
            runs on the parameters' device. Parameters that are not float32, or have gaps in memory,
            are always updated by PyTorch.

    Raises:
        UserError: a setting out of its range, or a backend given by name that cannot run.
    """

    @checked
    def __init__(
        self,
        params: Any,
        lr: NotNegative | Tensor,
        momentum: BelowOne = 0.9,
        weight_decay: NotNegative = 0.0,
        eta: NotNegative = 0.001,
        clip: bool = False,
        exclude_1d: bool = True,
        backend: Backend = "auto",
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
        self.backend: Backend = backend
        self._updaters: dict[torch.device, Updater] = {}
        for group in self.param_groups:
            for name in defaults:
                check(group[name], _RULES[name], f"Lars: {name} of a group")
            lr = group["lr"]
            if isinstance(lr, Tensor) and (lr.ndim > 0 or lr.dtype != torch.float32):
                given = f"a tensor {tuple(lr.shape)} of {lr.dtype}"
                raise UserError(f"Lars: lr is {given}; a number or a tensor () of float32 works")
            for p in group["params"]:
                self._updater(p.device)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "backend": self.backend}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        self.__dict__.setdefault("_updaters", {})  # of a copy; what a graph reads stays

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """One update; parameters without a gradient are left alone."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            settings = Settings(
                group["lr"],
                group["momentum"],
                group["weight_decay"],
                group["eta"],
                group["clip"],
                grad_scale=getattr(self, "grad_scale", None),  # there while a GradScaler steps
                found_inf=getattr(self, "found_inf", None),
            )
            by_device: dict[torch.device, list[Item]] = {}
            for p in group["params"]:
                if p.grad is not None:
                    scaled = p.ndim > 1 or not group["exclude_1d"]
                    item = Item(p, p.grad, self._momentum_buffer(p), scaled)
                    by_device.setdefault(p.device, []).append(item)
            for device, items in by_device.items():
                self._updater(device)(items, settings)
        return loss

    # How torch's GradScaler knows that ``step`` unscales and skips by itself.
    _step_supports_amp_scaling = True

    def _updater(self, device: torch.device) -> Updater:
        if device not in self._updaters:
            self._updaters[device] = Updater(self.backend, device)
        return self._updaters[device]

    def _momentum_buffer(self, p: Tensor) -> Tensor:
        """In the parameter's memory format, which a checkpoint need not have."""
        state = self.state[p]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(p)
        elif not lies_like(state["momentum_buffer"], p) and is_dense(p):
            state["momentum_buffer"] = torch.empty_like(p).copy_(state["momentum_buffer"])
        return state["momentum_buffer"]
