"""Slim activations for tests, and an operation on one against that on its dense form."""

import logging

import torch
from torch import nn

from sacl_fast.slim.channels import channels
from sacl_fast.slim.parts import Part
from sacl_fast.slim.tensor import KeptFilters, SlimTensor, _already_logged, from_parts

N, C, H, W = 3, 12, 7, 5
FORMS = {
    "constant": ([N, 4, H, W], [1, 8, 1, 1]),
    "map": ([N, 3, H, W], [1, 5, H, W], [1, 4, 1, 1]),
    "by_sample": ([N, 5, H, W], [N, 4, 1, 1], [1, 3, 1, 1]),
    "one_live": ([N, 1, H, W], [1, 11, 1, 1]),
    "strip": ([N, 5, H, W], [1, 3, H, 1], [N, 4, 1, W]),
}


def activation(form: str, seed: int = 0) -> tuple[SlimTensor, list[torch.Tensor]]:
    """A slim activation with its channels shuffled among the parts, and the parts' values."""
    torch.manual_seed(seed)
    shapes = FORMS[form]
    order = torch.randperm(C).split([s[1] for s in shapes])
    values = [torch.randn(s, dtype=torch.float64, requires_grad=True) for s in shapes]
    parts = [Part(channels(o.numpy()), v.clone()) for o, v in zip(order, values, strict=True)]
    made = from_parts(parts, torch.Size((N, C, H, W)))
    assert isinstance(made, SlimTensor)
    return made, values


def agree(function, form: str) -> torch.Tensor:
    """Runs it both ways, compares results and gradients; returns the result on parts."""
    results, outputs = [], []
    for as_parts in (True, False):
        x, values = activation(form)
        torch.manual_seed(1)
        out = function(x if as_parts else x.dense())
        outputs.append(out)
        full = out.dense() if isinstance(out, SlimTensor) else out
        weights = torch.linspace(-1, 1, full.numel(), dtype=full.dtype).view(full.shape)
        grads = torch.autograd.grad((full * weights).sum(), values, allow_unused=True)
        grads = [
            torch.zeros_like(v) if g is None else g for g, v in zip(grads, values, strict=True)
        ]
        results.append((full, *grads))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)
    return outputs[0]


def stays_slim(function, form: str, caplog) -> None:
    """It agrees, its result is in parts, and nothing was made dense on the way."""
    _already_logged.clear()
    with caplog.at_level(logging.INFO, logger="sacl_fast"):
        assert isinstance(agree(function, form), SlimTensor)
    assert not caplog.records


def kept_conv(conv: nn.Conv2d, kept=(0, 3, 4, 7)) -> nn.Conv2d:
    """The convolution with some of its filters zeroed, as the slicer does it."""
    torch.manual_seed(2)
    conv.double()
    mask = torch.zeros(conv.out_channels, dtype=torch.bool)
    mask[list(kept)] = True
    numbers = channels(kept)
    for name, p in list(conv.named_parameters()):
        del conv._parameters[name]
        setattr(conv, name, KeptFilters(p, mask, numbers))
    return conv
