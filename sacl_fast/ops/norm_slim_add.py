"""The sum of two slim activations whose live channels may be raw; see ``norm_act``.

A residual sum would otherwise take two normalised activations, each written by its norm and read
again; here they are normalised as the sum reads them. Its gradient needs no operator of its own:
that of ``slim_add`` gives the gradients of both norms' outputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from sacl_fast.ops import compiled
from sacl_fast.ops.norm_act import images_like, operand
from sacl_fast.ops.slim_add import slim_add


def _forward(
    a: Tensor,
    a_affine: Tensor | None,
    a_rest: Tensor | None,
    a_index: Tensor | None,
    b: Tensor,
    b_affine: Tensor | None,
    b_rest: Tensor | None,
    b_index: Tensor | None,
) -> Tensor:
    left, right = operand(a, a_affine, 0), operand(b, b_affine, 0)
    rests = [None if r is None else r.view(1, -1, 1, 1) for r in (a_rest, b_rest)]
    y = slim_add(left, rests[0], a_index, right, rests[1], b_index, backend="torch")
    return images_like(y)


def _describe() -> None:
    torch.library.impl("sacl_fast::norm_slim_add", "CPU")(_forward)
    torch.library.register_fake("sacl_fast::norm_slim_add")(_forward)


is_compiled = compiled.there(_describe)
