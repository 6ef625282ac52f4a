"""The activation of a slim encoder: live channels, and the rest in its smallest form.

A zeroed filter gives a convolution output of exactly 0, and train-mode batch norm turns that into
its bias: the channel is a constant, the same for all samples and pixels. What follows it changes
its form, but seldom to the full size: a padded convolution makes it vary by pixel, a
squeeze-excite gate by sample. So an activation (N, C, H, W) is kept as parts ::

    live    (N, K, H, W)
    rest    (1, R, 1, 1)    a constant
            (1, R, H, W)    the same map for all samples (the border effect of zero padding)
            (N, R, 1, 1)    a constant for each sample

each with the numbers of its channels. Every operation acts on every part at the part's own size,
so nothing is dropped: outputs, gradients and running statistics are those of the masked network.

``SlimTensor`` is a ``Tensor`` as far as models can tell. Which operations act on parts stands in
``slim.rules``; any other makes the tensor dense first, which is always right, and says so once.

It is one for autograd, too. A ``torch.autograd.Function`` is the one way into autograd that
``__torch_function__`` does not see: it takes the tensor as it is, and computes without gradient. So
each tensor has a node of its own, by which the gradient of its dense form goes on to the parts
(``slim.gradient``); without gradient, an operation on a tensor that has one makes it dense; and a
tensor whose node has become another than its own takes the gradient from there
(``_follow_new_node``).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sacl_fast.ops.batch_norm_act import Activation
from sacl_fast.slim.channels import Channels, all_channels
from sacl_fast.slim.gradient import DenseForm, connect
from sacl_fast.slim.operations import METADATA
from sacl_fast.slim.parts import Content, Part, Resolve, arranged, is_live, zero_part

logger = logging.getLogger(__name__)

_MAKE_LEAVES = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
_DEFERRED: ContextVar[Callable[[], Any] | None] = ContextVar("_DEFERRED", default=None)
"""Refers to the tensor whose parts are still to be computed; there is at most one."""
_already_logged: set[str] = set()


class _Wrapper(Tensor):
    """A tensor that exists in pieces; what has no rule is done on its dense form."""

    # What rules and modules ask for all the time is answered without going through torch.
    full_shape: torch.Size
    _type: tuple[torch.dtype, torch.device]

    knows_gradient: bool
    """Whether autograd knows the tensor as what it is now; not so where it was made or changed
    without gradient."""

    @property
    def shape(self) -> torch.Size:  # type: ignore[override]
        return self.full_shape

    @property
    def ndim(self) -> int:  # type: ignore[override]
        return len(self.full_shape)

    @property
    def dtype(self) -> torch.dtype:  # type: ignore[override]
        return self._type[0]

    @property
    def device(self) -> torch.device:  # type: ignore[override]
        return self._type[1]

    def size(self, dim: int | None = None) -> Any:
        return self.full_shape if dim is None else self.full_shape[dim]

    def dim(self) -> int:
        return len(self.full_shape)

    def dense(self) -> Tensor:
        raise NotImplementedError

    @property
    def is_whole(self) -> bool:
        """Whether all of it is full-size."""
        raise NotImplementedError

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _MAKE_LEAVES:
            args[0].knows_gradient = False
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if torch.is_grad_enabled():
            for x in _slim_tensors(args, kwargs):
                if not x.knows_gradient:
                    _follow_new_node(x)
        elif any(x.requires_grad for x in _slim_tensors(args, kwargs)):
            return _on_dense(func, args, kwargs)  # within a torch.autograd.Function, it may be
        _resolve_other_than(args[0] if args else None)
        if rule := _rules().get(func):
            out = rule(func, *args, **kwargs)
            if out is not NotImplemented:
                return out
        return _on_dense(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(
            f"{func} reached a {cls.__name__} past its __torch_function__, where gradients would "
            "be lost; use the slicer's modes 'dense' and 'mask' for this encoder"
        )


class SlimTensor(_Wrapper):
    """An activation (N, C, H, W) in parts; the first is full-size and has at least one channel.

    Made by ``from_parts``, ``with_zeros`` and ``deferred``. The last two leave something undone
    until the parts are asked for: what comes next can often do it along with its own work.
    """

    _content: Content

    @staticmethod
    def __new__(cls, parts: tuple[Part, ...], shape: torch.Size) -> SlimTensor:
        return cls._of(Content(parts, shape), parts[0].values)

    @classmethod
    def _of(
        cls, content: Content, like: Tensor, computed_from: Sequence[Tensor] | None = None
    ) -> SlimTensor:
        shape, dtype, device = content.shape, like.dtype, like.device
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.full_shape, made._type = shape, (dtype, device)
        made._hold(content, computed_from)
        return made

    def _hold(self, content: Content, computed_from: Sequence[Tensor] | None = None) -> None:
        """``computed_from``: what the parts are computed from; None: they are there."""
        self._content = content
        self.knows_gradient = torch.is_grad_enabled()
        if self.knows_gradient:
            if computed_from is None:
                computed_from = [p.values for p in content.computed]
            connect(self, content.dense, computed_from)

    @property
    def parts(self) -> tuple[Part, ...]:
        if self._content.is_deferred:
            self._resolve()
        return self._content.parts

    @property
    def nonzero_parts(self) -> tuple[Part, ...]:
        """The parts but for the channels ``zeroed``."""
        return self.parts if self._content.is_deferred else self._content.computed

    def _resolve(self) -> None:
        content = self._content
        with torch.set_grad_enabled(content.with_gradient):
            content.resolved("none")
        if content.with_gradient and not torch.is_grad_enabled():
            # A torch.autograd.Function may have the node already. So that goes on to the sources,
            # once, with the gradients of all, and nobody else does (see ``_follow_new_node``).
            detached = tuple(p._replace(values=p.values.detach()) for p in content.computed)
            self._content, self.knows_gradient = Content(detached, self.shape), False
        else:
            self._hold(Content(content.computed, self.shape))

    @property
    def zeroed(self) -> Channels | None:
        """Channels of value 0 that are not among the parts yet."""
        return self._content.zeroed

    @property
    def waits_for_activation(self) -> bool:
        """Whether the parts can be computed along with an activation, as ``activated`` does."""
        content = self._content
        return content.is_deferred and content.with_gradient == torch.is_grad_enabled()

    def activated(self, act: Activation, *, in_place: bool) -> SlimTensor:
        """The tensor after the activation that it waits for."""
        assert self._content.resolve is not None
        if in_place:
            self._hold(Content(self._content.resolved(act), self.shape))
            return self
        _DEFERRED.set(weakref.ref(self))  # to be resolved for whoever still has it
        return SlimTensor(self._content.resolve(act), self.shape)

    def dense(self) -> Tensor:
        self.parts  # noqa: B018
        return self._content.dense()

    @property
    def is_whole(self) -> bool:
        return len(self.parts) == 1

    def become(self, other: Tensor) -> SlimTensor:
        """Take another tensor's values: what an in-place operation does."""
        if isinstance(other, SlimTensor):
            parts = other.parts
        else:
            parts = (Part(all_channels(other.shape[1]), other),)
        self._hold(Content(parts, self.shape))
        return self

    def __repr__(self, **_: Any) -> str:
        forms = ", ".join(str(tuple(p.values.shape)) for p in self.parts)
        return f"SlimTensor({tuple(self.shape)}: {forms})"


