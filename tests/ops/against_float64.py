"""A compiled operator of slim activations against PyTorch in float64."""

import torch


def images(*shape, g):
    return torch.randn(shape, generator=g).contiguous(memory_format=torch.channels_last)


def gradients(function, tensors):
    leaves = [None if t is None else t.clone().requires_grad_() for t in tensors]
    y = function(*leaves)
    (y * torch.linspace(-1, 2, y.numel(), dtype=y.dtype).view(y.shape)).sum().backward()
    grads = (torch.zeros_like(t) if t.grad is None else t.grad for t in leaves if t is not None)
    return [y.detach(), *grads]


def assert_equals_pytorch(function, tensors):
    """Values and gradients of ``function(backend, *tensors)``: ``cpu`` against ``torch``."""
    ours = gradients(lambda *t: function("cpu", *t), tensors)
    exact = [None if t is None else t.double() for t in tensors]
    for got, expected in zip(ours, gradients(lambda *t: function("torch", *t), exact), strict=True):
        assert got.shape == expected.shape
        scale = expected.abs().max().clamp(min=1e-3)
        torch.testing.assert_close(got.double() / scale, expected / scale, rtol=0, atol=2e-6)
