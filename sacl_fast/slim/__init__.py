"""The slim encoder: which filters it keeps (``slicer``) and how the encoder runs with them.

``tensor`` is the activation in parts, ``rules`` are what operations do with it; ``export`` makes
the slim encoder an ordinary module, and ``conv`` is a slim convolution by itself.
"""

from sacl_fast.slim.conv import SlimConv2d
from sacl_fast.slim.slicer import Slicer

__all__ = ["Slicer", "SlimConv2d"]