class KeptFilters(_Wrapper):
    """A convolution's weight or bias of which only some filters are kept, the others being 0."""

    parameter: Tensor
    mask: Tensor | None
    kept: Channels

    @staticmethod
    def __new__(cls, parameter: Tensor, mask: Tensor | None, kept: Channels) -> KeptFilters:
        """
        Args:
            parameter: (Cout, ...).
            mask: (Cout,), true where the filter is kept; None: all are.
            kept: the same as numbers.
        """
        made = Tensor._make_wrapper_subclass(
            cls, parameter.shape, dtype=parameter.dtype, device=parameter.device
        )
        made.full_shape, made._type = parameter.shape, (parameter.dtype, parameter.device)
        made.parameter, made.mask, made.kept = parameter, mask, kept
        made.knows_gradient = torch.is_grad_enabled()
        if made.knows_gradient:
            connect(made, lambda: _masked(parameter, mask), [parameter])
        return made

    def dense(self) -> Tensor:
        return _masked(self.parameter, self.mask)

    @property
    def is_whole(self) -> bool:
        return self.mask is None

    def __repr__(self, **_: Any) -> str:
        return f"KeptFilters({len(self.kept)} of {tuple(self.shape)})"


def dense(tree: Any) -> Any:
    """Every slim tensor of nested tuples, lists and dicts made dense."""
    return tree_map(lambda x: x.dense() if isinstance(x, _Wrapper) else x, tree)


