"""A case, computed twice: as a run does, and in float64 by plain PyTorch on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor

# Of the largest value. Far above rounding, of which a wrong figure here would be taken for a wrong
# kernel (tests/ops and tests/cuda hold them to 1/20 of these and less), far below what a wrong
# index, a forgotten row or a lost term do to cases as small as these.
TOLERANCES = {torch.float32: 2e-4, torch.bfloat16: 6e-2}


class Wrong(Exception):
    """The operator's results are not those of plain PyTorch; the text says which."""


class Here:
    """Where and how a case is computed, and its random tensors: the same wherever that is.

    All are drawn in float32 and rounded to the number type that is checked.
    """

    def __init__(
        self, device: torch.device, backend: str, checked: torch.dtype, dtype: torch.dtype
    ) -> None:
        self.device = device
        self.backend = backend
        self.checked = checked
        """The type of activations that is checked."""
        self.dtype = dtype
        """Their type here: that, or float64."""
        self._generator = torch.Generator().manual_seed(0)

    @property
    def precise(self) -> torch.dtype:
        """The type of parameters and statistics here."""
        return torch.float64 if self.dtype == torch.float64 else torch.float32

    def drawn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self._generator).to(self.checked).float()

    def values(self, *shape: int, shift: float = 0.0) -> Tensor:
        """Of the activations' type."""
        return (self.drawn(*shape) + shift).to(self.checked).to(self.device, self.dtype)

    def images(self, *shape: int, shift: float = 0.0) -> Tensor:
        """(N, C, H, W) in channels-last memory, of the activations' type."""
        return self.values(*shape, shift=shift).contiguous(memory_format=torch.channels_last)

    def parameters(self, *shape: int) -> Tensor:
        return self.drawn(*shape).to(self.device, self.precise)

    def affine(self, channels: int) -> Tensor:
        """(4, C): scale, bias, mean and 1 / deviation of a norm."""
        scale, bias, mean, rstd = self.drawn(4, channels)
        return torch.stack([scale, bias, mean, 0.5 + rstd.abs()]).to(self.device, self.precise)

    def order(self, count: int) -> Tensor:
        """(count,) int64, the numbers below ``count``."""
        return torch.randperm(count, generator=self._generator).to(self.device)

    def with_gradients(
        self, outputs: Mapping[str, Tensor], leaves: Mapping[str, Tensor]
    ) -> dict[str, Tensor]:
        """The outputs, and the leaves' gradients for random ones of the outputs."""
        given = [
            self.images(*y.shape) if y.ndim == 4 else self.values(*y.shape).to(y.dtype)
            for y in outputs.values()
        ]
        found = torch.autograd.grad(list(outputs.values()), list(leaves.values()), given)
        named = {f"gradient of {name}": g for name, g in zip(leaves, found, strict=True)}
        return {**outputs, **named}


Case = Callable[[Here], dict[str, Tensor]]


def compare(case: Case, device: torch.device, backend: str, dtypes: Sequence[torch.dtype]) -> None:
    """Hold a case on a device against float64.

    Raises:
        Wrong: a result is further off than rounding explains, is no number, or has another shape.
    """
    for dtype in dtypes:
        found = case(Here(device, backend, dtype, dtype))
        exact = case(Here(torch.device("cpu"), "torch", dtype, torch.float64))
        assert found.keys() == exact.keys(), "a case has the same results wherever it runs"
        for name, value in found.items():
            if why := _difference(value, exact[name], TOLERANCES[dtype]):
                raise Wrong(f"{str(dtype).removeprefix('torch.')}: {name} {why}")


def _difference(found: Tensor, exact: Tensor, tolerance: float) -> str | None:
    if found.shape != exact.shape:
        return f"is {tuple(found.shape)}, not {tuple(exact.shape)}"
    if not exact.numel():
        return None
    found, exact = found.detach().double().cpu(), exact.detach().double().cpu()
    off = ((found - exact).abs().max() / exact.abs().max().clamp(min=1e-3)).item()
    if off <= tolerance:  # not so for NaN
        return None
    return f"is off by {off:.2g} of its largest value"
