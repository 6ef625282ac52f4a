"""How a pass of the encoder runs, which is decided once a run: its plan (``choice``).

As the model's code says, in one of the slicer's modes, or compiled; or from a recording of itself
(``recorded``, ``recording``, ``graph``), which leaves nothing for Python to decide; or from a
recording whose batch norms are fused into the convolutions around them (``fusion``,
``rules``).
"""

from sacl_fast.passes.choice import Passes, choose_passes, passes_of, plan_obstacle
from sacl_fast.passes.recorded import RecordedEncoder, share_gradients

__all__ = [
    "Passes",
    "RecordedEncoder",
    "choose_passes",
    "passes_of",
    "plan_obstacle",
    "share_gradients",
]
