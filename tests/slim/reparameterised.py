"""An encoder whose blocks give norms constant channels."""

import torch
from torch import nn


class Reparameterised(nn.Module):
    """Blocks of a residual stream that no block fills in all channels, as RepViT's: depthwise
    filters of two sizes and nothing, added, normalised, then a gated bottleneck."""

    def __init__(self, width: int = 12, blocks: int = 4, classes: int = 5) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width))
        self.blocks = nn.ModuleList(Block(width) for _ in range(blocks))
        self.head = nn.Conv2d(width, classes, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.stem(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).mean((2, 3))


class Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.large = nn.Conv2d(width, width, 3, padding=1, groups=width, bias=False)
        self.large_norm = nn.BatchNorm2d(width)
        self.small = nn.Conv2d(width, width, 1, groups=width)
        self.norm = nn.BatchNorm2d(width)
        self.up, self.up_norm = nn.Conv2d(width, 2 * width, 1), nn.BatchNorm2d(2 * width)
        self.down, self.down_norm = nn.Conv2d(2 * width, width, 1), nn.BatchNorm2d(width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.norm(self.large_norm(self.large(x)) + self.small(x) + x)
        y = nn.functional.gelu(self.up_norm(self.up(x)))
        y = y * y.mean((2, 3), keepdim=True).sigmoid()
        return x + self.down_norm(self.down(y))
