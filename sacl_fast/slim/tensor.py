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
"""

from __future__ import annotations

import logging
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import reduce
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from sacl_fast.ops.batch_norm_act import Activation
from sacl_fast.ops.slim_channels import assemble, take_channels
from sacl_fast.slim.channels import Channels, all_channels, channels, joined

logger = logging.getLogger(__name__)

RULES: dict[Callable[..., Any], Callable[..., Any]] = {}
"""PyTorch function -> rule, called with that function and its arguments; a rule that does not
cover them returns NotImplemented. Filled by ``slim.rules``."""

_METADATA: set[Callable[..., Any]] = {
    *(
        getattr(Tensor, name).__get__
        for name in """
            shape dtype device layout ndim itemsize is_cuda is_sparse is_quantized is_meta is_mkldnn
            is_nested
        """.split()
    ),
    *(Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.nelement, Tensor.__len__),
    *(Tensor.is_floating_point, Tensor.is_complex, Tensor.get_device, Tensor.element_size),
    *(torch.is_floating_point, torch.is_complex, torch.numel, Tensor.__hash__),
}
_UNFINISHED: ContextVar[Callable[[], Any] | None] = ContextVar("_UNFINISHED", default=None)
_already_logged: set[str] = set()


class Part(NamedTuple):
    """Some channels of an activation, in a form that broadcasts to its full size."""

    channels: Channels
    values: Tensor  # (1 or N, K, 1 or H, 1 or W)

    @property
    def is_constant(self) -> bool:
        """Over the image; it may differ by sample."""
        return self.values.shape[2:] == (1, 1)


Finish = Callable[[Activation], tuple[Part, ...]]


class _Wrapper(Tensor):
    """A tensor that exists in pieces; what has no rule is done on its dense form."""

    # What rules and modules ask for all the time is answered without going through torch.
    full_shape: torch.Size
    _type: tuple[torch.dtype, torch.device]

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
        _finish_other_than(args[0] if args else None)
        if func == Tensor.requires_grad.__get__:  # type: ignore[attr-defined]
            return args[0].requires_gradient
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

    zeroed: Channels | None = None
    """channels of value 0 that are not among the parts yet"""
    finish: Finish | None = None
    """gives the parts, after an activation"""

    _parts: tuple[Part, ...]

    @staticmethod
    def __new__(
        cls, parts: tuple[Part, ...], shape: torch.Size, like: Tensor | None = None
    ) -> SlimTensor:
        like = parts[0].values if like is None else like
        made = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        made.full_shape, made._type, made._parts = shape, (like.dtype, like.device), parts
        return made  # type: ignore[no-any-return]

    @property
    def parts(self) -> tuple[Part, ...]:
        if self.finish is not None:
            finish, self.finish = self.finish, None
            self._parts = finish("none")
        if self.zeroed is not None:
            zeroed, self.zeroed = self.zeroed, None
            self._parts = arranged((*self._parts, _zeros(zeroed, self._parts)), self.shape)
        return self._parts

    @property
    def nonzero_parts(self) -> tuple[Part, ...]:
        """The parts but for the channels ``zeroed``."""
        return self._parts if self.finish is None else self.parts

    def activated(self, act: Activation, *, in_place: bool) -> SlimTensor:
        """What ``finish`` gives with an activation."""
        assert self.finish is not None
        parts = self.finish(act)
        if in_place:
            self.finish, self._parts = None, parts
            return self
        _UNFINISHED.set(weakref.ref(self))  # to be finished for whoever still has it
        return SlimTensor(parts, self.shape)

    def dense(self) -> Tensor:
        (first, *rest) = self.parts
        if not rest and first.channels.in_order:
            return first.values
        values = [p.values.to(first.values.dtype) for p in self.parts]
        indices = [p.channels.on(first.values.device) for p in self.parts]
        return assemble(self.shape, values, indices)

    def become(self, other: Tensor) -> SlimTensor:
        """Take another tensor's values: what an in-place operation does."""
        self.zeroed = self.finish = None
        if isinstance(other, SlimTensor):
            self._parts = other.parts
        else:
            self._parts = (Part(all_channels(other.shape[1]), other),)
        return self

    @property
    def requires_gradient(self) -> bool:
        return any(p.values.requires_grad for p in self.parts)

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
        return made  # type: ignore[no-any-return]

    def dense(self) -> Tensor:
        if self.mask is None:
            return self.parameter
        return self.parameter * self.mask.view(-1, *[1] * (self.parameter.ndim - 1))

    @property
    def requires_gradient(self) -> bool:
        return self.parameter.requires_grad

    def __repr__(self, **_: Any) -> str:
        return f"KeptFilters({len(self.kept)} of {tuple(self.shape)})"