def _masked(parameter: Tensor, mask: Tensor | None) -> Tensor:
    return parameter if mask is None else parameter * mask.view(-1, *[1] * (parameter.ndim - 1))


# --- autograd ------------------------------------------------------------------------------------


def _follow_new_node(x: SlimTensor) -> None:
    """With gradient again: what was made or changed without has the gradient of autograd's node,
    if it has one. (A ``torch.autograd.Function`` gives its results one.)"""
    if x.requires_grad:
        values = DenseForm.apply(x)
        x._content = Content((Part(all_channels(values.shape[1]), values),), x.shape)
    x.knows_gradient = True


def _slim_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[SlimTensor]:
    """Those that a function is given, by themselves or in a list."""
    for a in (*args, *kwargs.values()):
        if isinstance(a, SlimTensor):
            yield a
        elif isinstance(a, list | tuple):
            yield from (x for x in a if isinstance(x, SlimTensor))


# --- making slim tensors -------------------------------------------------------------------------


def from_parts(parts: Sequence[Part], shape: torch.Size) -> Tensor:
    """The tensor (N, C, H, W) of these parts, which together hold each channel once.

    Where a channel is a single value, the tensor is an ordinary one.
    """
    parts = arranged(parts, shape)
    return SlimTensor(parts, shape) if shape[2:] != (1, 1) else Content(parts, shape).dense()


def by_part(x: SlimTensor, function: Callable[[Part], Tensor]) -> Tensor:
    """What a function gives for each part, at the part's own size."""
    return from_parts([p._replace(values=function(p)) for p in x.parts], x.shape)


def with_zeros(parts: Sequence[Part], zeroed: Channels, shape: torch.Size) -> Tensor:
    """The tensor of these parts and of channels of value 0. The first part is full-size, or not
    there to be read."""
    if not len(zeroed) or shape[2:] == (1, 1) or not is_live(parts[0], shape):
        return from_parts([*parts, zero_part(zeroed, parts)], shape)
    content = Content(arranged(parts, shape), shape, zeroed=zeroed)
    return SlimTensor._of(content, content.computed[0].values)


def deferred(
    resolve: Resolve, shape: torch.Size, like: Tensor, computed_from: Sequence[Tensor]
) -> SlimTensor:
    """The tensor whose parts ``resolve`` computes: with the activation that is done next, or with
    none before anything else is done to any slim tensor."""
    made = SlimTensor._of(Content((), shape, resolve=resolve), like, computed_from)
    _DEFERRED.set(lambda: made)
    return made


@contextmanager
def resolving() -> Iterator[None]:
    """At its end, what was ``deferred`` is computed."""
    try:
        yield
        _resolve_other_than(None)
    finally:
        _DEFERRED.set(None)


def _resolve_other_than(x: Any) -> None:
    """Compute what was deferred, unless it is ``x``, which the next operation is done to."""
    reference = _DEFERRED.get()
    tensor = None if reference is None else reference()
    if reference is not None and tensor is not x:
        _DEFERRED.set(None)
        if tensor is not None:
            tensor.parts  # noqa: B018


@cache
def _rules() -> Mapping[Callable[..., Any], Callable[..., Any]]:
    """Not at the top of this file, since the rules are written with what stands in it."""
    from sacl_fast.slim.rules import RULES

    return RULES


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation without a rule does: right, but at full cost from here on."""
    copies: list[tuple[SlimTensor, Tensor, int | None]] = []
    saved = False

    def copy(x: Any) -> Any:
        nonlocal saved
        if not isinstance(x, _Wrapper):
            return x
        own = x.dense()
        saved |= not x.is_whole
        if isinstance(x, SlimTensor):
            copies.append((x, own, None if own.is_inference() else own._version))
        return own

    args, kwargs = tree_map(copy, (args, kwargs))
    if saved:
        _log_once(getattr(func, "__name__", str(func)))
    out = func(*args, **kwargs)
    for x, own, version in copies:
        # An in-place operation has changed the copy. (Where versions are not kept, be safe.)
        if version is None or own._version != version:
            x.become(own)
            out = x if out is own else out
    return out


def _log_once(operation: str) -> None:
    if operation not in _already_logged:
        _already_logged.add(operation)
        logger.info(
            "slim encoder: '%s' does not know channels in parts, so it works on dense tensors: "
            "right, but from there on it skips nothing",
            operation,
        )
