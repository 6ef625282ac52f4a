"""A recorded pass, rewritten so that no batch norm stores its output.

``fuse`` goes through the operators of a recording, forward and then backward, and writes them anew.
What a norm would give is not computed but remembered as an ``_Operand``, its raw input with what
normalises it; the convolution that reads it does that as it loads (``ops.norm_act`` has the
algebra, ``norm_pointwise`` and ``norm_depthwise`` the convolutions). Backward, the gradient of a
norm's input is remembered as an ``_InputGradient``, and formed where it is read.

A rule for each operator says what becomes of it (``rules``). An operator without one, or
that its rule does not fit, is copied, and what it reads is computed first: so whatever a model does
stays right.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import fx
from torch.fx.node import map_arg

from sacl_fast.passes.graph import Form, Fusion, Graph, Source

_ops, _aten = torch.ops.sacl_fast, torch.ops.aten


# --- values that are not computed yet ---------------------------------------------------------


@dataclass(eq=False)
class Norm:
    """A norm of which only the statistics are computed; (4, K), see ``norm_act``."""

    raw: fx.Node
    affine: fx.Node
    act: int


@dataclass(eq=False)
class Operand:
    """The output of a norm with its activation, and a gate (N, K): ``norm_act.operand``."""

    norm: Norm
    gate: fx.Node | None = None
    computed: list[fx.Node] = field(default_factory=list)


@dataclass(eq=False)
class BeforeActivation:
    """The gradient of a norm's output before the activation, which only its backward reads."""

    g: fx.Node
    gsums: fx.Node


@dataclass(eq=False)
class InputGradient:
    """The gradient of a norm's input: ``norm_act.input_gradient``."""

    g: fx.Node
    y: fx.Node
    coefficients: fx.Node
    computed: list[fx.Node] = field(default_factory=list)


@dataclass(eq=False)
class Gated:
    """The gradient ``dy * gate + dmean / (H W)`` of what was gated (N, K, H, W); gate and dmean
    (N, K), and of dy (N, K or more, H, W) the first K channels."""

    dy: fx.Node
    gate: fx.Node
    shape: torch.Size
    dmean: fx.Node | None = None


@dataclass(eq=False)
class OfMean:
    """What ``recorded`` gives: at each pixel, that of the mean (N, K, 1, 1) over all."""

    dmean: fx.Node
    recorded: fx.Node


@dataclass(eq=False)
class Zeros:
    """A gradient that is 0."""

    form: Form


@dataclass(eq=False)
class Rows:
    """Some rows of a weight (Cout, ...), and zeros after them."""

    of: fx.Node
    index: fx.Node
    zeros: int = 0
    computed: list[fx.Node] = field(default_factory=list)


class Convolution(NamedTuple):
    """A convolution that is fused, by what the rules of the norm after it have to know."""

    sums: fx.Node
    shift: fx.Node | None = None
    """(O,), of constants that the norm takes away again."""
    border: Sequence[int] = ()
    """Of the map that was added, see ``norm_act_offset_gradient``."""


# --- writing ----------------------------------------------------------------------------------


class Fused(NamedTuple):
    """A pass as ``fuse`` gives it."""

    forward: Graph
    backward: Graph
    out: Source
    gradients: list[Source | None]
    norms: int
    """Norms whose output is not stored by them."""


def fuse(
    forward: Graph,
    backward: Graph,
    out: Source,
    gradients: Sequence[Source | None],
    batch: int,
    fusion: Fusion,
) -> Fused:
    """The same pass with batch norms fused into their neighbours.

    Args:
        forward, backward: of a recording, without their outputs.
        out: the pass's result.
        gradients: of the input and the parameters, None where nothing wants one.
        batch: samples. With a single one, what is the same for all samples cannot be told from an
            activation, and nothing is fused.
        fusion: whether 1x1 convolutions take part.
    """
    writer = Writer((forward, backward), {out, *gradients}, batch, fusion)
    writer.run(forward)
    result = writer.source(out)
    writer.add_up()
    writer.graph = writer.graphs[1]
    writer.run(backward)
    writer.add_up()
    found = [None if g is None else writer.source(g) for g in gradients]
    return Fused(*writer.graphs, result, found, writer.norms)


