"""Lists of channel numbers, kept on the host and on the device, and what is derived from them.

Which channels two activations have in common, or which filters read which channels, is worked out
on the host from the masks that were read there when they were chosen. A training step therefore
never waits for the device to learn a size, and equal lists are one object: deriving the same list
again is a look-up.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor


class Channels:
    """Numbers of channels, in the order in which a tensor holds them. Made by ``channels``."""

    def __init__(self, numbers: np.ndarray) -> None:
        self.numbers = numbers
        self._on: dict[torch.device, Tensor] = {}
        self.in_order = bool((numbers == np.arange(len(numbers))).all())

    def __len__(self) -> int:
        return len(self.numbers)

    def __repr__(self) -> str:
        return f"Channels({self.numbers.tolist()})"

    def index(self, device: torch.device, of: int) -> Tensor | None:
        """As an index (K,) into ``of`` channels; None where it is all of them in order."""
        if self.in_order and len(self) == of:
            return None
        return self.on(device)

    def on(self, device: torch.device) -> Tensor:
        if device not in self._on:
            with torch.inference_mode(False):  # whatever is running: training may use it later
                self._on[device] = torch.from_numpy(self.numbers.copy()).to(device)
        return self._on[device]


def channels(numbers: Iterable[int] | np.ndarray) -> Channels:
    array = numbers if isinstance(numbers, np.ndarray) else np.fromiter(numbers, np.int64)
    return _interned(np.ascontiguousarray(array, np.int64).tobytes())


@lru_cache(maxsize=16384)
def _interned(raw: bytes) -> Channels:
    return Channels(np.frombuffer(raw, np.int64))


@lru_cache(maxsize=4096)
def all_channels(count: int) -> Channels:
    return channels(np.arange(count))


@lru_cache(maxsize=16384)
def complement(kept: Channels, count: int) -> Channels:
    """Those of ``count`` channels that are not kept."""
    return channels(np.setdiff1d(np.arange(count), kept.numbers))


@lru_cache(maxsize=16384)
def common(a: Channels, b: Channels) -> tuple[Channels, Channels, Channels]:
    """The channels in both lists, and their positions in ``a`` and in ``b``."""
    both, in_a, in_b = np.intersect1d(a.numbers, b.numbers, assume_unique=True, return_indices=True)
    order = np.argsort(in_a)  # as ``a`` has them, so that its own tensor needs no shuffling
    return channels(both[order]), channels(in_a[order]), channels(in_b[order])


@lru_cache(maxsize=16384)
def readers(read: Channels, kept: Channels, multiplier: int) -> tuple[Channels, Channels]:
    """The kept depthwise filters that read one of some channels, and the positions they read.

    Filter ``o`` reads channel ``o // multiplier``.
    """
    position = {int(c): i for i, c in enumerate(read.numbers)}
    pairs = [
        (int(o), position[int(o) // multiplier])
        for o in kept.numbers
        if int(o) // multiplier in position
    ]
    return channels(o for o, _ in pairs), channels(p for _, p in pairs)


MULTIPLES = {"cuda": 8}
"""Device -> the number of live channels is filled up to a multiple of this, where constants are
left to fill it from: 16 bytes in half precision, as kernels and matrix products read them. (Not on
CPUs: there it takes MobileNet-V1 1.00 to 1.02 and MobileNet-V3-Large 1.01 to 1.03 of the time, 16
images of 64 x 64, one core.)"""


def missing(count: int, device: torch.device) -> int:
    """Live channels that ``count`` of them lack to be such a multiple."""
    return -count % MULTIPLES.get(device.type, 1)


@lru_cache(maxsize=16384)
def zeroed_readers(read: Channels, kept: Channels, count: int) -> tuple[Channels, Channels]:
    """The first ``count`` depthwise filters that are not kept and read one of some channels, and
    the positions they read; none where there are not as many."""
    positions = np.flatnonzero(~np.isin(read.numbers, kept.numbers))[:count]
    if len(positions) < count:
        positions = positions[:0]
    return channels(read.numbers[positions]), channels(positions)


@lru_cache(maxsize=16384)
def shifted(a: Channels, by: int) -> Channels:
    return channels(a.numbers + by)


def first_of(a: Channels, count: int) -> Channels:
    """The first ones; none where there are not as many."""
    return channels(a.numbers[: count if count <= len(a) else 0])


@lru_cache(maxsize=16384)
def joined(*lists: Channels) -> Channels:
    return channels(np.concatenate([a.numbers for a in lists]))


@lru_cache(maxsize=16384)
def channels_between(a: Channels, start: int, stop: int) -> tuple[Channels, Channels]:
    """Those numbered ``start`` to ``stop - 1``, counted from ``start``; and their positions."""
    positions = np.flatnonzero((a.numbers >= start) & (a.numbers < stop))
    return channels(a.numbers[positions] - start), channels(positions)


@lru_cache(maxsize=16384)
def live_in_either(
    live_a: Channels, rest_a: Channels, live_b: Channels, rest_b: Channels, device: torch.device
) -> tuple[Channels, Channels, Channels]:
    """For the sum of two activations of the same channels: those that are live in either, or fill
    them up, and which of a's, and of b's, live channels and then constants they are."""
    both_a, both_b = joined(live_a, rest_a), joined(live_b, rest_b)
    either = joined(live_a, channels(np.setdiff1d(live_b.numbers, live_a.numbers)))
    if live_a is not live_b:  # else no channel moves, and their gradients are that of the sum
        either = joined(
            either, first_of(complement(either, len(both_a)), missing(len(either), device))
        )
    in_a, in_b = (channels(np.argsort(both.numbers)[either.numbers]) for both in (both_a, both_b))
    return either, in_a, in_b
