"""A pass of a module, and its backward, as the list of PyTorch operators that ran.

``record`` runs a module as ever, while a ``TorchDispatchMode`` writes down each operator that runs,
below autograd and autocast and with real tensors: those of forward in one ``torch.fx`` graph, those
of backward in another. They make a ``Recording``, a function of the module's input that runs the
same operators, has the same gradients, and leaves nothing for Python to decide.

Sizes and numbers are part of it, so it is for inputs of the same form. Where it would not hold for
all of those, there is an ``Obstacle`` instead: values read by the host, sizes that depend on
values, random numbers drawn in backward (recomputation), communication. What Python alone sees, a
counter or one tensor instead of another, shows when two recordings differ.
"""

from __future__ import annotations

import operator
import pickle
import random
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.autograd.function import once_differentiable
from torch.fx.graph import CodeGen
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.weak import WeakTensorKeyDictionary

from sacl_fast.passes.fusion import fuse
from sacl_fast.passes.graph import Form, Fusion, Graph, Source
from sacl_fast.passes.sharing import Shared, SharedGradients
from sacl_fast.precision import autocast

_CONSTANTS = (
    *(type(None), bool, int, float, complex, str),
    *(torch.dtype, torch.device, torch.layout, torch.memory_format),
)
_DEPENDENT = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}

_INPUT, _GRADIENT = 0, -1  # the module's input, the gradient of its output


class Obstacle(str):
    """Why a pass cannot be recorded."""


def record(
    run: Callable[[Tensor], Tensor],
    x: Tensor,
    done: Callable[[Recording | Obstacle], object],
    *,
    fused: Fusion = "none",
) -> Tensor:
    """``run(x)``, as it would be without; ``done`` is given the recording when it is complete.

    With gradient, that is after the first backward through the result. ``fused``: how far the
    recording's batch norms are fused into their neighbours (``fusion``).
    """
    tape, drawn = _Tape(x, fused), _random_state()
    with tape, _casts_of_its_own(x.device):
        out = run(x)
    if type(out) is not Tensor:
        tape.obstacle = Obstacle(f"it returns a {type(out).__name__}")
    elif _random_state() != drawn:
        tape.obstacle = Obstacle("it draws random numbers that are not PyTorch's")
    if tape.obstacle is None and out.requires_grad:
        tape.begin_backward()
        return _Recorded.apply(tape, [out], done, x, *tape.leaves)
    done(tape.obstacle or Recording(tape, out))
    return out