def dense(tree: Any) -> Any:
    """Every slim tensor of nested tuples, lists and dicts made dense."""
    return tree_map(lambda x: x.dense() if isinstance(x, _Wrapper) else x, tree)


@contextmanager
def dense_for_custom_functions() -> Iterator[None]:
    """Within it, a ``torch.autograd.Function`` is given dense tensors.

    It is the one way into autograd that ``__torch_function__`` does not see: the function would
    take the wrapper for a tensor without gradient, and the gradient would be lost in silence.
    """
    own = torch.autograd.Function.__dict__["apply"]

    def apply(cls: Any, *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(a, _Wrapper) for a in args):
            _log_once(cls.__name__)
            args = tuple(a.dense() if isinstance(a, _Wrapper) else a for a in args)
        return own.__func__(cls, *args, **kwargs)

    torch.autograd.Function.apply = classmethod(apply)  # type: ignore[assignment]
    try:
        yield
    finally:
        torch.autograd.Function.apply = own


def make(parts: Sequence[Part], shape: torch.Size) -> Tensor:
    """The tensor (N, C, H, W) of these parts, which together hold each channel once.

    Where nothing is left to save, because all channels are full-size or a channel is a single
    value, the tensor is an ordinary one.
    """
    parts = arranged(parts, shape)
    made = SlimTensor(parts, shape)
    return made if len(parts) > 1 and shape[2:] != (1, 1) else made.dense()


def with_zeros(parts: Sequence[Part], zeroed: Channels, shape: torch.Size) -> Tensor:
    """The tensor of these parts and of channels of value 0. The first part is full-size, or not
    there to be read."""
    if not len(zeroed) or shape[2:] == (1, 1) or not _is_live(parts[0], shape):
        return make([*parts, _zeros(zeroed, parts)], shape)
    made = SlimTensor(arranged(parts, shape), shape)
    made.zeroed = zeroed
    return made


def later(finish: Finish, shape: torch.Size, like: Tensor) -> SlimTensor:
    """The tensor whose parts ``finish`` gives: with the activation that is done next, or with none
    before anything else is done to any slim tensor."""
    made = SlimTensor((), shape, like)
    made.finish = finish
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


def arranged(parts: Sequence[Part], shape: torch.Size) -> tuple[Part, ...]:
    """The parts that are not empty, those of one form joined, a full-size one first."""
    by_form: dict[tuple[int, ...], list[Part]] = {}
    for part in parts:
        if len(part.channels):
            b, _, h, w = part.values.shape
            by_form.setdefault((b, h, w), []).append(part)
    full = (shape[0], *shape[2:])
    live = by_form.pop(full, [])
    rest = [_join(group) for group in by_form.values()]
    if not live and rest and shape.numel():  # an operation needs at least one live channel
        one, others = _split_first(rest[0])
        live = [one._replace(values=one.values.expand(full[0], 1, *full[1:]).contiguous())]
        rest = [p for p in (others, *rest[1:]) if len(p.channels)]
    return (_join(live), *rest)


def _is_live(part: Part, shape: torch.Size) -> bool:
    return part.values.shape[::2] == shape[::2] and part.values.shape[3] == shape[3]


def _zeros(zeroed: Channels, parts: Sequence[Part]) -> Part:
    return Part(zeroed, parts[0].values.new_zeros(1, len(zeroed), 1, 1))


def _join(parts: list[Part]) -> Part:
    if len(parts) == 1:
        return parts[0]
    dtype = reduce(torch.promote_types, (p.values.dtype for p in parts))
    values = torch.cat([p.values.to(dtype) for p in parts], 1)
    return Part(joined(*(p.channels for p in parts)), values)


def _split_first(part: Part) -> tuple[Part, Part]:
    numbers = part.channels.numbers
    return (
        Part(channels(numbers[:1]), part.values[:, :1]),
        Part(channels(numbers[1:]), part.values[:, 1:]),
    )


def select(part: Part, positions: Channels, chosen: Channels) -> Part:
    """The part's channels at some positions, which are numbered ``chosen``."""
    return Part(chosen, at(part.values, positions))


def at(x: Tensor, positions: Channels) -> Tensor:
    """The channels of (N, C, H, W) at some positions; the tensor itself where that is all."""
    index = positions.index(x.device, x.shape[1])
    return x if index is None else take_channels(x, index)


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
