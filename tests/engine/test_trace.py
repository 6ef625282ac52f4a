"""What is read from a trace, by hand."""

from __future__ import annotations

from typing import Any

import pytest

from sacl_fast.engine.trace import figures_of, kernels_of, table

MAIN, AUTOGRAD, LOADER = 1, 2, 3


def event(cat: str, name: str, ts: float, dur: float, tid: int = MAIN, **args: Any):
    return {"ph": "X", "cat": cat, "name": name, "ts": ts, "dur": dur, "tid": tid, "args": args}


def launch(ts: float, number: int, tid: int = MAIN, kind: str = "cuda_runtime"):
    return event(kind, "cudaLaunchKernel", ts, 1, tid, correlation=number)


def on_device(name: str, ts: float, dur: float, number: int, cat: str = "kernel"):
    return event(cat, name, ts, dur, tid=7, correlation=number)


def of_gpu(begin: float = 0.0) -> list[dict[str, Any]]:
    """A step of 100 us on the host, 400 on the device, which lags behind."""
    t = begin
    events = [
        event("user_annotation", "data wait", t, 10),
        event("user_annotation", "z1 dense a", t + 10, 20),
        event("user_annotation", "backward", t + 40, 30),
        event("user_annotation", "Optimizer.step#Lars.step", t + 71, 10),
        event("cpu_op", "autograd::engine::evaluate_function: X", t + 42, 20, AUTOGRAD),
        launch(t + 5, 1, LOADER),
        launch(t + 12, 2),
        launch(t + 14, 3, kind="cuda_driver"),
        launch(t + 50, 4, AUTOGRAD),
        launch(t + 51, 5, LOADER),
        launch(t + 75, 6),
        on_device("decode", t + 20, 40, 1),
        on_device("conv", t + 30, 100, 2),
        on_device("copy", t + 130, 10, 3, "gpu_memcpy"),
        on_device("conv_backward", t + 140, 160, 4),
        on_device("decode", t + 150, 50, 5),
        on_device("update", t + 310, 80, 6),
        event("gpu_user_annotation", "backward", t + 140, 160, tid=7),
        {"ph": "M", "name": "process_name"},
        {"ph": "X", "cat": "Trace", "name": "PyTorch Profiler", "ts": t, "dur": 400},
    ]
    for e in events:
        if "correlation" in e.get("args", {}):
            e["args"]["correlation"] += int(begin)
    return events


def test_kernels_belong_to_the_region_that_launched_them():
    figures = figures_of({"traceEvents": of_gpu() + of_gpu(400.0)}, steps=2)
    assert figures.on_gpu
    assert figures.step == pytest.approx(0.395)  # the last kernel ends 10 us before a third step
    assert figures.regions == {
        "data wait": 0.0,
        "z1 dense a": pytest.approx(0.110),
        "backward": pytest.approx(0.160),
    }
    assert figures.rest == pytest.approx(0.170)  # the update is in no region, the loader's neither
    assert figures.busy == pytest.approx((280 + 80) / 395)
    assert (figures.launches, figures.kernels) == (6, 5)  # one is a copy
    assert [(d.name, d.calls) for d in figures.dearest[:3]] == [
        ("conv_backward", 1),
        ("conv", 1),
        ("decode", 2),
    ]


def test_a_graph_is_one_launch_and_one_region():
    events = [
        event("user_annotation", "data wait", 0, 10),
        event("user_annotation", "replay", 10, 10),
        event("cuda_runtime", "cudaGraphLaunch", 12, 3, correlation=9),
        *(on_device(f"kernel {i}", 20 + 10 * i, 10, 9) for i in range(8)),
    ]
    figures = figures_of({"traceEvents": events}, steps=1)
    assert (figures.launches, figures.kernels) == (1, 8)
    assert figures.regions == {"data wait": 0.0, "replay": pytest.approx(0.080)}
    assert "--engine.cuda-graph off" in table(figures)


def test_on_the_cpu_operators_count_without_those_they_call():
    events = [
        event("cpu_op", "aten::before", -20, 10),  # a step that was not asked for
        event("user_annotation", "loss", 0, 60),
        event("cpu_op", "aten::conv2d", 5, 40),
        event("cpu_op", "aten::convolution", 6, 38),
        event("cpu_op", "aten::empty", 7, 3),
        event("cpu_op", "detach", 50, 1),
        event("user_annotation", "backward", 60, 40),
        event("cpu_op", "autograd::engine::evaluate_function: MulBackward0", 61, 39),
        event("cpu_op", "MulBackward0", 62, 30),
        event("cpu_op", "aten::mul", 63, 10),
        event("cpu_op", "aten::mul", 74, 10),
        event("cpu_op", "aten::elsewhere", 74, 10, LOADER),
    ]
    figures = figures_of({"traceEvents": events}, steps=1)
    assert not figures.on_gpu
    assert figures.regions == {"loss": 0.060, "backward": 0.040}
    assert (figures.step, figures.rest, figures.launches) == (pytest.approx(0.1), 0.0, 3)
    assert figures.busy == pytest.approx(0.6)
    own = {d.name: round(1e3 * d.milliseconds) for d in figures.dearest}
    assert own == {"aten::convolution": 35, "aten::mul": 20, "aten::empty": 3, "aten::conv2d": 2}


def test_a_trace_without_regions():
    with pytest.raises(ValueError, match="no region"):
        figures_of({"traceEvents": [event("cpu_op", "aten::mul", 0, 1)]}, steps=1)


def test_only_kernels_count_as_launches():
    """A trace also names copies, the calls that launch, and what annotations span."""
    kinds = ["cpu_op", "cuda_runtime", "kernel", "gpu_memset", "gpu_memcpy", "gpu_user_annotation"]
    events = [{"name": f"a {kind}", "cat": kind} for kind in kinds]
    assert kernels_of({"traceEvents": [*events, {"name": "process_name"}]}) == ["a kernel"]


def test_the_table_fits_a_terminal():
    events = of_gpu()
    events[-5]["name"] = "void cutlass::Kernel<" + "x" * 200 + ">(Params)"
    text = table(figures_of({"traceEvents": events}, steps=1), data_wait=0.123)
    assert max(map(len, text.splitlines())) <= 100
    assert "12.3%   for data, by the device's clock" in text
    assert "of 5 kernels, a step" in text and "x...xxxx>(Params)" in text
