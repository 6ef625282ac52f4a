"""Parameters and gradients for the tests of LARS, and its formula written out in float64."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from sacl_fast.optim import Lars


def parameters(dtype: torch.dtype = torch.float32, device: str = "cpu") -> list[nn.Parameter]:
    """Of all kinds: several chunks, one value, none, no and one dimension, channels-last, a 1x1
    weight of either strides, transposed, with gaps in memory, and of norm 0."""
    g = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> Tensor:
        return torch.randn(shape, generator=g)

    last = torch.channels_last
    values = [
        *(randn(8, 4), randn(90, 101), randn(7), randn(), randn(0, 3), randn(1, 1)),
        *(randn(5, 3, 3, 3).to(memory_format=last), randn(6, 4, 1, 1).to(memory_format=last)),
        *(randn(6, 4, 1, 1), randn(5, 9).T, randn(6, 8)[:, ::2], randn(4, 10)[:, 1:8]),
        *(torch.zeros(3, 3), torch.zeros(4)),
    ]
    moved = [_same_layout(value.to(dtype), device) for value in values]
    return [nn.Parameter(value) for value in moved]


def _same_layout(value: Tensor, device: str) -> Tensor:
    """There, with the same strides, gaps included."""
    size = sum((n - 1) * s for n, s in zip(value.shape, value.stride(), strict=True)) + 1
    there = torch.empty(max(0, size), dtype=value.dtype, device=device)
    there = there.as_strided(value.shape, value.stride())
    return there.copy_(value)


def set_grads(params: list[nn.Parameter], step: int, scale: float = 1.0) -> None:
    """The gradients of a step. Some are None or 0 in some steps, and one is laid out otherwise
    than its parameter."""
    g = torch.Generator().manual_seed(step)
    for i, p in enumerate(params):
        grad = torch.randn(p.shape, generator=g).to(p) * (0.01 * scale)
        if (i + step) % 11 == 0:
            grad.zero_()
        p.grad = None if (i + step) % 7 == 0 else torch.empty_like(p.data).copy_(grad)
        if p.grad is not None and i == 6:
            p.grad = p.grad.contiguous()


class Exact:
    """The formula, one parameter after another, in float64."""

    def __init__(self, params: list[nn.Parameter], **settings: Any) -> None:
        self.params = [p.detach().double().cpu().clone() for p in params]
        self.momenta = [torch.zeros_like(p) for p in self.params]
        self.settings = settings

    def step(self, grads: list[Tensor | None], lr: float) -> None:
        s = self.settings
        for p, g, m in zip(self.params, grads, self.momenta, strict=True):
            if g is None:
                continue
            g = g.double().cpu()
            p_norm, g_norm = p.norm().item(), g.norm().item()
            if (p.ndim > 1 or not s["exclude_1d"]) and p_norm > 0 and g_norm > 0:
                trust = s["eta"] * p_norm / (g_norm + s["weight_decay"] * p_norm + 1e-8)
                if s["clip"]:
                    trust = min(trust / max(lr, 2e-38), 1.0)
                g = trust * (g + s["weight_decay"] * p)
            m.mul_(s["momentum"]).add_(g)
            p.sub_(lr * m)


def assert_follows(
    params: list[nn.Parameter],
    steps: int,
    backend: str,
    *,
    relative: float,
    on_device: bool = True,
    scale: float | None = None,
    **settings: Any,
) -> None:
    """Steps of ``Lars`` against the formula, of which they may differ by ``relative``, with the
    learning rate ``on_device`` or not, and with gradients that are ``scale`` times as large."""
    settings = {"momentum": 0.9, "eta": 0.02, "clip": False, "exclude_1d": True} | settings
    exact = Exact(params, **settings)
    optimizer = Lars(params, lr=0.5, **settings, backend=backend)  # pyright: ignore[reportArgumentType]
    device = params[0].device
    if scale is not None:
        optimizer.grad_scale = torch.tensor(scale, device=device)  # pyright: ignore
        optimizer.found_inf = torch.tensor(0.0, device=device)  # pyright: ignore
    for step in range(steps):
        lr = 0.0 if step == 3 else torch.tensor(0.5 / (1 + step % 10)).item()
        optimizer.param_groups[0]["lr"] = torch.tensor(lr, device=device) if on_device else lr
        set_grads(params, step)
        exact.step([p.grad for p in params], lr)
        if scale is not None:
            set_grads(params, step, scale)
        optimizer.step()
    for p, expected, m in zip(params, exact.params, exact.momenta, strict=True):
        assert_near(p.detach(), expected, relative)
        if "momentum_buffer" in optimizer.state[p]:
            assert_near(optimizer.state[p]["momentum_buffer"], m, relative)


def assert_near(x: Tensor, expected: Tensor, relative: float) -> None:
    """Of the largest value."""
    bound = relative * max(1e-6, expected.abs().max().item() if expected.numel() else 0.0)
    torch.testing.assert_close(x.double().cpu(), expected, rtol=0, atol=bound)
