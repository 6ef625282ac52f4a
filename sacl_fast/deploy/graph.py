"""What the formats that are graphs have in common: the module, what a file says of itself, and a
sentence for what an exporter refuses."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sacl_fast.deploy.network import Network
from sacl_fast.errors import UserError, reason_of

Runner = Callable[[Tensor], Tensor]
"""Images (N, 3, S, S) -> features (N, F)."""

# What exporters and runtimes raise of a model that they cannot follow, translate or run.
REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)


METADATA = "sacl_fast.json"
"""Under which a graph says what it is, where its format has names for that."""


class NotRunHere(Exception):
    """A file was read, and cannot be run on this machine: what that needs."""


class FromUnitRange(nn.Module):
    """An encoder of normalised images as one of images scaled to 0..1."""

    scale: Tensor
    shift: Tensor

    def __init__(self, encoder: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        # Apart from the first convolution: its padding is of zeros after normalisation.
        self.register_buffer("scale", 1 / torch.tensor(std).view(3, 1, 1))
        self.register_buffer("shift", -torch.tensor(mean).view(3, 1, 1) * self.scale)

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, F)
        return self.encoder(images * self.scale + self.shift)


def graph_module(network: Network, fold_norm: bool) -> nn.Module:
    """What the exporters take: (N, 3, S, S) -> (N, F), in eval mode."""
    module = network.module.eval()
    return FromUnitRange(module, network.mean, network.std).eval() if fold_norm else module


def graph_metadata(network: Network, fold_norm: bool) -> dict[str, str]:
    """What a graph says of itself: as the encoder's file, and ``input``: ``0..1`` or
    ``normalised`` images."""
    said = {key: value for key, value in network.metadata.items() if key != "format"}
    return said | {"input": "0..1" if fold_norm else "normalised"}


@contextmanager
def in_one_sentence(network: Network, to: str) -> Iterator[None]:
    """Without the exporters' warnings, and with a sentence for what they refuse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except REFUSALS as error:
        raise UserError(
            f"encoder {network.metadata['encoder']}, width {network.width}, cannot be exported by "
            f"{to}: {reason_of(error)}"
        ) from error
