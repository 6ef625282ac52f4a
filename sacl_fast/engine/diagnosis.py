"""What may help a run whose loss is not finite: only what can, for this configuration."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from sacl_fast.config import Config
from sacl_fast.engine.method import build_networks
from sacl_fast.errors import UserError


class NonFiniteLoss(UserError):
    """The loss became NaN or infinite; nothing was saved since."""

    def __init__(
        self,
        config: Config,
        amp_dtype: torch.dtype | None,
        step: int,
        learning_rate: float,
        saved: Sequence[Path],
    ) -> None:
        """``saved``: the run's checkpoints, oldest first; ``amp_dtype`` as of ``what_may_help``."""
        kept = f"{saved[-1]} is from before" if saved else "no checkpoint had been written"
        super().__init__(
            f"the loss is not finite at step {step} (learning rate {learning_rate:.3g}, precision "
            f"{config.precision}); the run stops, {kept}. {what_may_help(config, amp_dtype)}"
        )


def what_may_help(config: Config, amp_dtype: torch.dtype | None) -> str:
    """A sentence or two for whoever configured the run.

    Args:
        amp_dtype: what autocast ran in; None: float32.
    """
    if config.slim.norm_gradient == "exact" and _gradients_grow(config):
        return (
            f"In slim passes of {config.encoder.name}, gradients grow over batch norms of constant "
            "channels, at any rate and precision; --slim.norm-gradient damped, or auto, bounds them"
        )
    if config.loss.off_diagonal == "literal" and config.loss.alpha < 1:
        return (
            "The literal objective has no lower bound; --loss.off-diagonal squared is the one that "
            "can be minimised"
        )
    ways = ["a lower --optim.lr"]
    if config.optim.warmup_epochs == 0:
        ways.append("--optim.warmup-epochs 1 or more")
    if amp_dtype is not None:
        ways.append("--precision fp32")
    if config.slim.ratio < 1 and config.slim.norm_gradient != "damped":
        ways.append("--slim.norm-gradient damped")
    return f"What often helps: {', or '.join(ways)}"


def _gradients_grow(config: Config) -> bool:
    """Whether ``auto`` would damp the slim passes' gradients."""
    by_architecture = replace(config, slim=replace(config.slim, norm_gradient="auto"))
    return build_networks(by_architecture).slicer.norm_gradient == "damped"
