"""Each operation on an activation in parts against the same operation on its dense form."""

import copy
import logging

import pytest
import torch
import torch.nn.functional as F
from timm.layers import BatchNormAct2d, Conv2dSame, DropPath, SqueezeExcite
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


STAYS_SLIM = {
    "relu": F.relu,
    "relu_": lambda x: F.relu(x * 1, inplace=True),
    "hardswish": nn.Hardswish(),
    "hardtanh in place": lambda x: nn.Hardtanh(inplace=True)(x + 0),
    "relu6 in place": lambda x: nn.ReLU6(inplace=True)(x + 0),
    "clamp_": lambda x: (x + 0).clamp_(-0.5, 0.5),
    "gelu": nn.GELU(),
    "prelu": nn.PReLU(C, dtype=torch.float64),
    "sigmoid": lambda x: x.sigmoid(),
    "mish": nn.Mish(),
    "scalar": lambda x: 2 - x / 3 + x * 2 - 1,
    "zero-dim": lambda x: x * torch.tensor(3.0, dtype=torch.float64),
    "channels": lambda x: torch.linspace(0, 1, C, dtype=torch.float64).view(1, C, 1, 1) * x,
    "gate": lambda x: x * torch.linspace(0, 1, N * C, dtype=torch.float64).view(N, C, 1, 1),
    "gate in place": lambda x: (x + 0).mul_(torch.rand(1, C, 1, 1, dtype=torch.float64)),
    "reversed": lambda x: torch.rand(C, 1, 1, dtype=torch.float64) - x,
    "sum with itself": lambda x: x + x.relu(),
    "pad": lambda x: F.pad(x, (1, 0, 2, 1)),
    "pad by nothing": lambda x: F.pad(x, (0, 0, 0, 0)),
    "reflect": lambda x: F.pad(x, (1, 1, 2, 1), mode="reflect"),
    "crop": lambda x: F.pad(x, (-1, 0, 0, -2)),
    "max pool": nn.MaxPool2d(3, 2, 1),
    "average pool": nn.AvgPool2d(3, 2, 1),
    "average pool, ceil": nn.AvgPool2d(2, 2, ceil_mode=True, count_include_pad=False),
    "adaptive": nn.AdaptiveAvgPool2d(2),
    "cat": lambda x: torch.cat([x, torch.ones(N, 2, H, W, dtype=x.dtype), x * 2], dim=1),
    "chunk": lambda x: torch.cat([c * i for i, c in enumerate(x.chunk(2, dim=1), 1)], 1),
    "drop path": DropPath(0.5),
    "dropout, eval": nn.Dropout(0.5).eval(),
    "layer scale": lambda x: x.mul(torch.rand(C, 1, 1, dtype=x.dtype)),
    "1x1": lambda x: kept_conv(nn.Conv2d(C, 8, 1))(x),
    "1x1, stride": lambda x: kept_conv(nn.Conv2d(C, 8, 1, stride=2))(x),
    "1x1, stride down": lambda x: kept_conv(nn.Conv2d(C, 8, 1, (3, 1), "valid", bias=False))(x),
    "3x3": lambda x: kept_conv(nn.Conv2d(C, 8, 3, stride=2, padding=1))(x),
    "dilated": lambda x: kept_conv(nn.Conv2d(C, 8, 3, padding=(3, 2), dilation=2))(x),
    "1x3": lambda x: kept_conv(nn.Conv2d(C, 8, (1, 3), padding=(2, 0), bias=False))(x),
    "same": lambda x: kept_conv(nn.Conv2d(C, 8, (2, 4), padding="same"))(x),
    "timm's same": lambda x: kept_conv(Conv2dSame(C, 8, 3, stride=2))(x),
    "reflected": lambda x: kept_conv(nn.Conv2d(C, 8, 3, padding=1, padding_mode="reflect"))(x),
    "grouped": lambda x: kept_conv(nn.Conv2d(C, 8, 3, padding=1, groups=4))(x),
    "depthwise": lambda x: kept_conv(nn.Conv2d(C, C, 3, padding=1, groups=C))(x),
    "depthwise, stride": lambda x: kept_conv(nn.Conv2d(C, C, 5, 2, 2, groups=C))(x),
    "depthwise, unpadded": lambda x: kept_conv(nn.Conv2d(C, C, 3, groups=C, bias=False))(x),
    "depthwise, one": lambda x: kept_conv(nn.Conv2d(C, C, 3, 1, 1, groups=C), (5,))(x),
    "multiplied": lambda x: kept_conv(nn.Conv2d(C, 3 * C, 3, groups=C), (1, 8, 22, 23, 30))(x),
    "two in a row": lambda x: kept_conv(nn.Conv2d(8, 8, 3, padding=1))(
        F.silu(kept_conv(nn.Conv2d(C, 8, 3, padding=1), (1, 2, 7))(x))
    ),
}
TURNS_DENSE = {
    "add dense": lambda x: x + torch.ones(N, C, H, W, dtype=x.dtype),
    "dense add": lambda x: torch.ones(N, C, H, W, dtype=x.dtype) + x,
    "subtract from dense": lambda x: torch.ones(N, C, H, W, dtype=x.dtype) - x,
    "dense add_": lambda x: torch.ones(N, C, H, W, dtype=x.dtype).add_(x),
    "larger": lambda x: x[:1] + torch.ones(N, C, H, W, dtype=x.dtype),
    "all filters": lambda x: nn.Conv2d(C, 8, 3, padding=1, dtype=x.dtype)(x),
    "global": nn.AdaptiveAvgPool2d(1),
    "mean": lambda x: x.mean((2, 3)),
    "mean, keepdim": lambda x: torch.mean(x, dim=[-1, -2], keepdim=True),
    "amax": lambda x: x.amax(dim=(2, 3)),
    "softmax": lambda x: x.softmax(1),
    "flatten": lambda x: x.flatten(1),
    "unknown in place": lambda x: (x + 0).cumsum_(1),
    "item": lambda x: torch.where(x > 0, x, 0 * x),
    "dropout": nn.Dropout(0.5),
    "interpolate": lambda x: F.interpolate(x, scale_factor=2),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", STAYS_SLIM)
def test_on_parts(name, form, caplog):
    _already_logged.clear()
    with caplog.at_level(logging.INFO, logger="sacl_fast"):
        assert isinstance(agree(STAYS_SLIM[name], form), SlimTensor)
    assert not caplog.records


@pytest.mark.parametrize("form", ["constant", "map", "by_sample"])
@pytest.mark.parametrize("name", TURNS_DENSE)
def test_made_dense(name, form):
    agree(TURNS_DENSE[name], form)


def test_different_live_channels():
    others = activation("map", seed=3)[0].parts

    def add(x):
        return x + SlimTensor(others, x.shape) if isinstance(x, SlimTensor) else x + dense_other

    dense_other = SlimTensor(others, torch.Size((N, C, H, W))).dense()
    out = agree(add, "constant")
    assert len(out.parts[0].channels) > 4


def test_in_place_operations_reach_other_references():
    def forward(x):
        same = x = x + 0
        x.neg_()
        x += torch.ones(N, C, H, W, dtype=x.dtype)
        x *= 2
        return same

    agree(forward, "map")


def test_an_operation_s_result_has_its_own_memory():
    for function in (F.max_pool2d, F.pad):

        def forward(x, function=function):
            out = function(x, 3 if function is F.max_pool2d else (1, 1))
            out.relu_()
            return x.sum() + out.sum()

        agree(forward, "constant")
    agree(lambda x: torch.cat([x, x.new_zeros(N, 1, H, W)], 1).relu_().sum() + x.sum(), "constant")


@pytest.mark.parametrize("form", FORMS)
def test_squeeze_excite(form):
    block = SqueezeExcite(C, rd_channels=3).double()
    assert isinstance(agree(lambda x: block(x), form), SlimTensor)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "options",
    [{}, {"momentum": None}, {"affine": False}, {"track_running_stats": False}],
    ids=["default", "cumulative", "no affine", "no statistics"],
)
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("kind", [nn.BatchNorm2d, BatchNormAct2d])
def test_batch_norm(kind, training, options, form):
    torch.manual_seed(5)
    norm = kind(C, **options).double().train(training)
    if norm.affine:
        nn.init.normal_(norm.weight)
        nn.init.normal_(norm.bias)
    if norm.running_mean is not None:
        norm.running_mean.normal_()
        norm.running_var.uniform_(0.5, 2)
    norms = [norm, copy.deepcopy(norm)]
    remaining = list(norms)

    def forward(x):
        return remaining.pop(0)(x)

    assert isinstance(agree(forward, form), SlimTensor)
    for a, b in zip(norms[0].buffers(), norms[1].buffers(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


def test_one_line_for_each_operation(caplog):
    _already_logged.clear()
    x, _ = activation("constant")
    with caplog.at_level(logging.INFO, logger="sacl_fast"):
        for _ in range(3):
            x.cumsum(1)
            x.flip(1)
    assert ["cumsum" in r.message or "flip" in r.message for r in caplog.records] == [True] * 2


def test_what_a_tensor_says_of_itself():
    x, _ = activation("map")
    assert isinstance(x, torch.Tensor) and x.requires_grad
    assert x.shape == (N, C, H, W) and x.size(1) == C and x.ndim == x.dim() == 4
    assert x.dtype == torch.float64 and x.device.type == "cpu" and len(x) == N
    assert x.contiguous() is x and x.double() is x and x.to("cpu") is x
    assert not x.detach().requires_grad and x.float().dtype == torch.float32
    assert "map" not in repr(x) and "SlimTensor" in repr(x)
    assert x.new_empty((2,)).shape == (2,)
