"""Views by Pillow and the compiled operator: those of torchvision, and without DALI."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from sacl_fast.ops import compiled
from tests.data.loading.cases import batches_by, random_source, torchvision_config

ROOT = Path(__file__).resolve().parents[3]
pytestmark = pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))


@pytest.mark.parametrize("workers", [0, 2])
def test_the_views_are_torchvisions_up_to_a_few_roundings(workers: int) -> None:
    config, steps = torchvision_config(workers), [(0, 1), (1, 0)]
    expected = batches_by("torchvision", random_source(), config, steps)
    found = batches_by("pillow", random_source(), config, steps)
    assert len(found) == len(expected) == 7
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.index, theirs.index) and torch.equal(ours.label, theirs.label)
        for a, b in ((ours.view_a, theirs.view_a), (ours.view_b, theirs.view_b)):
            assert (a - b).abs().mean() < 0.2 / 255 / min(config.views.std)
            assert (a == b).float().mean() > 0.9


def test_no_dali_is_imported() -> None:
    program = (
        "import sys; sys.modules['nvidia.dali'] = None\n"
        "from tests.data.loading.cases import *\n"
        "batches_by('pillow', random_source(), torchvision_config(), [(0, 3)])\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True, cwd=ROOT)
