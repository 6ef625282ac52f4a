"""``--deterministic``: a run that gives the same figures every time, to the bit, on one device.

Torch takes operations that add up in a fixed order, or says which one it has no such form of. What
a run would choose by time (cuDNN's algorithms, the plan of the passes) is chosen by rule. The
project's own kernels have a fixed order anyway.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager

import torch

from sacl_fast.errors import UserError

_CUBLAS = "CUBLAS_WORKSPACE_CONFIG"  # read by cuBLAS when it starts
_FIXED = (":4096:8", ":16:8")  # those with which it is deterministic, by CUDA's documentation


@contextmanager
def deterministic(on: bool) -> Iterator[None]:
    """Within it, where ``on``, torch is deterministic; afterwards its settings are what they were.

    Raises:
        UserError: an operation has no deterministic form here; or CUDA was started before, without
            what it takes.
    """
    if not on:
        yield
        return
    with ExitStack() as undo:
        _fix_cublas(undo)
        _fix_torch(undo)
        try:
            yield
        except RuntimeError as error:
            found = re.match(r"(\S+) does not have a deterministic implementation", str(error))
            if found is None:
                raise
            raise UserError(
                f"{found[1]} has no deterministic form on this device, and deterministic is on; "
                "--no-deterministic works, or an encoder without that operation"
            ) from error


def _fix_cublas(undo: ExitStack) -> None:
    given = os.environ.get(_CUBLAS)
    if given in _FIXED:
        return
    if torch.cuda.is_initialized():
        raise UserError(
            f"deterministic is on, but CUDA was started in this process with {_CUBLAS} "
            f"{given or 'not set'}; {_CUBLAS}={_FIXED[0]} in the environment works"
        )
    os.environ[_CUBLAS] = _FIXED[0]
    if given is None:
        undo.callback(os.environ.pop, _CUBLAS, None)
    else:
        undo.callback(os.environ.__setitem__, _CUBLAS, given)


def _fix_torch(undo: ExitStack) -> None:
    was_on = torch.are_deterministic_algorithms_enabled()
    only_warned = torch.is_deterministic_algorithms_warn_only_enabled()
    undo.callback(torch.use_deterministic_algorithms, was_on, warn_only=only_warned)
    torch.use_deterministic_algorithms(True)
    for module, name, value in (
        (torch.backends.cudnn, "deterministic", True),
        (torch.backends.cudnn, "benchmark", False),
        # Or memory is filled before it is written, for who reads what nobody wrote.
        (torch.utils.deterministic, "fill_uninitialized_memory", False),
    ):
        undo.callback(setattr, module, name, getattr(module, name))
        setattr(module, name, value)
