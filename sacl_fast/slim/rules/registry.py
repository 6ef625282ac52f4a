"""Which rule a PyTorch function has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

_Rule = TypeVar("_Rule", bound=Callable[..., Any])
_NAMESPACES = (torch, F, Tensor, torch._C._nn, torch._C._VariableFunctions)  # type: ignore[attr-defined]

RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
"""Function -> rule. Filled when ``slim.rules`` is imported, and never changed after."""


def rule_for(*functions: str | Callable[..., Any]) -> Callable[[_Rule], _Rule]:
    """Registers a rule for functions, or for all of these names, wherever torch has them."""

    def register(rule: _Rule) -> _Rule:
        for function in functions:
            for form in forms(function) if isinstance(function, str) else (function,):
                RULES[form] = rule
        return rule

    return register


def forms(name: str) -> Iterator[Callable[..., Any]]:
    """All of torch's functions of a name: ``torch.relu``, ``F.relu``, ``Tensor.relu``."""
    for namespace in _NAMESPACES:
        if (function := getattr(namespace, name, None)) is not None:
            yield function
