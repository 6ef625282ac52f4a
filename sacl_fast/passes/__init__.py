"""How a pass of the slim encoder runs, which is decided once a run (``choice``).

As its code says, in the slicer's mode ``mask`` or ``skip``; or from a recording of mode ``skip``
(``recorded``, ``recording``), which leaves nothing for Python to decide.
"""

from sacl_fast.passes.choice import SlimPasses, choose_slim_passes
from sacl_fast.passes.recorded import RecordedEncoder

__all__ = ["RecordedEncoder", "SlimPasses", "choose_slim_passes"]
