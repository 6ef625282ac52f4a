"""Crops of fewer images than a batch, and of hardly any that can be read."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from sacl_fast.data.images.open import open_sources
from sacl_fast.data.loading.crops import CropLoader
from sacl_fast.errors import UserError

CPU = torch.device("cpu")


def test_few_images_fill_a_batch_each_time_as_another_crop(tiny):
    source = open_sources(tiny.data, 0).train
    chosen = np.array([40, 3, 7, 20, 11])
    config = replace(tiny, batch_size=12)
    with pytest.raises(UserError, match="batch_size is 12, but there are only 5"):
        CropLoader(source, chosen, config, CPU)
    loader = CropLoader(source, chosen, config, CPU, repeat=True)
    batches = loader.batches()
    for _ in range(2):
        pixels, index = next(batches)
        images, counts = np.unique(index.numpy(), return_counts=True)
        assert images.tolist() == sorted(chosen) and counts.max() == 3 and counts.sum() == 12
        assert len({crop.numpy().tobytes() for crop in pixels}) == 12
    batches.close()
    whole = CropLoader(source, np.arange(20), config, CPU, repeat=True)
    assert whole.steps_per_epoch == CropLoader(source, np.arange(20), config, CPU).steps_per_epoch


@pytest.mark.parametrize("readable", [0, 1, 30])
def test_where_hardly_any_can_be_read_that_is_said(tiny, tmp_path, readable):
    """Chance may have drawn as many, but no crop is had of them."""
    for i in range(60):
        Image.new("RGB", (20, 20), (i, i, i)).save(tmp_path / f"{i:02}.png")
    data = replace(tiny.data, root=str(tmp_path))
    source = open_sources(data, 0).train
    for i in range(60 - readable):
        (tmp_path / f"{i:02}.png").write_text("none")
    batches = CropLoader(source, np.arange(60), replace(tiny, data=data), CPU).batches()
    with pytest.raises(UserError, match=r"unreadable, which is too many .data.max_bad_share"):
        next(batches)
    batches.close()
