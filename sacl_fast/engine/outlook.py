"""How long a run will take, in words, and what memory it needs of what there is."""

from __future__ import annotations

from sacl_fast.checks import counted
from sacl_fast.config import Config

_UNITS = (("d", 86_400), ("h", 3600), ("min", 60), ("s", 1))


def spoken(seconds: float) -> str:
    """A length of time in its two largest units: 3 h 20 min, 2 d 5 h, 12 min, 40 s."""
    left = round(seconds)
    if left >= 600:
        left = 60 * round(left / 60)  # no seconds where there are many minutes
    for (name, size), (below, part) in zip(_UNITS, (*_UNITS[1:], ("", 0)), strict=True):
        if left >= size:
            count, rest = divmod(left, size)
            more = rest // part if part else 0
            return f"{count} {name}" + (f" {more} {below}" if more else "")
    return "less than 1 s"


def outlook(
    config: Config,
    *,
    steps_per_epoch: int,
    steps_done: int,
    images_per_second: float,
    peak: float,
    memory: float,
) -> str:
    """What the first steps of a process tell: its time without evaluations and checkpoints.

    Args:
        peak: bytes at most so far. memory: bytes that there are.
    """
    steps, what = config.epochs * steps_per_epoch, counted(config.epochs, "epoch")
    if steps_done >= steps_per_epoch:  # before, the whole run is meant
        steps -= steps_done
        what = counted(steps / steps_per_epoch, "more epoch", ".3g")
    time = spoken(steps * config.batch_size / images_per_second)
    about = "" if time.startswith("less") else "about "
    return (
        f"{about}{time} for {what} ({images_per_second:,.0f} images/s), peak memory "
        f"{peak / 1e9:.1f} of {memory / 1e9:.0f} GB"
    )
