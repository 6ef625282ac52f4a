"""A ``torch.autograd.Function`` that is given slim tensors: no gradient is lost, none is wrong.

Functions take tensors past ``__torch_function__`` and compute without gradient, in whatever style
they are written. Each model here is compared with itself in mode ``mask``.
"""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd import Function
from torch.nn.grad import conv2d_input, conv2d_weight
from torch.utils.checkpoint import checkpoint

from sacl_fast.slim import Slicer
from sacl_fast.slim.slicer import Mode
from tests.slim.test_skip import assert_equal, observe


class Square(Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient * ctx.saved_tensors[0]


class Scaled(Function):
    """In the newer style, with a default and something other than a tensor."""

    @staticmethod
    def forward(x, factor=2.0, unused=None):
        return x * factor, x.mean((2, 3))

    @staticmethod
    def setup_context(ctx, inputs, output):
        x, ctx.factor, _ = inputs
        ctx.size = x.shape[2] * x.shape[3]

    @staticmethod
    def backward(ctx, gradient, of_mean):
        return gradient * ctx.factor + of_mean[:, :, None, None] / ctx.size, None, None


class InPlace(Function):
    @staticmethod
    def forward(ctx, x):
        x.mul_(3)
        ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, gradient):
        return 3 * gradient


class Identity(Function):
    """Gives back what it is given, with twice the gradient."""

    @staticmethod
    def forward(ctx, x):
        return x

    @staticmethod
    def backward(ctx, gradient):
        return 2 * gradient


class Viewed(Function):
    @staticmethod
    def forward(ctx, x):
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient):
        return -gradient


class Convolution(Function):
    """Takes a weight, too."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, padding=1)

    @staticmethod
    def backward(ctx, gradient):
        x, weight = ctx.saved_tensors
        return (
            conv2d_input(x.shape, weight * 1, gradient, padding=1),
            conv2d_weight(x * 1, weight.shape, gradient, padding=1),
        )


class Given(nn.Module):
    """Convolutions and norms, with a function of tensors (``self``, x) in between."""

    def __init__(self, middle) -> None:
        super().__init__()
        self.first, self.norm = nn.Conv2d(3, 12, 3, padding=1), nn.BatchNorm2d(12)
        self.second = nn.Conv2d(12, 12, 3, padding=1, bias=False)
        self.last, self.last_norm = nn.Conv2d(12, 8, 1), nn.BatchNorm2d(8)
        self.middle = middle

    def forward(self, x):
        x = self.middle(self, self.first(x))
        return self.last_norm(self.last(x)).relu()


def _reused(model, x):
    """The same tensor before, in and after functions."""
    normed = model.norm(x)
    twice = normed + Square.apply(normed)
    return twice * normed + F.relu(normed) + Square.apply(normed)


def _changed_without_gradient(model, x):
    normed = model.norm(x) * 1
    with torch.no_grad():
        normed += 1
        other = normed.relu()
    return model.second(normed) + other


def _looked_at_without_gradient(model, x):
    """What a norm has left undone is done without gradient, and then used with."""
    normed = model.norm(x)
    with torch.no_grad():
        normed.relu()
        scale = normed.abs().amax()
    return model.second(normed) / scale


def _a_leaf_of_its_own(model, x):
    y = model.norm(x).detach().requires_grad_()
    (gradient,) = torch.autograd.grad((y * y).sum(), y)
    return x * gradient


MIDDLES = {
    "after a convolution": lambda model, x: Square.apply(x),
    "after a norm": lambda model, x: Square.apply(model.norm(x)),
    "after an activation": lambda model, x: Square.apply(F.silu(model.norm(x))),
    "after one in place": lambda model, x: Square.apply(F.relu(model.norm(x), inplace=True)),
    "after a change in place": lambda model, x: Square.apply((model.norm(x) * 1).add_(x).mul_(2)),
    "twice": lambda model, x: Square.apply(Square.apply(model.norm(x))),
    "setup_context": lambda model, x: sum(
        part if part.ndim == 4 else part[:, :, None, None] for part in Scaled.apply(model.norm(x))
    ),
    "in place": lambda model, x: InPlace.apply(model.norm(x) * 1),
    "in place, then on": lambda model, x: model.second(InPlace.apply(model.norm(x) * 1)).relu(),
    "gives back its input": lambda model, x: Identity.apply(model.norm(x)),
    "gives back a view": lambda model, x: Viewed.apply(model.norm(x)),
    "takes a weight": lambda model, x: Convolution.apply(model.norm(x), model.second.weight),
    "reused": _reused,
    "changed without gradient": _changed_without_gradient,
    "looked at without gradient": _looked_at_without_gradient,
    "a leaf of its own": _a_leaf_of_its_own,
}


def made(middle) -> tuple[Given, Given, torch.Tensor]:
    """The model, a copy of it, and images."""
    torch.manual_seed(0)
    model = Given(middle).double()
    nn.init.uniform_(model.norm.bias)
    return model, copy.deepcopy(model), torch.randn(3, 3, 6, 5, dtype=torch.float64)


@pytest.mark.parametrize("middle", MIDDLES.values(), ids=MIDDLES)
def test_no_gradient_is_lost(middle):
    model, twin, x = made(middle)
    dense = copy.deepcopy(model)
    dense(x).sum().backward()
    unused = {n.partition(".")[0] for n, p in dense.named_parameters() if p.grad is None}
    assert_equal(
        observe(model, Slicer(model, 0.5), "skip", x, unused=unused),
        observe(twin, Slicer(twin, 0.5), "mask", x, unused=unused),
    )


def test_what_is_recomputed_in_backward():
    """In the mode: what is recomputed is the encoder as it is by then."""

    def middle(model, x):
        return checkpoint(lambda y: model.second(y).relu(), model.norm(x), use_reentrant=True)

    model, twin, x = made(middle)
    results = []
    ways: list[tuple[Given, Mode]] = [(model, "skip"), (twin, "mask")]
    for each, mode in ways:
        with Slicer(each, 0.5).mode(mode):
            each(x).square().sum().backward()
        # The masked weights that are in the place of the second's own have no way back to them.
        own = {n: p for n, p in each.named_parameters() if not n.startswith("second")}
        results.append({f"grad.{n}": p.grad for n, p in own.items()})
    assert_equal(*results)


def test_nothing_of_torch_is_replaced():
    apply = Function.__dict__["apply"]

    def middle(model, x):
        assert Function.__dict__["apply"] is apply
        return Square.apply(x)

    model = Given(middle)
    with Slicer(model, 0.5).mode("skip"):
        model(torch.randn(2, 3, 5, 5)).sum().backward()
    assert model.first.weight.grad.abs().sum() > 0


def test_a_second_derivative_is_refused():
    model = Given(MIDDLES["after a norm"]).double()
    x = torch.randn(2, 3, 5, 5, dtype=torch.float64, requires_grad=True)
    with Slicer(model, 0.5).mode("skip"):
        out = model(x)
    (gradient,) = torch.autograd.grad(out.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
