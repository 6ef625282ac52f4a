"""The compiled sum of slim activations against PyTorch in float64."""

import pytest
import torch
from against_float64 import assert_equals_pytorch, images

from sacl_fast.ops import compiled
from sacl_fast.ops.slim_add import is_compiled, slim_add

pytestmark = pytest.mark.skipif(not is_compiled(), reason=str(compiled.obstacle()))
N = 3


# Channels; live ones of a, of b (the others are constants); of the sum.
@pytest.mark.parametrize(
    "sizes",
    [
        (5, 2, 3, 4),
        (40, 17, 20, 30),
        (32, 32, 16, 32),
        (19, 19, 19, 19),
        (64, 1, 40, 50),
        (24, 17, 5, 17),
    ],
)
@pytest.mark.parametrize("side", [(1, 1), (9, 15)])
def test_equals_pytorch(sizes, side):
    g = torch.Generator().manual_seed(0)
    C, live_a, live_b, U = sizes
    given, lists = [], []
    for live in (live_a, live_b):
        given.append(images(N, live, *side, g=g))
        given.append(torch.randn(1, C - live, 1, 1, generator=g) if live < C else None)
        # None also where there are constants, but none of them is in the sum
        chosen = torch.randperm(C, generator=g)[:U]
        lists.append(None if live == U else chosen)
    a_index, b_index = lists

    def add(backend, a, a_rest, b, b_rest):
        return slim_add(a, a_rest, a_index, b, b_rest, b_index, backend=backend)

    assert_equals_pytorch(add, given)


def test_the_operators_keep_the_rules_of_torch_library():
    g, op = torch.Generator().manual_seed(0), torch.ops.sacl_fast
    a, b, rest = images(N, 5, 3, 3, g=g), images(N, 7, 3, 3, g=g), torch.randn(2, generator=g)
    index = torch.tensor([6, 0, 1, 2, 5, 3, 4])
    torch.library.opcheck(op.slim_add, (a, rest, index, b, None, None))
    torch.library.opcheck(op.slim_add_backward, (b, 5, 2, index, 7, 0, None))
