"""What LARS takes of NVIDIA's apex: norms of many tensors, and sums of pairs of them.

apex has a LARS of its own, but with the learning rate as a number of the host, which would be part
of a CUDA graph. ``amp_C`` checks gradients for overflow by a flag that its kernels set; torch's
``GradScaler`` has done that before, so the flag is never read.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import re
from collections.abc import Sequence
from functools import cache
from importlib.machinery import PathFinder
from typing import Any

import torch
from torch import Tensor

from sacl_fast.errors import reason_of

# Function of amp_C -> its number of arguments: chunk size, flag, lists of tensors, and others.
SIGNATURES = {"multi_tensor_l2norm": 4, "multi_tensor_axpby": 6}


def norms(tensors: list[Tensor]) -> Sequence[Tensor]:
    """Euclidean norms, () each."""
    per_tensor = True
    return _apply("multi_tensor_l2norm", [tensors], per_tensor)[1].unbind()


def decayed(params: list[Tensor], grads: list[Tensor], weight_decay: float) -> list[Tensor]:
    """g + weight_decay * p, new tensors."""
    results = [torch.empty_like(p) for p in params]
    check_neither = 2
    _apply("multi_tensor_axpby", [grads, params, results], 1.0, weight_decay, check_neither)
    return results


def _apply(name: str, lists: list[list[Tensor]], *arguments: Any) -> Any:
    multi_tensor_apply = importlib.import_module("apex.multi_tensor_apply")
    function = getattr(importlib.import_module("amp_C"), name)
    flag = _flag(lists[0][0].device)
    # It takes no order of values in memory but two, and they lie alike in each list.
    flat = [[x.as_strided((x.numel(),), (1,)) for x in tensors] for tensors in lists]
    return multi_tensor_apply.multi_tensor_applier(function, flag, flat, *arguments)


@cache
def _flag(device: torch.device) -> Tensor:
    return torch.zeros(1, dtype=torch.int32, device=device)


@cache
def obstacle() -> str | None:
    """Why these functions cannot be used; None if they can. Another package that is called ``apex``
    is known by what it lacks, and nothing of it is run."""
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    if not folders or PathFinder.find_spec("multi_tensor_apply", folders) is None:
        return "NVIDIA's apex is not installed"
    if importlib.util.find_spec("amp_C") is None:
        return "NVIDIA's apex is installed without its CUDA extensions (no amp_C)"
    try:
        importlib.import_module("apex.multi_tensor_apply").multi_tensor_applier  # noqa: B018
        amp_c = importlib.import_module("amp_C")
    except Exception as error:  # a broken package raises anything, and saying what is the point
        return f"NVIDIA's apex does not import ({reason_of(error)})"
    for name, expected in SIGNATURES.items():
        count = _arguments(getattr(amp_c, name, None))
        if count != expected:
            return f"amp_C.{name} of this apex has {count} arguments, not {expected}"
    return None


def _arguments(function: Any) -> int:
    """Of a Python function, or of a compiled one by the first line of its documentation, where
    pybind11 names them arg0, arg1 and so on."""
    try:
        return len(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return len(re.findall(r"\barg\d+: ", (function.__doc__ or "").partition("\n")[0]))
