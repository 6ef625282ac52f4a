"""The new graph of a smaller encoder: activations in three, and the nodes that are added to it."""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from sacl_fast.slim.channels import Channels, all_channels, channels

_FIRST_CHANNEL = (slice(None), slice(0, 1))
_FIRST_OF_ALL = (slice(0, 1), slice(0, 1))


@dataclass(frozen=True, eq=False)
class SplitActivation:
    """An activation of C channels in the new graph: live ones, constants, constants by sample."""

    count: int
    live: Channels
    node: fx.Node  # (N, K, H, W)
    constant: Channels
    value: Tensor  # (1, R, 1, 1)
    varying: Channels = all_channels(0)  # noqa: RUF009 - one and the same object
    by_sample: fx.Node | None = None  # (1 or N, S, 1, 1)

    def constants(self, chosen: np.ndarray) -> Tensor:
        """Some of the constants (1, R', 1, 1)."""
        return self.value[:, index_of(_positions(self.constant, channels(chosen), self.count))]


class GraphWriter:
    """A graph and the modules and tensors that it names."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.graph = fx.Graph()
        self.root = nn.Module()
        self._added = 0

    def module(self) -> nn.Module:
        """What has been written, in eval mode."""
        written = fx.GraphModule(self.root, self.graph, "CompactEncoder")
        written.graph.eliminate_dead_code()
        written.delete_all_unused_submodules()
        written.recompile()
        return written.eval()

    # --- nodes ----------------------------------------------------------------------------------

    def apply(self, function: Any, *args: Any, **kwargs: Any) -> fx.Node:
        return self.graph.call_function(function, args, kwargs)

    def call(self, module: nn.Module, x: fx.Node) -> fx.Node:
        """A module that the encoder does not have, under a new name."""
        name = self._new_name("layer")
        self.root.add_module(name, module)
        return self.graph.call_module(name, (x,))

    def constant(self, value: Tensor, kind: str = "constant") -> fx.Node:
        name = self._new_name(kind)
        if isinstance(value, nn.Parameter):
            self.root.register_parameter(name, value)
        else:
            self.root.register_buffer(name, value.to(self.device))
        return self.graph.get_attr(name)

    def keep(self, name: str, module: nn.Module) -> None:
        """A module of the encoder, under its own name."""
        *parents, last = name.split(".")
        where = self.root
        for parent in parents:
            if not hasattr(where, parent):
                where.add_module(parent, nn.Module())
            where = where.get_submodule(parent)
        where.add_module(last, module)

    def _new_name(self, kind: str) -> str:
        self._added += 1
        return f"{kind}_{self._added}"

    # --- channels -------------------------------------------------------------------------------

    def whole(self, x: Any) -> Any:
        """All channels (N, C, H, W) of what may be an activation in three."""
        return self.select(x, all_channels(x.count)) if isinstance(x, SplitActivation) else x

    def select(self, x: SplitActivation, chosen: Channels) -> fx.Node:
        """Some channels (N, K, H, W) of an activation, live or not."""
        held, node = x.live, x.node
        if not np.isin(chosen.numbers, held.numbers).all():
            rest = [self.constant(x.value)] if len(x.constant) else []
            if x.by_sample is not None:
                rest.append(x.by_sample)
            held = channels([*x.live.numbers, *x.constant.numbers, *x.varying.numbers])
            node = self.cat_expanded([node, *rest])
        return self.select_node(node, _positions(held, chosen, x.count), len(held))

    def select_node(self, node: fx.Node, positions: Channels, count: int) -> fx.Node:
        """Those of a node's ``count`` channels that stand at some positions."""
        if positions.in_order and len(positions) == count:
            return node
        index = self.constant(index_of(positions), "index")
        return self.graph.call_method("index_select", (node, 1, index))

    def cat_expanded(self, nodes: list[fx.Node]) -> fx.Node:
        """Channels joined, all for the samples and pixels of the first."""
        first = self.apply(operator.getitem, nodes[0], _FIRST_CHANNEL)
        ones = self.apply(torch.ones_like, first)
        rest = [self.apply(operator.mul, ones, n) for n in nodes[1:]]
        return self.apply(torch.cat, [nodes[0], *rest], 1)

    def image_of_ones(self, x: fx.Node) -> fx.Node:
        """(1, 1, H, W) for (N, C, H, W): cut from it, so that it has its size, whatever that is."""
        return self.apply(torch.ones_like, self.apply(operator.getitem, x, _FIRST_OF_ALL))


def index_of(numbers: Channels) -> Tensor:
    return torch.from_numpy(numbers.numbers.copy())


def _positions(held: Channels, chosen: Channels, count: int) -> Channels:
    """Where in a list of channels the chosen ones stand."""
    position = np.full(count, -1)
    position[held.numbers] = np.arange(len(held))
    return channels(position[chosen.numbers])
