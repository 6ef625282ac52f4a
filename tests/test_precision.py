"""The number type of a run, and the autocast that carries it out."""

import pytest
import torch

from sacl_fast.errors import UserError
from sacl_fast.precision import autocast, autocast_dtype, precision_reason

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("capability", "dtype"),
    [((6, 1), None), ((7, 0), None), ((7, 5), None), ((8, 0), "bf16"), ((9, 0), "bf16")],
)
def test_auto_is_bf16_where_the_gpu_computes_in_it(monkeypatch, capability, dtype):
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla V100")
    expected = torch.bfloat16 if dtype else None
    assert autocast_dtype("auto", gpu) is expected
    reason = precision_reason("auto", gpu)
    assert (reason is None) == (dtype == "bf16")
    assert reason is None or "fp32, because Tesla V100 is older than bf16" in reason
    assert autocast_dtype("bf16", gpu) is torch.bfloat16  # as requested
    assert precision_reason("bf16", gpu) is None
    assert autocast_dtype("auto", CPU) is None


def test_fp16_is_refused_on_a_cpu():
    assert autocast_dtype("bf16", CPU) is torch.bfloat16
    with pytest.raises(UserError, match="needs a CUDA GPU; 'fp32' and 'bf16' work"):
        autocast_dtype("fp16", CPU)


def test_none_switches_autocast_off():
    a = torch.randn(2, 2)
    assert (a @ a).dtype is torch.float32
    with autocast(CPU, torch.bfloat16):
        assert (a @ a).dtype is torch.bfloat16
        with autocast(CPU, None):
            assert (a @ a).dtype is torch.float32
