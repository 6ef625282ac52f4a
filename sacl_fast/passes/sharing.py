"""Gradients of parameters that two passes of a step have in common, added up at once.

Autograd adds them one by one, in an operator for each parameter: 81 of a MobileNet-V1. Here the
second pass is given a token of the first one, so that its backward comes before; what it leaves
there for the first one's parameters, that one adds to its own gradients, in one operator for all.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


class SharedGradients:
    """Brings the two passes together: the first one gives, the second one takes."""

    def __init__(self) -> None:
        self._first: tuple[Shared, Tensor] | None = None

    def give(self, shared: Shared, token: Tensor) -> None:
        self._first = shared, token

    def taken(self) -> tuple[Shared | None, Tensor | None]:
        """Of a first pass that no second one has taken up yet."""
        first, self._first = self._first, None
        return first or (None, None)

    def forget(self) -> None:
        """The next pass is a first one. (A token keeps the activations of its pass.)"""
        self._first = None


class Shared:
    """Of a first pass: its parameters, and what the second one has left for them."""

    def __init__(self, leaves: Sequence[Tensor]) -> None:
        self._leaves = leaves
        self._numbers = {id(leaf): i for i, leaf in enumerate(leaves)}
        self._left: dict[int, Tensor] = {}

    def leave(
        self, leaves: Sequence[Tensor], gradients: Sequence[Tensor | None]
    ) -> list[Tensor | None]:
        """Takes the gradients of parameters that the first pass has; gives those that are left."""
        own = list(gradients)
        for i, leaf in enumerate(leaves):
            number, gradient = self._numbers.get(id(leaf)), own[i]
            if number is not None and gradient is not None:
                self._left[number], own[i] = gradient, None
        return own

    def add(self, gradients: Sequence[Tensor | None]) -> list[Tensor | None]:
        """The first pass's own gradients and those that were left, together."""
        left, self._left = self._left, {}
        own = [left.pop(i, None) if g is None else g for i, g in enumerate(gradients)]
        both = [(g, left[i]) for i, g in enumerate(own) if g is not None and i in left]
        if both:
            torch._foreach_add_(*map(list, zip(*both, strict=True)))
        return own

    def no_gradient(self) -> Tensor:
        """Of the token."""
        return self._leaves[0].new_zeros(())
