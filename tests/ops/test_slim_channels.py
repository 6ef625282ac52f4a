"""Inverted index lists and means over the image."""

import gc

import pytest
import torch

from sacl_fast.ops.slim_channels import _POSITIONS, image_mean, positions_in


def test_positions_are_worked_out_once_and_kept_as_long_as_the_index():
    index, after = torch.tensor([4, 0, 3]), torch.tensor([1])
    with torch.inference_mode():
        positions = positions_in(index, 6)
        followed = positions_in(index, 6, after)
    assert positions is not None and followed is not None
    assert positions.tolist() == [1, -1, -1, 2, 0, -1] and not positions.is_inference()
    assert followed.tolist() == [1, 3, -1, 2, 0, -1]
    assert positions_in(index, 6) is positions and positions_in(index, 6, after) is followed
    assert positions_in(index, 7) is not positions
    assert positions_in(None, 6) is None
    before = len(_POSITIONS)
    del index
    gc.collect()
    assert len(_POSITIONS) == before - 1


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_image_mean(memory_format):
    x = torch.randn(3, 5, 4, 6, dtype=torch.float64)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    weights = torch.randn(3, 5, 1, 1, dtype=torch.float64)
    (image_mean(x) * weights).sum().backward()
    got, x.grad = x.grad, None
    (x.mean((2, 3), keepdim=True) * weights).sum().backward()
    torch.testing.assert_close(got, x.grad, rtol=1e-12, atol=0)
