"""Channels joined and split, on an activation in parts against the same on its dense form."""

import pytest
import torch

from tests.slim.activations import FORMS, H, N, W, stays_slim

STAYS_SLIM = {
    "cat": lambda x: torch.cat([x, torch.ones(N, 2, H, W, dtype=x.dtype), x * 2], dim=1),
    "chunk": lambda x: torch.cat([c * i for i, c in enumerate(x.chunk(2, dim=1), 1)], 1),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STAYS_SLIM)
def test_on_parts(name, form, caplog):
    stays_slim(STAYS_SLIM[name], form, caplog)
