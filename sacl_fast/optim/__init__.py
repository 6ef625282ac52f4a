"""Optimisers and the learning-rate schedule."""

from sacl_fast.optim.build import build_optimizer
from sacl_fast.optim.lars import Lars
from sacl_fast.optim.schedule import learning_rate

__all__ = ["Lars", "build_optimizer", "learning_rate"]