class Writer:
    """Writes the operators of the old graphs into new ones, by their rules."""

    def __init__(
        self, old: tuple[Graph, Graph], results: set[Source | None], batch: int, fusion: Fusion
    ) -> None:
        self.old, self.results, self.batch = old, results, batch
        self.products = fusion == "all"
        """Whether 1x1 convolutions take part."""
        self.needed = _needed(old, results)
        self._sources = {node: source for source, node in old[1].inputs.items()}
        self.graphs = Graph(), Graph()
        self.graph = self.graphs[0]
        """The one that is being written."""
        self.values: dict[fx.Node, Any] = {}
        """Old node -> its new one, the number of an external tensor, a value that is not computed
        yet, or a tuple of these."""
        self.convolutions: dict[fx.Node, Convolution] = {}
        """By their output."""
        self.norm_of: dict[fx.Node, Norm] = {}
        """By the mean that it gives."""
        self.done: dict[fx.Node, Any] = {}
        """Old nodes whose value another's rule has given."""
        self.counters: list[fx.Node] = []
        """Norms' counters, to which 1 is added at the end of the pass."""
        self.sums: dict[fx.Node, fx.Node] = {}
        """Gradient -> what is added to it at the end of the pass."""
        self.gate_gradients: dict[fx.Node, fx.Node] = {}
        """By the gradient of what was gated."""
        self.full: set[fx.Node] = set()
        """Gradients of whole weights, though only some filters were used."""
        self.chains: dict[fx.Node, tuple[Any, ...]] = {}
        """An offset that ``slim_border`` gave -> what its backward is given."""
        self.precise: dict[fx.Node, fx.Node] = {}
        """What was rounded to the activations' type -> what it was in float32."""
        self.norms = 0

    def run(self, old: Graph) -> None:
        import sacl_fast.passes.rules  # noqa: F401  (with them are the operators, which may be absent)

        for source, node in old.inputs.items():
            self.values[node] = source if isinstance(source, int) else self.values[source]
        for node in old.fx.nodes:
            if node.op == "placeholder" or node not in self.needed:
                continue
            if node.target is operator.getitem:
                of: Any = node.args[0]
                i: Any = node.args[1]
                given = self.values[of]
                self.values[node] = given[i] if isinstance(given, tuple) else self.copy(node)
            else:
                rule = RULES.get(node.target)
                value = rule(self, node, *node.args) if rule else NotImplemented
                self.values[node] = self.copy(node) if value is NotImplemented else value

    def source(self, old: Source) -> Source:
        """Where a result of the old graphs is found now."""
        if isinstance(old, int):
            return old
        value = self.values[old]
        return value if isinstance(value, int) else self._computed(value)

    # what is written

    def copy(self, old: fx.Node) -> fx.Node:
        return self.graph.fx.node_copy(old, self.read)

    def emit(self, target: Any, *arguments: Any, **named: Any) -> fx.Node:
        """An operator on new nodes, of either graph."""
        overload = target if isinstance(target, torch._ops.OpOverload) else target.default
        given = map_arg(arguments, self.graph.read)
        return self.graph.fx.call_function(overload, given, named)

    def outputs(self, count: int, target: Any, *arguments: Any) -> tuple[fx.Node, ...]:
        """Of an operator that gives several."""
        made = self.emit(target, *arguments)
        items = (self.graph.fx.call_function(operator.getitem, (made, i)) for i in range(count))
        return tuple(items)

    def add_up(self) -> None:
        """Write the additions that were put off: counters of norms, sums of gradients."""
        if self.counters:
            self.emit(_aten._foreach_add_.Scalar, self.counters, 1)
        if self.sums:
            self.emit(_aten._foreach_add_.List, list(self.sums), list(self.sums.values()))
        self.counters, self.sums = [], {}

    def view(self, x: fx.Node, *shape: int) -> fx.Node:
        return self.emit(_aten.view, x, list(shape))

    def cast(self, x: fx.Node, own: torch.dtype, wanted: torch.dtype) -> fx.Node:
        return x if own == wanted else self.emit(_aten._to_copy, x, dtype=wanted)

    # what is read

    def value(self, old: Any) -> Any:
        return self.values[old] if isinstance(old, fx.Node) else old

    def read(self, old: Any) -> Any:
        """The node, in the graph that is written, that has an old node's value; None and numbers
        as they are."""
        if not isinstance(old, fx.Node):
            return old
        value = self.values[old]
        return self.graph.read(value if isinstance(value, int) else self._computed(value))

    def operand(self, old: fx.Node) -> tuple[Any, ...]:
        """raw, affine, act and gate of what a convolution reads."""
        value = self.values[old]
        if isinstance(value, Operand) and not value.computed:
            return value.norm.raw, value.norm.affine, value.norm.act, value.gate
        return self.read(old), None, 0, None

    def _computed(self, value: Any) -> fx.Node:
        """The node that has a value, which is computed now if need be."""
        if isinstance(value, Operand):
            if not value.computed:
                norm = value.norm.raw, value.norm.affine, value.norm.act
                y = self.emit(_ops.norm_act_apply, *norm, None, None, 0)
                value.computed.append(y if value.gate is None else self._times(y, value.gate))
            return value.computed[0]
        if isinstance(value, InputGradient):
            if not value.computed:
                given = value.g, value.y, value.coefficients
                value.computed.append(self.emit(_ops.norm_act_input_gradient, *given))
            return value.computed[0]
        if isinstance(value, Gated):
            _, K, H, W = value.shape
            own = self.emit(_aten.slice.Tensor, value.dy, 1, 0, K)
            dx = self._times(own, value.gate)
            if value.dmean is None:
                return dx
            share = self.emit(_aten.div.Scalar, value.dmean, H * W)
            return self.emit(_aten.add.Tensor, dx, self._per_image(share))
        if isinstance(value, OfMean):
            return self.copy(value.recorded)
        if isinstance(value, Rows):
            if not value.computed:
                rows = self.emit(_aten.index_select, value.of, 0, value.index)
                pad = [0, 0, 0, 0, 0, value.zeros]
                rows = self.emit(_aten.constant_pad_nd, rows, pad) if value.zeros else rows
                value.computed.append(rows)
            return value.computed[0]
        if isinstance(value, Zeros):
            shape, dtype, device = value.form
            return self.emit(_aten.zeros, list(shape), dtype=dtype, device=device)
        assert isinstance(value, fx.Node)
        return value

    def _times(self, x: fx.Node, gate: fx.Node) -> fx.Node:
        return self.emit(_aten.mul.Tensor, x, self._per_image(gate))

    def _per_image(self, x: fx.Node) -> fx.Node:  # (N, K) -> (N, K, 1, 1)
        return self.emit(_aten.unsqueeze, self.emit(_aten.unsqueeze, x, 2), 3)

    # what the old graphs say

    def form(self, old: fx.Node) -> Form:
        return old.meta["form"]

    def is_activation(self, old: fx.Node) -> bool:
        """Whether it is (N, C, H, W), of the batch's samples and with more than a pixel of each."""
        shape = self.form(old).shape
        return len(shape) == 4 and shape[0] == self.batch > 1 and shape[2:] != (1, 1)

    def users(self, old: fx.Node) -> list[fx.Node]:
        """What reads a tensor in its own direction."""
        return [user for user in old.users if user in self.needed]

    def forward_of(self, old: fx.Node) -> fx.Node | None:
        """The node of forward that an input of backward is."""
        source = self._sources.get(old)
        return source if isinstance(source, fx.Node) else None

    def is_read_later(self, old: fx.Node) -> bool:
        """Whether backward reads a tensor of forward."""
        later = self.old[1].inputs.get(old)
        return later is not None and bool(self.users(later))

    def only_user(self, old: fx.Node) -> fx.Node | None:
        """What alone reads a tensor in its own direction."""
        found = self.users(old)
        return found[0] if len(found) == 1 and old not in self.results else None


def _needed(graphs: tuple[Graph, Graph], results: set[Source | None]) -> set[fx.Node]:
    """The nodes that the results depend on, or that change something."""
    needed = {source for source in results if isinstance(source, fx.Node)}
    for graph in reversed(graphs):
        for node in reversed(list(graph.fx.nodes)):
            if node in needed or node.is_impure():
                needed |= {node, *node.all_input_nodes}
        sources = (source for source, node in graph.inputs.items() if node in needed)
        needed |= {source for source in sources if isinstance(source, fx.Node)}
    return needed


Rule = Callable[..., Any]
"""(writer, old node, *its arguments) -> its value, or NotImplemented."""
RULES: dict[Any, Rule] = {}
"""Operator -> rule. Filled when ``passes.rules`` is imported."""


def rule_for(*operators: Any) -> Callable[[Rule], Rule]:
    def register(rule: Rule) -> Rule:
        RULES.update(dict.fromkeys(operators, rule))
        return rule

    return register
