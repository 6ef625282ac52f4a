"""Settings of ``sacl-fast cache``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from sacl_fast.checks import Range, Settings
from sacl_fast.config.data import DataConfig


@dataclass(frozen=True, kw_only=True)
class CacheConfig(Settings):
    """What is decoded, and to which size."""

    size: Annotated[int, Range(0, 65536)] = 0
    """Shrink larger images first, so that the shorter side has this many pixels (0: keep every
    image's size). It changes the views a little: crops are taken from the shrunk images."""
    seed: Annotated[int, Range(0, 2**53 - 1)] = 0
    """Chooses the images of 'data.limit'."""
    data: DataConfig = field(default_factory=DataConfig)
