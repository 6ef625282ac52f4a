"""The slim encoder as an ordinary, smaller module for deployment."""

from sacl_fast.slim.export.compact import Cost, compact, cost, load_compact

__all__ = ["Cost", "compact", "cost", "load_compact"]
