"""The lists of operations agree with one another and with torch."""

import operator

import pytest
import torch
from torch import nn

from sacl_fast.slim import operations
from sacl_fast.slim.rules import RULES
from sacl_fast.slim.rules.registry import forms


@pytest.mark.parametrize("name", [*operations.ELEMENTWISE, *operations.ARITHMETIC])
def test_every_name_is_a_function_of_torch_with_a_rule(name):
    found = list(forms(name))
    assert found
    assert all(function in RULES for function in found)


def test_every_activation_that_is_a_module_too_is_in_both_lists():
    modules = {m.__name__.lower(): m for m in vars(nn).values() if isinstance(m, type)}
    named = {name.replace("_", "") for name in operations.ACTIVATIONS}
    assert {modules[name] for name in named if name in modules} == set(
        operations.ACTIVATION_MODULES
    )


@pytest.mark.parametrize(
    ("function", "name", "in_place"),
    [
        (torch.add, "add", False),
        (operator.add, "add", False),
        (operator.iadd, "add", True),
        (torch.Tensor.sub_, "sub", True),
        (operator.truediv, "div", False),
        (operator.itruediv, "div", True),
        (torch.true_divide, "true_divide", False),
        (torch.Tensor.__imul__, "mul", True),
        (operator.pow, "pow", False),
        (operator.floordiv, None, False),
        (torch.Tensor.relu_, None, True),
        (torch.Tensor.__len__, None, False),
    ],
)
def test_names_of_arithmetic(function, name, in_place):
    assert operations.arithmetic(function.__name__) == name
    assert operations.is_in_place(function.__name__) == in_place
