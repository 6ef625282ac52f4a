"""The compiled gate of slim activations against PyTorch in float64."""

import pytest
import torch
from against_float64 import assert_equals_pytorch, images

from sacl_fast.ops import compiled
from sacl_fast.ops.slim_gate import is_compiled, slim_gate

pytestmark = pytest.mark.skipif(not is_compiled(), reason=str(compiled.obstacle()))
N = 3


@pytest.mark.parametrize("sizes", [(3, 3, 0), (40, 20, 9), (33, 16, 17), (8, 1, 0)])
@pytest.mark.parametrize("side", [(1, 1), (5, 13)])
def test_equals_pytorch(sizes, side):
    g = torch.Generator().manual_seed(0)
    C, live, in_map = sizes
    order = torch.randperm(C, generator=g)
    x_index = None if live == C else order[:live]
    map_index = order[live : live + in_map] if in_map else None
    given = [
        images(N, live, *side, g=g),
        images(1, in_map, *side, g=g) if in_map else None,
        torch.randn(N, C, 1, 1, generator=g),
    ]

    def gated(backend, x, others, gate):
        return slim_gate(x, others, gate, x_index, map_index, backend=backend)

    assert_equals_pytorch(gated, given)


def test_the_operators_keep_the_rules_of_torch_library():
    g, op = torch.Generator().manual_seed(0), torch.ops.sacl_fast
    x, gate = images(N, 5, 3, 3, g=g), torch.randn(N, 9, generator=g)
    given = x, None, gate, torch.tensor([8, 1, 2, 3, 4]), None
    torch.library.opcheck(op.slim_gate, given)
    torch.library.opcheck(op.slim_gate_backward, (x, *given))
