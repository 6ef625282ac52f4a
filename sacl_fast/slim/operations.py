"""The names of operations that act value by value, and those that only ask what a tensor is.

The rules of slim activations (``slim.rules``) and the export (``slim.export``) treat the same
operations alike, so their names stand here once. A name is that of every form in which torch has
the function: ``relu`` of ``torch.relu``, ``F.relu``, ``Tensor.relu``; with ``_`` at its end it is
the one that changes its operand.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

ACTIVATIONS = """
    relu relu6 leaky_relu elu selu celu gelu silu mish hardtanh hardswish hardsigmoid
    sigmoid logsigmoid tanh tanhshrink softplus softsign softshrink hardshrink threshold
""".split()
FUNCTIONS = """
    abs neg negative exp expm1 log log1p sqrt rsqrt square reciprocal erf sin cos clamp clamp_min
    clamp_max clip nan_to_num round floor ceil sign positive
""".split()
ELEMENTWISE = (*ACTIVATIONS, *FUNCTIONS)
"""Of one operand."""

ACTIVATION_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.Sigmoid, nn.LogSigmoid, nn.Tanh),
    *(nn.Tanhshrink, nn.Softplus, nn.Softsign, nn.Softshrink, nn.Hardshrink, nn.Threshold),
)
"""The modules of ``ACTIVATIONS``."""
IDENTITY_MODULES: tuple[type[nn.Module], ...] = (
    *(nn.Identity, nn.Dropout, nn.Dropout2d, nn.AlphaDropout),
)
"""Those that change nothing in eval mode."""

COPIES = "clone detach contiguous float double half bfloat16 to".split()
"""The same values, in other memory or in another type."""

ARITHMETIC: dict[str, Callable[[Any, Any], Any]] = {
    **{"add": operator.add, "sub": operator.sub, "subtract": operator.sub},
    **{"mul": operator.mul, "multiply": operator.mul},
    **{"div": operator.truediv, "divide": operator.truediv, "true_divide": operator.truediv},
    **{"maximum": torch.maximum, "minimum": torch.minimum, "pow": operator.pow},
}
"""Of two operands: name -> a function for tensors and numbers alike."""
_OPERATORS = {"add": "add", "sub": "sub", "mul": "mul", "truediv": "div", "pow": "pow"}
"""Python's name -> torch's."""
BETWEEN = (*(f"__{name}__" for name in _OPERATORS), "__div__")
"""Methods behind ``x + y`` and the like."""
REVERSED = (*(f"__r{name}__" for name in _OPERATORS), "__rdiv__", "rsub")
"""Methods behind ``2 + y`` and the like."""
IN_PLACE: dict[str, str] = {
    **{f"{name}_": name for name in ARITHMETIC},
    **{f"__i{name}__": torchs for name, torchs in _OPERATORS.items()},
    "__idiv__": "div",
}
"""Name of what changes its first operand -> name of the same without."""


def arithmetic(name: str) -> str | None:
    """torch's name of an arithmetic function, given also in place (``add_``) or as Python has it
    (``truediv``, ``iadd``); None for any other name."""
    name = IN_PLACE.get(name) or IN_PLACE.get(f"__{name}__") or _OPERATORS.get(name, name)
    return name if name in ARITHMETIC else None


def is_in_place(name: str) -> bool:
    """Whether the function of this name, of whatever kind, changes its first operand."""
    if name in IN_PLACE or f"__{name}__" in IN_PLACE:  # iadd is of Python's module operator
        return True
    return name.endswith("_") and not name.endswith("__")


METADATA: set[Callable[..., Any]] = {
    *(
        getattr(Tensor, name).__get__
        for name in """
            shape dtype device layout ndim itemsize is_cuda is_sparse is_quantized is_meta is_mkldnn
            is_nested requires_grad is_leaf grad_fn grad
        """.split()
    ),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.element_size),
    *(torch.is_floating_point, torch.is_complex, torch.numel, Tensor.__hash__),
    # Autograd's; the hooks' it uses itself, where a function has changed its input in place.
    *(
        Tensor.backward,
        torch.autograd.backward,
        torch.autograd.grad,
        Tensor._backward_hooks.__set__,  # pyright: ignore
    ),
}
"""Functions that ask a tensor what it is, not for its values."""
