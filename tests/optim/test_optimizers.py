"""LARS against the formula written out for one parameter at a time, in float64."""

from typing import Any

import pytest
import torch
from torch import nn

from sacl_fast.config import OptimConfig
from sacl_fast.errors import UserError
from sacl_fast.optim import Lars, build_optimizer, learning_rate


def plain_lars(params, grads, buffers, *, lr, momentum, decay, eta, clip, exclude_1d):
    for p, g, buffer in zip(params, grads, buffers, strict=True):
        p_norm, g_norm = p.norm().item(), g.norm().item()
        if (p.ndim > 1 or not exclude_1d) and p_norm > 0 and g_norm > 0:
            trust = eta * p_norm / (g_norm + decay * p_norm + 1e-8)
            if clip:
                trust = min(trust / lr, 1.0) if lr > 0 else 1.0
            g = (g + decay * p) * trust
        buffer.mul_(momentum).add_(g)
        p.sub_(lr * buffer)


@pytest.mark.parametrize("clip", [False, True])
@pytest.mark.parametrize("exclude_1d", [False, True])
@pytest.mark.parametrize("decay", [0.0, 0.01])
def test_equals_the_formula(clip, exclude_1d, decay):
    torch.manual_seed(0)
    shapes = [(8, 4), (3, 2, 3, 3), (7,), (5, 5), (1, 1)]
    params = [nn.Parameter(torch.randn(s, dtype=torch.float64)) for s in shapes]
    params[3].data.zero_()  # a weight of norm 0 must still be able to move
    params[1].data = params[1].data.to(memory_format=torch.channels_last)
    reference = [p.detach().clone() for p in params]
    buffers = [torch.zeros_like(p) for p in reference]
    settings: dict[str, Any] = dict(momentum=0.9, eta=0.02, clip=clip, exclude_1d=exclude_1d)
    optimizer = Lars(params, lr=0.5, weight_decay=decay, **settings)
    for lr in (0.0, 0.1, 0.5, 0.3):
        optimizer.param_groups[0]["lr"] = lr
        grads = [torch.randn_like(p) for p in reference]
        grads[4].zero_()
        for p, g in zip(params, grads, strict=True):
            p.grad = g.clone()
        optimizer.step()
        plain_lars(reference, grads, buffers, lr=lr, decay=decay, **settings)
    for p, r in zip(params, reference, strict=True):
        torch.testing.assert_close(p.detach(), r, rtol=1e-12, atol=1e-12)


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
