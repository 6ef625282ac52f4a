"""Which tensors and devices the compiled operators are for."""

import pytest
import torch

from sacl_fast.errors import UserError
from sacl_fast.ops import compiled
from sacl_fast.ops.backend import resolve


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
    assert compiled.takes(x, torch.zeros(3))
    assert not compiled.takes(x, torch.zeros(3, dtype=torch.float64))
    assert not compiled.takes(x.bfloat16())
    assert not compiled.takes(x.contiguous())
    assert not compiled.takes(x[:0])


@pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))
def test_backends_of_the_slim_operators():
    cpu = torch.device("cpu")
    assert resolve("auto", "slim_conv", cpu).backend == "cpu"
    with pytest.raises(UserError, match=r"it needs a CUDA device.*what can: cpu, torch"):
        resolve("cuda", "slim_conv", cpu)


@pytest.mark.gpu
def test_backends_of_the_slim_operators_on_a_gpu():
    device = torch.device("cuda")
    assert compiled.cuda_obstacle(device) is None
    assert resolve("auto", "slim_conv", device).backend == "cuda"
