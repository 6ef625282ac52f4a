"""The slim encoder: which filters it keeps (``slicer``) and how the encoder runs with them.

``tensor`` is the activation in parts, ``rules`` and ``layers`` are what operations do with it;
``recorded`` runs it from a recording of itself, which ``tape`` makes; ``conv`` is a slim
convolution by itself.
"""

from sacl_fast.slim import layers as _layers  # noqa: F401 - registers the rules
from sacl_fast.slim.conv import SlimConv2d
from sacl_fast.slim.recorded import RecordedEncoder
from sacl_fast.slim.slicer import Slicer

__all__ = ["RecordedEncoder", "Slicer", "SlimConv2d"]
