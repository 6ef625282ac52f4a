"""Processes that were started together are to train together: with the same settings.

A sweep that starts each of its runs by ``srun`` would else become one run, of rank 0's settings.
"""

from __future__ import annotations

from sacl_fast.config import Config, to_dict
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.resume import changed_settings
from sacl_fast.errors import UserError

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
