"""Names for the parts of a run's step, under which a profiler shows them.

    with region("loss"):
        loss, parts = criterion(...)

A region is a range on the host's time line: what the device does is told apart by when it was
launched (``trace.py``). So it costs the device nothing, and CUDA graphs may be captured within.
"""

from __future__ import annotations

from typing import Literal, get_args

from torch.profiler import record_function

Region = Literal[
    "data wait",
    "z1 dense a",
    "z2 slim b",
    "z1_t dense b",
    "z2_t slim a",
    "loss",
    "backward",
    "update",
    "replay",
    "reading",
]
REGIONS: tuple[Region, ...] = get_args(Region)
"""In the order of a step. A step that is replayed as a CUDA graph is one region, ``replay``."""


def region(name: Region) -> record_function:
    """Within, what runs belongs to that part of the step. While nothing profiles it takes 5 us."""
    return record_function(name)
