"""Rules for additions that may wait until the end of a pass, where one operator does them all."""

from __future__ import annotations

from typing import Any

import torch
from torch import fx

from sacl_fast.passes.fusion import Writer, rule_for

_ops, _aten = torch.ops.sacl_fast, torch.ops.aten


@rule_for(_aten.add_.Tensor)
def _add_in_place(w: Writer, node: fx.Node, a: fx.Node, b: Any) -> Any:
    form = w.form(a)
    if node.kwargs or w.users(node) or a in w.done:
        return NotImplemented
    if b == 1 and form.dtype == torch.int64 and not form.shape and isinstance(w.value(a), int):
        w.counters.append(w.read(a))
    elif isinstance(b, fx.Node) and w.only_user(b) is node and may_wait(w, a):
        w.sums[w.read(a)] = w.read(b)
    else:
        return NotImplemented
    w.done[a] = None  # added to once more, it is not put off
    return None


_VIEWS = {_aten.view.default, _aten.unsqueeze.default, _aten.squeeze.dim, _aten.permute.default}


def may_wait(w: Writer, x: fx.Node) -> bool:
    """Whether a tensor of backward is added to and given back, and nothing else."""
    if w.graph is not w.graphs[1] or x.op == "placeholder":
        return False
    return all(
        (user.target is _aten.add_.Tensor and user.args[0] is x)
        or (user.target in _VIEWS and may_wait(w, user))
        for user in w.users(x)
    )


def stays(w: Writer, x: fx.Node) -> bool:
    """Whether nothing that is yet to be written changes a tensor."""
    base: Any = x
    while base.target in _VIEWS:
        base = base.args[0]
    return _is_unchanged(w, base)


def _is_unchanged(w: Writer, x: fx.Node) -> bool:
    return all(
        _is_unchanged(w, user) if user.target in _VIEWS else user in w.values or not changes(user)
        for user in w.users(x)
    )


def changes(node: fx.Node) -> bool:
    """Whether an operator changes a tensor in place."""
    return isinstance(node.target, torch._ops.OpOverload) and node.target._schema.is_mutable


def is_own(w: Writer, x: fx.Node) -> bool:
    """Whether nothing but one addition reads a tensor's memory."""
    base: Any = x
    while base.target in _VIEWS and w.only_user(base):
        base = base.args[0]
    read = [user for user in w.users(base) if user.target is not _aten.index_copy_.default]
    return base.target is _aten.new_zeros.default and len(read) == 1 and w.only_user(x) is not None
