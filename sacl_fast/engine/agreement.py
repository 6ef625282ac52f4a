"""Processes that were started together are to train together: with the same settings and passes.

A sweep that starts each of its runs by ``srun`` would else become one run, of rank 0's settings.
"""

from __future__ import annotations

from dataclasses import replace

from torch import nn

from sacl_fast.config import Config, to_dict
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.resume import changed_settings
from sacl_fast.errors import UserError
from sacl_fast.passes import Passes, choose_passes

_OWN = ("data.root:", "data.workers:", "data.prefetch:", "device:")  # of each machine


def check_same_settings(config: Config, ranks: Ranks) -> None:
    """Refuse to train where another rank was started with other settings than this one.

    Raises:
        UserError: it names the settings; on the ranks that differ from rank 0, or on all.
    """
    settings = to_dict(config)
    for rank, theirs in enumerate(ranks.gather(settings)):
        changes = [c for c in changed_settings(settings, theirs) if not c.startswith(_OWN)]
        if changes:
            raise UserError(
                f"rank {rank} was started with other settings than rank {ranks.rank}: "
                f"{', '.join(changes[:4])}; the same for all work, or WORLD_SIZE=1 if each is to "
                "train alone"
            )


def passes_of_all(
    config: Config, ranks: Ranks, *, steps_per_epoch: int, encoder: nn.Module
) -> Passes:
    """``choose_passes``, on every rank the same: where operators can be used on some machines only,
    ``auto`` does without them."""

    def choose(config: Config) -> Passes:
        return choose_passes(config, ranks.device, steps_per_epoch=steps_per_epoch, encoder=encoder)

    passes = ranks.together(lambda: choose(config))
    if differ(passes, ranks) and config.engine.plan == config.slim.mode == "auto":
        plain = choose(replace(config, slim=replace(config.slim, mode="mask")))
        return replace(plain, reason="operators cannot be used on all ranks")
    return passes


def differ(passes: Passes, ranks: Ranks) -> bool:
    """Whether some ranks' passes have other collectives in them than this one's."""
    forms = ranks.gather((passes.mode, passes.dense, passes.recorded, passes.fused))
    return len(set(forms)) > 1
