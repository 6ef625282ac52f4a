"""A convolution that is slim by itself, for models of one's own; a ``Slicer`` needs none."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sacl_fast.checks import Ratio, checked
from sacl_fast.errors import UserError
from sacl_fast.slim.channels import Channels, channels
from sacl_fast.slim.slicer import strongest_filters
from sacl_fast.slim.tensor import KeptFilters, SlimTensor, dense


class SlimConv2d(nn.Conv2d):
    """``nn.Conv2d`` of which only the kept filters are computed; the others give 0.

    The weight stays full, and so does its gradient, which is 0 for the filters that are not kept.
    Given a ``SlimTensor`` (inside ``Slicer.mode("skip")``) it returns one, else an ordinary tensor.
    """

    mask: Tensor

    @checked
    def __init__(self, *args: Any, ratio: Ratio = 1.0, **kwargs: Any) -> None:
        """As ``nn.Conv2d``; ``ratio``: as of ``keep``."""
        super().__init__(*args, **kwargs)
        filters = torch.ones(self.out_channels, dtype=torch.bool, device=self.weight.device)
        self.register_buffer("mask", filters)
        self.register_load_state_dict_post_hook(lambda module, _: module._read_mask())
        self.keep(ratio)

    @torch.no_grad()
    @checked
    def keep(self, kept: Ratio | Tensor) -> None:
        """Choose the filters: ``int(kept * Cout)``, at least 1, of largest L1 norm, or those where
        a mask (Cout,) is true."""
        mask = kept if isinstance(kept, Tensor) else strongest_filters(self.weight, kept)
        if mask.shape != self.mask.shape or not mask.any():
            raise UserError(
                f"a mask of shape {tuple(mask.shape)} that keeps {int(mask.sum())} filters; one of "
                f"shape ({self.out_channels},) that keeps at least one works"
            )
        self.mask.copy_(mask)
        self._read_mask()

    def _read_mask(self) -> None:
        """On the host, so that no forward pass has to ask."""
        self._kept: Channels = channels(self.mask.cpu().numpy().nonzero()[0])

    def forward(self, input: Tensor) -> Tensor:
        """(N, Cin, H, W) -> (N, Cout, H', W')"""
        if self.padding_mode != "zeros":
            input = F.pad(input, self._reversed_padding_repeated_twice, mode=self.padding_mode)
        padding = self.padding if self.padding_mode == "zeros" else 0
        weight, bias = (
            None if p is None else KeptFilters(p, self.mask, self._kept)
            for p in (self.weight, self.bias)
        )
        y = F.conv2d(input, weight, bias, self.stride, padding, self.dilation, self.groups)  # type: ignore[arg-type]
        return y if isinstance(input, SlimTensor) else dense(y)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, kept={len(self._kept)}"
