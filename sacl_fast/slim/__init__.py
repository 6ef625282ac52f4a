"""The slim encoder: which filters it keeps (``slicer``) and how the encoder runs with them."""

from sacl_fast.slim.slicer import Slicer

__all__ = ["Slicer"]
