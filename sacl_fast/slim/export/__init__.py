"""The slim encoder as an ordinary, smaller module for deployment."""

from sacl_fast.slim.export.compact import Cost, compact, compact_zeroed, cost, load_compact

__all__ = ["Cost", "compact", "compact_zeroed", "cost", "load_compact"]