class Recording:
    """The operators of a pass; called with an input, they run. Made by ``record``."""

    def __init__(
        self, tape: _Tape, out: Tensor, gradients: Sequence[Tensor | None] | None = None
    ) -> None:
        """``gradients``: of the input and ``tape.leaves``; None where nothing wants any."""
        self._differentiable = gradients is not None
        self._strides = _gradient_strides(out)
        graphs, result = (tape.forward, tape.backward), tape.source(out)
        wanted = [None if g is None else tape.source(g) for g in gradients or ()]
        self.fused_norms = 0
        """Batch norms whose output is not stored."""
        if tape.fused != "none":
            *graphs, result, wanted, self.fused_norms = fuse(
                *graphs, result, wanted, tape.external[_INPUT].shape[0], tape.fused
            )
        self._backward = _Function(graphs[1], wanted)
        # For backward, autograd keeps results of forward, and of what it is asked the gradient of.
        # What else backward reads, buffers and indices, is at hand.
        needed = self._backward.inputs
        results = [s for s in needed if isinstance(s, fx.Node)]
        asked = [_INPUT, *(i for i, t in enumerate(tape.external) if t.requires_grad)]
        self._asked = [s for s in needed if s in asked]
        self._kept = [*results, *self._asked]
        self._forward = _Function(graphs[0], [result, *results])
        self._constants = tape.external[1:]
        # Buffers without autograd's notice: it may have saved them for the backward of other
        # passes, which does not depend on them (torch's batch norm updates them so, too).
        self._external: dict[Source, Tensor] = {
            i: t if t.requires_grad else t.data for i, t in enumerate(self._constants, 1)
        }
        self._leaves = tape.leaves

    def __call__(self, x: Tensor, sharing: SharedGradients | None = None) -> Tensor:
        if not self._differentiable:
            return self.forward(x)[0]
        first, token = (None, None) if sharing is None else sharing.taken()
        own = Shared(self._leaves) if sharing is not None and first is None else None
        out, own_token = _Replay.apply(self, own, first, token, x, *self._leaves)
        if sharing is not None and own is not None:
            sharing.give(own, own_token)
        return out

    def forward(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output, and what to keep for backward."""
        results = self._forward({**self._external, _INPUT: x}, x.device)
        asked = (x if s == _INPUT else self._external[s] for s in self._asked)
        return (*results, *asked)

    def backward(self, gradient: Tensor, kept: list[Tensor]) -> tuple[Tensor | None, ...]:
        """The gradients of the input, None where it wants none, and of the leaves.

        Empties ``kept``, so that memory is free as soon as it has been used.
        """
        given = self._external | dict(zip(self._kept, kept, strict=True))
        kept.clear()
        given[_GRADIENT] = _with_strides(gradient, self._strides)
        return self._backward(given, gradient.device)

    def agrees_with(self, other: Recording) -> bool:
        """Whether both run the same operators on the same parameters, buffers and constants."""
        own, others = self._constants, other._constants
        return (
            self._forward.code == other._forward.code
            and self._backward.code == other._backward.code
            and len(own) == len(others)
            and all(map(operator.is_, own, others))
        )


class _Recorded(torch.autograd.Function):
    """The result of a pass that is being recorded: its backward runs on the graph that autograd
    made, and is recorded too."""

    @staticmethod
    def forward(ctx: Any, tape: _Tape, result: list[Tensor], done: Any, *wanted: Tensor) -> Tensor:
        ctx.tape, ctx.result, ctx.done, ctx.wanted = tape, result, done, wanted
        return result[0].detach()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (out,), (x, *leaves) = ctx.result, ctx.wanted
        first, ctx.done = ctx.done, None
        gradient = _with_strides(gradient, _gradient_strides(out)).detach()
        ctx.tape.know(gradient, _GRADIENT)
        wanted = [t for t in (x, *leaves) if t.requires_grad]
        with ctx.tape if first else nullcontext():
            found = iter(torch.autograd.grad(out, wanted, gradient, True, allow_unused=True))
        gradients = [next(found) if t.requires_grad else None for t in (x, *leaves)]
        if first:
            first(ctx.tape.obstacle or Recording(ctx.tape, out, gradients))
        return None, None, None, *gradients


class _Replay(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        recording: Recording,
        own: Shared | None,
        first: Shared | None,
        token: Tensor | None,
        x: Tensor,
        *_: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """The output, and a token for the replay that shares its gradients (``sharing``)."""
        out, *kept = recording.forward(x)
        ctx.recording, ctx.own, ctx.first = recording, own, first
        ctx.save_for_backward(*kept)
        ctx.set_materialize_grads(False)
        return out, out.new_empty(())

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor | None, token: Tensor | None) -> Any:
        kept, leaves = list(ctx.saved_tensors), ctx.recording._leaves
        ctx.maybe_clear_saved_tensors()  # unless the graph is retained
        of_x, *own = [None] * (1 + len(leaves))
        if gradient is not None:
            of_x, *own = ctx.recording.backward(gradient, kept)
        if ctx.own is not None:
            own = ctx.own.add(own)
        if ctx.first is None:
            return None, None, None, None, of_x, *own
        own = ctx.first.leave(leaves, own)
        return None, None, None, ctx.first.no_gradient(), of_x, *own


class _Tape(TorchDispatchMode):
    """Writes down the operators that run while it is on: forward first, then backward."""

    supports_higher_order_operators = True

    def __init__(self, x: Tensor, fused: Fusion) -> None:
        super().__init__()
        self.fused: Fusion = fused
        self.obstacle: Obstacle | None = None
        self.forward = self._graph = Graph()
        self.backward = Graph()
        self.external = [x]
        """Tensors that no operator made: the input, then parameters, buffers, constants."""
        self._sources = WeakTensorKeyDictionary({x: _INPUT})
        self._detached: set[Source] = set()

    @property
    def leaves(self) -> list[Tensor]:
        """What wants a gradient, besides the input."""
        return [t for t in self.external[1:] if t.requires_grad]

    def begin_backward(self) -> None:
        self._graph = self.backward

    def know(self, tensor: Tensor, source: Source) -> None:
        self._sources[tensor] = source

    def source(self, tensor: Tensor) -> Source:
        if tensor not in self._sources:
            self._sources[tensor] = len(self.external)
            self.external.append(tensor)
        source: Source = self._sources[tensor]
        return source

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        if self.obstacle is None:
            try:
                self._write(func, args, kwargs, out)
            except _Unrecordable as reason:
                self.obstacle = Obstacle(f"{func} {reason}")
        return out

    def _write(self, func: Any, args: Any, kwargs: dict[str, Any], out: Any) -> None:
        if not isinstance(func, torch._ops.OpOverload):
            raise _Unrecordable("is more than an operator")
        if func is torch.ops.aten.detach.default:  # the same values, as autograd keeps them
            source = self.source(args[0])
            self._detached.add(source)
            return self.know(out, source)
        if _DEPENDENT.intersection(func.tags) and not _takes_by_number(func, args):
            raise _Unrecordable("gives what depends on values")
        if torch.Tag.inplace_view in func.tags and self.source(args[0]) in self._detached:
            raise _Unrecordable("changes the shape of a tensor that others have, in place")
        if torch.Tag.nondeterministic_seeded in func.tags and self._graph is self.backward:
            raise _Unrecordable("draws random numbers in backward")
        named = {name: self._argument(a) for name, a in kwargs.items()}
        node = self._graph.fx.call_function(func, self._argument(args), named)
        if isinstance(out, Tensor):
            self._note(out, node)
        elif isinstance(out, tuple | list):
            for i, result in enumerate(out):
                if isinstance(result, Tensor):
                    self._note(result, self._graph.fx.call_function(operator.getitem, (node, i)))
                elif result is not None:
                    raise _Unrecordable("gives something other than tensors")
        elif out is not None and node.all_input_nodes:
            raise _Unrecordable("gives something other than tensors")

    def _note(self, result: Tensor, node: fx.Node) -> None:
        if result not in self._sources:  # an in-place operator gives what it was given
            node.meta["form"] = Form.of(result)
            self.know(result, node)

    def _argument(self, a: Any) -> Any:
        if isinstance(a, Tensor):
            return self._graph.read(self.source(a), Form.of(a))
        if isinstance(a, tuple | list):
            return type(a)(map(self._argument, a))
        if not isinstance(a, _CONSTANTS):
            raise _Unrecordable(f"takes a {type(a).__name__}")
        return a


class _Unrecordable(Exception):
    """What an operator does."""


class _Function:
    """A graph as Python code: what the results need of it."""

    def __init__(self, graph: Graph, results: Sequence[Source | None]) -> None:
        graph.fx.output(tuple(None if s is None else graph.read(s) for s in results))
        graph.fx.eliminate_dead_code()
        for node in graph.inputs.values():
            if not node.users:
                graph.fx.erase_node(node)
        self.inputs = [s for s, node in graph.inputs.items() if node.users]
        graph.fx.set_codegen(_TakesItsInputs())
        written = graph.fx.python_code("self")
        self.code = written.src
        self._globals = written.globals

    def __call__(self, given: dict[Source, Tensor], device: torch.device) -> Any:
        """Empties ``given``."""
        inputs = [given[s] for s in self.inputs]
        given.clear()
        with torch.no_grad(), autocast(device, None):
            return self._run(None, inputs)

    @cached_property
    def _run(self) -> Callable[..., Any]:
        exec(compile(self.code, f"<{__name__}>", "exec"), self._globals)
        return self._globals["forward"]


class _TakesItsInputs(CodeGen):
    """Code that is given its inputs in a list and empties it."""

    def gen_fn_def(self, free_vars: list[str], *_: Any, **__: Any) -> str:
        names = [variable.partition(":")[0] for variable in free_vars if variable != "self"]
        return f"def forward(self, inputs):\n    [{', '.join(names)}] = inputs\n    inputs.clear()"


def _takes_by_number(func: Any, args: Any) -> bool:
    indices = args[1] if func is torch.ops.aten.index.Tensor else [None]
    kinds = {None if i is None else i.dtype for i in indices}
    return func is torch.ops.aten.index.Tensor and not kinds & {torch.bool, torch.uint8}


def _casts_of_its_own(device: torch.device) -> AbstractContextManager[Any]:
    """Within it, autocast does not take the casts of weights that it has made for others."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext()
    return torch.autocast(kind, torch.get_autocast_dtype(kind), cache_enabled=False)


def _gradient_strides(out: Tensor) -> tuple[int, ...]:
    """Those that the gradient of an output is brought to, whoever gives it: none are 0."""
    return torch.empty_like(out, device="meta").stride()


def _with_strides(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    if x.stride() == strides:
        return x
    return x.new_empty_strided(x.shape, strides).copy_(x)


def _random_state() -> Any:
    return random.getstate(), pickle.dumps(np.random.get_state())
