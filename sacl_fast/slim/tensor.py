"""The activation of a slim encoder: live channels, and the rest in its smallest form.

A zeroed filter gives a convolution output of exactly 0, and train-mode batch norm turns that into
its bias: the channel is a constant, the same for all samples and places. What follows it changes
its form, but seldom to the full size: a padded convolution makes it vary by place, a
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
tensor whose node has become another than its own takes the gradient from there (``_heal``).
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sacl_fast.ops.batch_norm_act import Activation
from sacl_fast.ops.slim_channels import assemble
from sacl_fast.slim.channels import Channels, all_channels
from sacl_fast.slim.gradient import DenseForm, connect
from sacl_fast.slim.parts import Part, arranged, is_live, zeros

logger = logging.getLogger(__name__)

RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
"""PyTorch function -> rule, called with that function and its arguments; a rule that does not
cover them returns NotImplemented. Filled by ``slim.rules``."""

_METADATA: set[Callable[..., Any]] = {
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
_MAKE_LEAVES = {Tensor.requires_grad_, Tensor.requires_grad.__set__}  # type: ignore[attr-defined]
_UNFINISHED: ContextVar[Callable[[], Any] | None] = ContextVar("_UNFINISHED", default=None)
_already_logged: set[str] = set()


Finish = Callable[[Activation], tuple[Part, ...]]


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

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _METADATA:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if func in _MAKE_LEAVES:
            args[0].knows_gradient = False
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        if torch.is_grad_enabled():
            for x in _slim_tensors(args, kwargs):
                if not x.knows_gradient:
                    _heal(x)
        elif any(x.requires_grad for x in _slim_tensors(args, kwargs)):
            return _on_dense(func, args, kwargs)  # within a torch.autograd.Function, it may be
        _finish_other_than(args[0] if args else None)
        if rule := RULES.get(func):
            out = rule(func, *args, **kwargs)
            if out is not NotImplemented:
                return out
        return _on_dense(func, args, kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        raise RuntimeError(
            f"{func} reached a {cls.__name__} past its __torch_function__, where gradients would "
            "be lost; use the slicer's mode 'mask' for this encoder"
        )


class SlimTensor(_Wrapper):
    """An activation (N, C, H, W) in parts; the first is full-size and has at least one channel.

    Made by ``make``, ``with_zeros`` and ``later``. The last two leave something undone until the
    parts are asked for: what comes next can often do it along with its own work.
    """

    _content: _Content

    @staticmethod
    def __new__(cls, parts: tuple[Part, ...], shape: torch.Size) -> SlimTensor:
        return cls._of(_Content(parts, shape), parts[0].values)

    @classmethod
    def _of(
        cls, content: _Content, like: Tensor, sources: Sequence[Tensor] | None = None
    ) -> SlimTensor:
        shape, dtype, device = content.shape, like.dtype, like.device
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=dtype, device=device)
        made.full_shape, made._type = shape, (dtype, device)
        made._take(content, sources)
        return made  # type: ignore[no-any-return]

    def _take(self, content: _Content, sources: Sequence[Tensor] | None = None) -> None:
        """``sources``: what the parts are computed from; None: the parts themselves."""
        self._content = content
        self.knows_gradient = torch.is_grad_enabled()
        if self.knows_gradient:
            if sources is None:
                sources = [p.values for p in content.made]
            connect(self, content.dense, sources)

    @property
    def parts(self) -> tuple[Part, ...]:
        if self._content.finish is not None:
            self._finish()
        return self._content.parts

    @property
    def nonzero_parts(self) -> tuple[Part, ...]:
        """The parts but for the channels ``zeroed``."""
        return self._content.made if self._content.finish is None else self.parts

    def _finish(self) -> None:
        content = self._content
        with torch.set_grad_enabled(content.with_gradient):
            content.finished("none")
        if content.with_gradient and not torch.is_grad_enabled():
            # A torch.autograd.Function may have the node already. So that goes on to the sources,
            # once, with the gradients of all, and nobody else does (see ``_heal``).
            detached = tuple(p._replace(values=p.values.detach()) for p in content.made)
            self._content, self.knows_gradient = _Content(detached, self.shape), False
        else:
            self._take(_Content(content.made, self.shape))

    @property
    def zeroed(self) -> Channels | None:
        """Channels of value 0 that are not among the parts yet."""
        return self._content.zeroed

    @property
    def waits_for_activation(self) -> bool:
        """Whether the parts can be computed along with an activation, as ``activated`` does."""
        content = self._content
        return content.finish is not None and content.with_gradient == torch.is_grad_enabled()

    def activated(self, act: Activation, *, in_place: bool) -> SlimTensor:
        """The tensor after the activation that it waits for."""
        assert self._content.finish is not None
        if in_place:
            self._take(_Content(self._content.finished(act), self.shape))
            return self
        _UNFINISHED.set(weakref.ref(self))  # to be finished for whoever still has it
        return SlimTensor(self._content.finish(act), self.shape)

    def dense(self) -> Tensor:
        self.parts  # noqa: B018
        return self._content.dense()

    def become(self, other: Tensor) -> SlimTensor:
        """Take another tensor's values: what an in-place operation does."""
        if isinstance(other, SlimTensor):
            parts = other.parts
        else:
            parts = (Part(all_channels(other.shape[1]), other),)
        self._take(_Content(parts, self.shape))
        return self

    def __repr__(self, **_: Any) -> str:
        forms = ", ".join(str(tuple(p.values.shape)) for p in self.parts)
        return f"SlimTensor({tuple(self.shape)}: {forms})"


