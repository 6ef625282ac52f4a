"""The sum of raw slim activations, in plain PyTorch: what slim_add gives of normalised ones."""

import pytest
import torch
from against_float64 import images

from sacl_fast.ops import compiled
from sacl_fast.ops.norm_slim_add import is_compiled
from sacl_fast.ops.slim_add import slim_add

pytestmark = pytest.mark.skipif(not is_compiled(), reason=str(compiled.obstacle()))
N = 3


def normalised(x, affine):
    if affine is None:
        return x
    scale, bias, mean, _ = (v.view(1, -1, 1, 1) for v in affine)
    return (x - mean) * scale + bias


# Live channels and constants of a and b, channels of the sum (None: all live ones, in order).
@pytest.mark.parametrize("sizes", [(7, 0, 7, 0, None), (7, 4, 5, 9, 10), (1, 2, 8, 0, 3)])
@pytest.mark.parametrize("raw", [(True, True), (True, False), (False, True), (False, False)])
def test_it_is_the_sum_of_normalised_operands(sizes, raw):
    g = torch.Generator().manual_seed(sum(sizes[:4]))
    *counts, U = sizes
    given, plain = [], []
    for live, constants, is_raw in zip(counts[::2], counts[1::2], raw, strict=True):
        x = 5 + images(N, live, 5, 3, g=g)
        affine = torch.randn(4, live, generator=g) if is_raw else None
        rest = torch.randn(constants, generator=g) if constants else None
        index = None if U is None else torch.randperm(live + constants, generator=g)[:U]
        given += [x, affine, rest, index]
        plain += [
            normalised(x.double(), affine),
            None if rest is None else rest.view(1, -1, 1, 1).double(),
            index,
        ]
    y = torch.ops.sacl_fast.norm_slim_add(*given)
    assert y.is_contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(y.double(), slim_add(*plain, backend="torch"), rtol=0, atol=2e-5)
    torch.library.opcheck(torch.ops.sacl_fast.norm_slim_add, tuple(given))
