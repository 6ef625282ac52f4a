"""The operators of a recorded pass, as a graph of ``torch.fx`` with where its tensors come from."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, fx

Fusion = Literal["none", "around", "all"]
"""Which operators take part of a batch norm's work: none; those around the 1x1 convolutions, which
stay the library's (depthwise convolutions, means, gates, sums); or these convolutions as well."""

Source = fx.Node | int
"""Where an operator has a tensor from: a node's result, or the external tensor of that number."""


class Form(NamedTuple):
    """What a recorded tensor looks like."""

    shape: torch.Size
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, tensor: Tensor) -> Form:
        return cls(tensor.shape, tensor.dtype, tensor.device)


class Graph:
    """The operators of one direction, and where they have tensors from that none of them made."""

    def __init__(self) -> None:
        self.fx = fx.Graph()
        self.inputs: dict[Source, fx.Node] = {}

    def read(self, source: Source, form: Form | None = None) -> fx.Node:
        if isinstance(source, fx.Node) and source.graph is self.fx:
            return source
        if source not in self.inputs:
            self.inputs[source] = self.fx.placeholder(f"x{len(self.inputs)}")
            self.inputs[source].meta["form"] = form
        return self.inputs[source]