class _Content:
    """The parts of a slim tensor, of which some may still have to be made.

    Apart from the tensor, so that autograd's node of the tensor can have it and not the tensor,
    which has the node.
    """

    def __init__(
        self,
        made: tuple[Part, ...],
        shape: torch.Size,
        *,
        zeroed: Channels | None = None,
        finish: Finish | None = None,
    ) -> None:
        """
        Args:
            made: the parts that are there.
            shape: of the tensor.
            zeroed: channels of value 0 besides.
            finish: gives the parts, after an activation.
        """
        self.made, self.shape, self.zeroed, self.finish = made, shape, zeroed, finish
        self.with_gradient = torch.is_grad_enabled()

    def finished(self, act: Activation) -> tuple[Part, ...]:
        assert self.finish is not None
        finish, self.finish = self.finish, None
        self.made = finish(act)
        return self.made

    @property
    def parts(self) -> tuple[Part, ...]:
        if self.finish is not None:
            self.finished("none")
        if self.zeroed is not None:
            zeroed, self.zeroed = self.zeroed, None
            self.made = arranged((*self.made, zeros(zeroed, self.made)), self.shape)
        return self.made

    def dense(self) -> Tensor:
        (first, *rest) = self.parts
        if not rest and first.channels.in_order:
            return first.values
        values = [p.values.to(first.values.dtype) for p in self.parts]
        indices = [p.channels.on(first.values.device) for p in self.parts]
        return assemble(self.shape, values, indices)


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
        return made  # type: ignore[no-any-return]

    def dense(self) -> Tensor:
        return _masked(self.parameter, self.mask)

    def __repr__(self, **_: Any) -> str:
        return f"KeptFilters({len(self.kept)} of {tuple(self.shape)})"


def dense(tree: Any) -> Any:
    """Every slim tensor of nested tuples, lists and dicts made dense."""
    return tree_map(lambda x: x.dense() if isinstance(x, _Wrapper) else x, tree)


def _masked(parameter: Tensor, mask: Tensor | None) -> Tensor:
    return parameter if mask is None else parameter * mask.view(-1, *[1] * (parameter.ndim - 1))


# --- autograd ------------------------------------------------------------------------------------


def _heal(x: SlimTensor) -> None:
    """With gradient again: what was made or changed without has the gradient of autograd's node,
    if it has one. (A ``torch.autograd.Function`` gives its results one.)"""
    if x.requires_grad:
        values = DenseForm.apply(x)
        x._content = _Content((Part(all_channels(values.shape[1]), values),), x.shape)
    x.knows_gradient = True


def _slim_tensors(args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[SlimTensor]:
    """Those that a function is given, by themselves or in a list."""
    for a in (*args, *kwargs.values()):
        if isinstance(a, SlimTensor):
            yield a
        elif isinstance(a, list | tuple):
            yield from (x for x in a if isinstance(x, SlimTensor))


# --- making slim tensors -------------------------------------------------------------------------


def make(parts: Sequence[Part], shape: torch.Size) -> Tensor:
    """The tensor (N, C, H, W) of these parts, which together hold each channel once.

    Where nothing is left to save, because all channels are full-size or a channel is a single
    value, the tensor is an ordinary one.
    """
    parts = arranged(parts, shape)
    if len(parts) > 1 and shape[2:] != (1, 1):
        return SlimTensor(parts, shape)
    return _Content(parts, shape).dense()


def with_zeros(parts: Sequence[Part], zeroed: Channels, shape: torch.Size) -> Tensor:
    """The tensor of these parts and of channels of value 0. The first part is full-size, or not
    there to be read."""
    if not len(zeroed) or shape[2:] == (1, 1) or not is_live(parts[0], shape):
        return make([*parts, zeros(zeroed, parts)], shape)
    content = _Content(arranged(parts, shape), shape, zeroed=zeroed)
    return SlimTensor._of(content, content.made[0].values)


def later(finish: Finish, shape: torch.Size, like: Tensor, sources: Sequence[Tensor]) -> SlimTensor:
    """The tensor whose parts ``finish`` gives, computed from ``sources``: with the activation that
    is done next, or with none before anything else is done to any slim tensor."""
    made = SlimTensor._of(_Content((), shape, finish=finish), like, sources)
    _UNFINISHED.set(lambda: made)
    return made


@contextmanager
def finishing() -> Iterator[None]:
    """At its end, what ``later`` has left undone is done."""
    try:
        yield
        _finish_other_than(None)
    finally:
        _UNFINISHED.set(None)


def _finish_other_than(x: Any) -> None:
    unfinished = _UNFINISHED.get()
    tensor = None if unfinished is None else unfinished()
    if unfinished is not None and tensor is not x:
        _UNFINISHED.set(None)
        if tensor is not None:
            tensor.parts  # noqa: B018


def _on_dense(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What an operation without a rule does: right, but at full cost from here on."""
    copies: list[tuple[SlimTensor, Tensor, int | None]] = []

    def copy(x: Any) -> Any:
        if not isinstance(x, _Wrapper):
            return x
        own = x.dense()
        if isinstance(x, SlimTensor):
            copies.append((x, own, None if own.is_inference() else own._version))
        return own

    args, kwargs = tree_map(copy, (args, kwargs))
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
