"""Which operations act on a slim activation part by part, and how: one function each.

A rule is called with the function itself and its arguments, of which one at least is a
``SlimTensor`` or ``KeptFilters``, and returns NotImplemented for arguments that it does not cover.
The parts of a result are new tensors unless torch's own result would share memory with the operand:
in-place operations follow.

Importing this package registers all of them; ``slim.tensor`` does so when it first needs one.
"""

from sacl_fast.slim.rules import (
    arithmetic,
    batch_norm,
    channels,
    convolution,
    elementwise,
    pooling,
)
from sacl_fast.slim.rules.registry import RULES, rule_for

__all__ = [
    "RULES",
    "arithmetic",
    "batch_norm",
    "channels",
    "convolution",
    "elementwise",
    "pooling",
    "rule_for",
]
