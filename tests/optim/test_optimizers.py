"""The optimisers and the schedule; ``tests/ops/test_lars.py`` has the formula of LARS."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from sacl_fast.config import OptimConfig
from sacl_fast.errors import UserError
from sacl_fast.optim import Lars, build_optimizer, learning_rate


def test_parameters_without_gradient_are_left_alone():
    used, unused = nn.Parameter(torch.ones(2, 2)), nn.Parameter(torch.ones(2, 2))
    optimizer = Lars([used, unused], lr=0.1)
    used.grad = torch.ones(2, 2)
    optimizer.step()
    assert (unused == 1).all() and not (used == 1).any()


def test_state_dict_goes_on_where_it_was():
    def run(steps, state=None, weight=None):
        torch.manual_seed(1)
        p = nn.Parameter(torch.ones(3, 3) if weight is None else weight)
        optimizer = Lars([p], lr=0.1, weight_decay=0.1, eta=0.02)
        if state is not None:
            optimizer.load_state_dict(state)
        for _ in range(steps):
            p.grad = torch.full_like(p, 0.3)
            optimizer.step()
        return p.detach(), optimizer.state_dict()

    whole, _ = run(6)
    half, state = run(3)
    resumed, _ = run(3, state, half.clone())
    assert torch.equal(whole, resumed)


def test_a_copy_goes_on_as_the_original():
    results = []
    for copied in (lambda x: x, copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))):
        torch.manual_seed(0)
        optimizer = copied(Lars([nn.Parameter(torch.ones(3, 3))], lr=0.1, backend="torch"))
        (p,) = optimizer.param_groups[0]["params"]
        for _ in range(2):
            p.grad = torch.randn(3, 3)
            optimizer.step()
            optimizer = copied(optimizer)
            (p,) = optimizer.param_groups[0]["params"]
        results.append(p.detach())
        assert optimizer.backend == "torch"
    assert all(torch.equal(results[0], other) for other in results[1:])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_momentum_in_another_memory_format_or_type_is_taken(dtype: torch.dtype):
    """A checkpoint of a run without channels-last, say."""
    torch.manual_seed(0)
    start, momentum = torch.randn(2, 4, 3, 5, 5)
    results = []
    for given in (torch.contiguous_format, torch.channels_last):
        p = nn.Parameter(start.to(memory_format=torch.channels_last, copy=True))
        optimizer = Lars([p], lr=0.1)
        state = optimizer.state_dict()
        state["state"] = {0: {"momentum_buffer": momentum.to(memory_format=given).to(dtype)}}
        optimizer.load_state_dict(state)
        p.grad = torch.ones_like(p)
        optimizer.step()
        results.append(p.detach())
        buffer = optimizer.state[p]["momentum_buffer"]
        assert buffer.stride() == p.stride() and buffer.dtype == p.dtype
    assert torch.equal(*results)


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_a_rate_on_the_device_is_read_in_every_step(name: Any):
    results = []
    for on_device in (False, True):
        torch.manual_seed(0)
        p = nn.Parameter(torch.ones(4, 4))
        optimizer = build_optimizer([p], OptimConfig(name=name), backend="torch")
        rate = torch.tensor(0.0)
        for lr in (0.5, 0.25):
            rate.fill_(lr)
            for group in optimizer.param_groups:
                group["lr"] = rate if on_device else lr
            p.grad = torch.randn(4, 4)
            optimizer.step()
        results.append(p.detach())
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_with_a_loss_scale(name: Any):
    """Gradients are unscaled, and a step with infinite ones changes nothing."""

    def trained(scale: float, factors: tuple[float, ...]) -> tuple[torch.Tensor, Any]:
        torch.manual_seed(0)
        net = nn.Linear(6, 5)
        optimizer = build_optimizer(net.parameters(), OptimConfig(name=name))
        scaler = torch.amp.GradScaler("cpu", init_scale=scale, enabled=scale > 1)
        for factor in factors:
            optimizer.zero_grad()
            scaler.scale((net(torch.ones(2, 6)) * factor).square().sum()).backward()
            scaler.step(optimizer)
            scaler.update()
        return net.weight.detach(), optimizer

    plain, _ = trained(1.0, (1.0, 1.0))
    scaled, optimizer = trained(256.0, (1.0, float("inf"), 1.0))
    torch.testing.assert_close(scaled, plain, rtol=1e-6, atol=1e-6)
    assert not hasattr(optimizer, "grad_scale") and optimizer._step_supports_amp_scaling


def test_a_rate_that_is_no_single_number_is_named():
    for lr in (torch.ones(2), torch.ones((), dtype=torch.float64)):
        with pytest.raises(UserError, match=r"lr is a tensor .* float32 works"):
            Lars([nn.Parameter(torch.ones(1))], lr=lr)


def test_a_backend_by_name_that_cannot_run_is_an_error():
    for backend in ("triton", "cuda"):
        with pytest.raises(UserError, match=f"'{backend}' cannot run lars on cpu"):
            build_optimizer([nn.Parameter(torch.ones(1))], OptimConfig(), backend=backend)


def test_negative_settings_are_named():
    with pytest.raises(UserError, match="eta is -1"):
        Lars([nn.Parameter(torch.ones(1))], lr=0.1, eta=-1)


def test_adamw_does_not_decay_biases_and_norms():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))
    optimizer = build_optimizer(model.parameters(), OptimConfig(name="adamw", weight_decay=0.1))
    decays = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert [decays[p] for p in model.parameters()] == [0.1, 0.0, 0.0, 0.0]


def test_schedule():
    def rate(step):
        return learning_rate(step, base=2.0, warmup_steps=10, total_steps=110)

    assert rate(0) == pytest.approx(0.2)
    assert rate(9) == rate(10) == 2.0
    assert rate(60) == pytest.approx(1.0)
    assert rate(110) == pytest.approx(0.0) and rate(109) > 0
    assert learning_rate(0, base=1.0, warmup_steps=0, total_steps=1) == 1.0


def test_what_groups_say_is_checked_too():
    parameters = [torch.nn.Parameter(torch.zeros(2))]
    with pytest.raises(ValueError, match="lr of a group is -3"):
        Lars([{"params": parameters, "lr": -3.0}], lr=0.1)
