"""Which tensors and devices the compiled operators are for."""

import pytest
import torch

from sacl_fast.errors import UserError
from sacl_fast.ops import compiled
from sacl_fast.ops.backend import SLIM_OPERATORS, resolve


@pytest.mark.parametrize(
    ("architecture", "runs", "does_not"),
    [
        ("sm_80", [(8, 0), (8, 6)], [(7, 5), (9, 0)]),
        ("sm_86", [(8, 6), (8, 9)], [(8, 0)]),
        ("sm_90a", [(9, 0)], [(8, 0), (9, 1), (10, 0)]),
        ("sm_100f", [(10, 0), (10, 3)], [(12, 0)]),
        ("compute_90", [(9, 0), (10, 0), (12, 0)], [(8, 9)]),
        ("compute_90a", [(9, 0)], [(10, 0)]),
    ],
)
def test_code_and_the_devices_that_it_runs_on(architecture, runs, does_not):
    assert all(compiled.runs_on(architecture, capability) for capability in runs)
    assert not any(compiled.runs_on(architecture, capability) for capability in does_not)


@pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))
def test_tensors_of_the_cpu():
    x = torch.zeros(2, 3, 4, 5).contiguous(memory_format=torch.channels_last)
    assert compiled.unfit(x, torch.zeros(3), None) is None
    for given, why_not in [
        ((x, torch.zeros(3, dtype=torch.float64)), "one number type"),
        ((x.bfloat16(),), "float32, not torch.bfloat16"),
        ((x.contiguous(),), "channels-last"),
        ((x[:0],), "no values"),
        ((x.to("meta"),), "not on meta"),
    ]:
        assert why_not in str(compiled.unfit(*given))


@pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))
@pytest.mark.parametrize("op", SLIM_OPERATORS)
def test_backends_of_the_slim_operators(op):
    cpu = torch.device("cpu")
    assert resolve("auto", op, cpu).backend == "cpu"
    with pytest.raises(UserError, match=r"it needs a CUDA device.*what can: cpu, torch"):
        resolve("cuda", op, cpu)


@pytest.mark.gpu
@pytest.mark.parametrize("op", SLIM_OPERATORS)
def test_backends_of_the_slim_operators_on_a_gpu(op):
    device = torch.device("cuda")
    assert compiled.cuda_obstacle(device) is None
    assert resolve("auto", op, device).backend == "cuda"
