"""The learning rate as a function of the step: no state to save or to resume."""

from __future__ import annotations

import math

from sacl_fast.checks import CountOrZero, NotNegative, checked


@checked
def learning_rate(
    step: CountOrZero, *, base: NotNegative, warmup_steps: CountOrZero, total_steps: CountOrZero
) -> float:
    """Linear warm-up to ``base`` over ``warmup_steps``, then a cosine to 0 at ``total_steps``.

    Args:
        step: from 0; the first step of a warm-up has ``base / warmup_steps``.
    """
    if step < warmup_steps:
        return base * (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    return base * 0.5 * (1 + math.cos(math.pi * min(1.0, progress)))
