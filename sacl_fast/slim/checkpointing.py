"""Activation checkpointing of an encoder in any of its slicer's modes.

A pass with gradient keeps what goes in and out of the encoder's blocks; what lies between is
computed again in backward, by ``torch.utils.checkpoint``. The mode was left by then, so it is
entered once more for that, with the tensors that stood in the place of the weights
(``Slicer.contexts``). Running statistics have had their batch and stay as they are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten
from torch.utils.checkpoint import checkpoint

from sacl_fast.errors import UserError
from sacl_fast.slim.parts import Part
from sacl_fast.slim.tensor import SlimTensor, from_parts, resolving

_CONTAINERS = (nn.Sequential, nn.ModuleList)
_STATISTICS = ("running_mean", "running_var", "num_batches_tracked")

Again = Callable[[], AbstractContextManager[Any]]


def blocks_of(encoder: nn.Module) -> list[nn.Module]:
    """What is computed again as a whole: the blocks that the encoder's stages are lists of; where
    it has no such lists, its children that have children.

    >>> import timm
    >>> len(blocks_of(timm.create_model("resnet18")))
    8

    Raises:
        UserError: there are none.
    """
    found = list(_blocks_in(encoder, outermost=True))
    found = found or [m for m in encoder.children() if _is_block(m)]
    if not found:
        raise UserError(
            f"{type(encoder).__name__} has no blocks whose activations could be computed again: "
            "none of its modules holds others; --engine.no-activation-checkpointing works"
        )
    return found


def _blocks_in(module: nn.Module, *, outermost: bool = False) -> Iterator[nn.Module]:
    """From the outside in. A block that is a stage, and so has a sequence of blocks itself, is
    looked into; further in, a ``ModuleList`` may as well hold branches."""
    for child in module.children():
        if isinstance(module, nn.Sequential) and _is_block(child):
            yield from list(_blocks_in(child)) or [child]
        elif outermost and isinstance(child, nn.ModuleList):
            for block in child:
                yield from list(_blocks_in(block)) or [block] * _is_block(block)
        else:
            yield from _blocks_in(child)


def _is_block(module: nn.Module) -> bool:
    """Whether it computes something by modules of its own."""
    return (
        not isinstance(module, _CONTAINERS)
        and next(module.children(), None) is not None
        and next(module.parameters(), None) is not None
    )


@contextmanager
def checkpointed(
    blocks: Sequence[nn.Module], again: Again, instead_of: Sequence[nn.Module] = ()
) -> Iterator[None]:
    """Within it, blocks keep nothing for backward but what they are given.

    Args:
        again: enters the slicer's mode once more.
        instead_of: modules that would do so by themselves (timm's ``grad_checkpointing``).
    """
    with ExitStack() as undo:
        for module in instead_of:
            undo.callback(setattr, module, "grad_checkpointing", True)
            setattr(module, "grad_checkpointing", False)  # noqa: B010
        for block in blocks:
            undo.callback(_wrap(block, again))
        yield


def _wrap(block: nn.Module, again: Again) -> Callable[[], None]:
    """Have a block's ``forward`` checkpointed; returns what undoes it."""
    own = block.forward
    given = vars(block).get("forward")

    def forward(*args: Any, **kwargs: Any) -> Any:
        with resolving():  # also of other branches: it is not to be a part of this block
            flat, assemble = _taken_apart((args, kwargs))
        results: list[Callable[[list[Any]], Any]] = []

        def run(*flat: Any) -> list[Any]:
            args, kwargs = assemble(list(flat))
            out, result = _taken_apart(own(*args, **kwargs))
            results.append(result)
            return out

        out: Any = checkpoint(
            run,
            *flat,
            use_reentrant=False,
            preserve_rng_state=_may_draw(block) or not _capturing(),
            context_fn=lambda: (nullcontext(), Recomputation(block, again)),
        )
        return results[0](out)

    def undo() -> None:
        if given is None:
            del block.forward
        else:
            block.forward = given

    block.forward = forward
    return undo


def _taken_apart(tree: Any) -> tuple[list[Any], Callable[[list[Any]], Any]]:
    """The leaves of nested arguments, slim tensors as their parts, and what puts them together."""
    leaves, structure = tree_flatten(tree)
    flat: list[Any] = []
    makers: list[Callable[[Iterator[Any]], Any]] = []
    for leaf in leaves:
        if isinstance(leaf, SlimTensor):
            flat += (part.values for part in leaf.parts)
            makers.append(_maker(leaf))
        else:
            flat.append(leaf)
            makers.append(next)

    def assemble(flat: list[Any]) -> Any:
        rest = iter(flat)
        return tree_unflatten([make(rest) for make in makers], structure)

    return flat, assemble


def _maker(x: SlimTensor) -> Callable[[Iterator[Any]], Tensor]:
    numbers, shape = [part.channels for part in x.parts], x.shape
    return lambda rest: from_parts([Part(own, next(rest)) for own in numbers], shape)


class Recomputation:
    """A context: the slicer's mode as in forward, and a block's running statistics out of reach."""

    def __init__(self, block: nn.Module, again: Again) -> None:
        self.block, self.again = block, again
        self._undo = ExitStack()

    def __enter__(self) -> None:
        self._undo.enter_context(self.again())
        for module in self.block.modules():
            own = {name: module._buffers.get(name) for name in _STATISTICS}
            copies = {name: b.clone() for name, b in own.items() if b is not None}
            if module.training and copies:
                self._undo.callback(module._buffers.update, {name: own[name] for name in copies})
                module._buffers.update(copies)

    def __exit__(self, *error: Any) -> None:  # torch's, where it has computed enough
        self._undo.__exit__(*error)


def _may_draw(block: nn.Module) -> bool:
    """Whether random numbers are part of it: dropout, stochastic depth."""
    return any("drop" in type(module).__name__.lower() for module in block.modules())


def _capturing() -> bool:
    """Whether a CUDA graph is captured, in which the random state cannot be asked for."""
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
