"""How a pass of the encoder runs: as its code says, or from a recording of itself."""

from sacl_fast.passes.recorded import RecordedEncoder

__all__ = ["RecordedEncoder"]
