"""The Triton kernels of LARS against the formula: on a GPU, or in Triton's interpreter, in which
the last test runs this file where there is no GPU."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

import pytest
import torch
from cuda_graphs import captured
from lars_cases import assert_follows, assert_near, parameters, set_grads
from torch import nn

from sacl_fast.bench.figures import kernel_launches
from sacl_fast.optim import Lars
from sacl_fast.verification import Wrong, verify
from sacl_kernels import lars as kernels

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
DEVICE = "cpu" if INTERPRETED else "cuda"
SETTINGS = [
    {"weight_decay": 0.01},
    {"weight_decay": 0.01, "clip": True},
    {"weight_decay": 0.0, "clip": True, "momentum": 0.0, "exclude_1d": False},
    {"weight_decay": 0.01, "clip": True, "on_device": False},
    {"weight_decay": 0.01, "clip": True, "eta": 0.0},
    {"weight_decay": 0.01, "clip": True, "scale": 1024.0},
]


def device_test(test):
    return test if INTERPRETED else pytest.mark.gpu(test)


@device_test
@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_steps_equal_the_formula(settings: dict[str, Any]):
    steps = 5 if INTERPRETED else 100
    assert_follows(parameters(device=DEVICE), steps, "triton", relative=3e-6, **settings)


@device_test
def test_100_steps():
    params = parameters(device=DEVICE)[:3:2]  # a weight and a bias
    assert_follows(params, 100, "triton", relative=3e-6, weight_decay=0.01, clip=True)


@device_test
def test_chunks_and_sums_of_any_number(monkeypatch: pytest.MonkeyPatch):
    """As of large tensors: several blocks a chunk, more sums than are added at once."""
    small = kernels.Launch(block=64, chunk=64, chunks=40, sums=8)
    monkeypatch.setattr(kernels, "Launch", lambda: small)
    assert small.chunk_size(90 * 101) == 4 * 64
    assert_follows(parameters(device=DEVICE), 2, "triton", relative=3e-6, weight_decay=0.01)


@device_test
def test_addresses_that_are_no_multiple_of_16():
    memory = [torch.randn(1001, device=DEVICE) for _ in range(3)]
    params = [nn.Parameter(x[1:].view(20, 50)) for x in memory]
    assert_follows(params, 3, "triton", relative=3e-6, weight_decay=0.01)


@device_test
def test_other_types_go_to_pytorch_and_groups_have_settings_of_their_own():
    torch.manual_seed(0)
    shapes_and_types = [((6, 5), torch.float64), ((6, 5), torch.float32), ((4,), torch.float32)]
    start = [torch.randn(s, device=DEVICE).to(t) for s, t in shapes_and_types]
    results = []
    for backend in ("torch", "triton"):
        params = [nn.Parameter(p.clone()) for p in start]
        groups = [{"params": params[:2], "momentum": 0.5}, {"params": params[2:], "lr": 0.3}]
        optimizer = Lars(groups, lr=0.1, weight_decay=0.1, backend=backend)
        for step in range(3):
            set_grads(params, step)
            optimizer.step()
        results.append(params)
    for ours, theirs in zip(*results, strict=True):
        assert_near(ours.detach(), theirs.detach().double().cpu(), 1e-6)


@device_test
def test_a_step_after_an_overflow_changes_nothing():
    params = parameters(device=DEVICE)
    optimizer = Lars(params, lr=0.1, weight_decay=0.01, clip=True, backend="triton")
    set_grads(params, 1)
    optimizer.step()
    given = [p for p in params if p.grad is not None]
    state = [*params, *(optimizer.state[p]["momentum_buffer"] for p in given)]
    before = [x.detach().clone() for x in state]
    set_grads(params, 1, scale=float("inf"))
    optimizer.grad_scale = torch.tensor(2.0, device=DEVICE)  # pyright: ignore
    optimizer.found_inf = torch.tensor(1.0, device=DEVICE)  # pyright: ignore
    optimizer.step()
    assert all(torch.equal(x, y) for x, y in zip(before, state, strict=True))


@device_test
def test_autograd_knows_of_the_update():
    p = nn.Parameter(torch.ones(3, 3, device=DEVICE))
    y = (p * p).sum()
    p.grad = torch.ones_like(p)
    Lars([p], lr=0.1, backend="triton").step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


@device_test
def test_the_same_bits_each_time():
    results = []
    for _ in range(2):
        params = parameters(device=DEVICE)
        optimizer = Lars(params, lr=0.1, weight_decay=0.01, backend="triton")
        set_grads(params, 1)
        optimizer.step()
        results.append(params)
    assert all(torch.equal(x, y) for x, y in zip(*results, strict=True))


@device_test
def test_a_table_has_its_numbers_and_is_never_written_again(monkeypatch: pytest.MonkeyPatch):
    tables, device = kernels.Tables(), torch.device(DEVICE)
    numbers = (2**48 - 4, 0, 1, 16, *range(700))  # more than a launch has arguments
    table = tables.of(numbers, device)
    assert table[: len(numbers)].tolist() == list(numbers)
    assert tables.of(numbers, device) is table
    for i in range(kernels._KEPT):
        assert tables.of((i,), device) is not table
    assert tables.of(numbers, device) is not table
    assert table[: len(numbers)].tolist() == list(numbers)


@device_test
def test_gradients_that_move_are_followed():
    """As they do when each step has new ones; those of the step before still live here."""
    torch.manual_seed(0)
    params = [nn.Parameter(torch.ones(5, 7, device=DEVICE)) for _ in range(3)]
    alive = []
    optimizer = Lars(params, lr=0.1, backend="triton", exclude_1d=False)
    expected = [p.detach().clone() for p in params]
    other = Lars([nn.Parameter(p) for p in expected], lr=0.1, backend="torch")
    for _ in range(4):
        grads = [torch.randn(5, 7, device=DEVICE) for _ in params]
        alive.append(grads)
        for p, q, g in zip(params, other.param_groups[0]["params"], grads, strict=True):
            p.grad, q.grad = g, g.clone()
        optimizer.step()
        other.step()
    for p, q in zip(params, other.param_groups[0]["params"], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_in_a_cuda_graph(backend):
    """Gradients have other addresses there than in the steps before and after."""
    rate = torch.tensor(0.1, device="cuda")
    settings: dict[str, Any] = dict(lr=rate, weight_decay=0.01, clip=True, eta=0.02)

    def made() -> tuple[nn.Module, Lars]:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Conv2d(8, 8, 1)).cuda()
        return net, Lars(net.parameters(), **settings, backend=backend)

    x = torch.randn(4, 3, 8, 8, device="cuda")

    def step(net: nn.Module, optimizer: Lars, x: torch.Tensor = x) -> None:
        optimizer.zero_grad(set_to_none=True)
        net(x).square().mean().backward()
        optimizer.step()

    (net, optimizer), (plain, other) = made(), made()
    graph, _ = captured(lambda: step(net, optimizer))
    for _ in range(3):  # as in the warm-up; what was captured did not run
        step(plain, other)
    for i in range(4):
        rate.fill_(0.1 / (1 + i))
        if i == 2:  # a step outside, with gradients elsewhere
            held = [torch.empty_like(p) for p in net.parameters()]
            step(net, optimizer)
            del held
        else:
            graph.replay()
        step(plain, other)
        for p, q in zip(net.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
def test_at_most_four_launches_and_no_synchronisation():
    params = [nn.Parameter(torch.randn(30, 40, device="cuda")) for _ in range(200)]
    optimizer = Lars(params, lr=torch.tensor(0.1, device="cuda"), clip=True, backend="triton")
    set_grads(params, 1000)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(kernel_launches(optimizer.step)) == 2
    before = [p.grad for p in params]
    for p, grad in zip(params, before, strict=True):
        p.grad = None if grad is None else grad.clone()
    assert len(kernel_launches(optimizer.step)) == 3


@pytest.mark.gpu
@pytest.mark.skipif(INTERPRETED, reason="needs a CUDA device")
@pytest.mark.parametrize("backend", ["triton", "torch"])
def test_with_a_grad_scaler(backend):
    torch.manual_seed(0)
    net = nn.Linear(8, 8).cuda()
    optimizer = Lars(net.parameters(), lr=0.1, weight_decay=0.01, backend=backend)
    scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for factor in (1.0, float("inf"), 1.0):
            before = net.weight.detach().clone()
            optimizer.zero_grad(set_to_none=True)
            scaler.scale((net.weight * factor).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
            changed = (net.weight != before).any()
            torch._assert_async(changed == (factor == 1.0))
    finally:
        torch.cuda.set_sync_debug_mode("default")
    torch.cuda.synchronize()


@device_test
def test_the_self_check_passes_and_finds_a_wrong_rate(monkeypatch: pytest.MonkeyPatch):
    verify("lars", "triton", torch.device(DEVICE))
    update = kernels.update

    def further(*given: Any, lr: torch.Tensor, **options: Any) -> None:
        update(*given, lr=lr * 1.01, **options)

    monkeypatch.setattr(kernels, "update", further)
    with pytest.raises(Wrong, match=r"update \(\(19, 7, 3, 3\)\) is off by 0.0"):
        verify("lars", "triton", torch.device(DEVICE))


@pytest.mark.skipif(INTERPRETED, reason="this is it")
def test_all_of_this_in_the_interpreter():
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", __file__]
    done = subprocess.run(
        command,
        env={**os.environ, "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
