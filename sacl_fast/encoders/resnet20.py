"""ResNet-20 for 32 px images (He et al., CVPR 2016, Section 4.2), of timm's blocks.

timm's ``ResNet`` fixes four stages and a stem of 64 channels, so the network is put together
here; blocks, names and initialisation are timm's. Down-sampling shortcuts are 1x1 convolutions.
"""

from __future__ import annotations

from timm.models.resnet import BasicBlock, make_blocks
from torch import Tensor, nn


class ResNet20(nn.Module):
    """Three stages of three basic blocks, 16, 32 and 64 channels times ``width``."""

    pretrained_cfg = {"classifier": "fc"}  # noqa: RUF012  as timm's models say it
    layer1: nn.Module
    layer2: nn.Module
    layer3: nn.Module

    def __init__(self, width: float = 1.0, in_chans: int = 3, drop_path_rate: float = 0.0) -> None:
        super().__init__()
        channels = tuple(max(1, round(c * width)) for c in (16, 32, 64))
        self.conv1 = nn.Conv2d(in_chans, channels[0], 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(channels[0])
        self.act1 = nn.ReLU(inplace=True)
        stages, _ = make_blocks(
            (BasicBlock,) * 3,
            channels,
            (3, 3, 3),
            inplanes=channels[0],
            drop_path_rate=drop_path_rate,
        )
        for name, stage in stages:
            self.add_module(name, stage)
        self.num_features = channels[-1]
        self.fc: nn.Module = nn.Identity()
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")

    def forward(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, 64 * width)
        x = self.act1(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.fc(x.mean((2, 3)))

    def reset_classifier(self, num_classes: int) -> None:
        """Give logits (N, num_classes) from now on, as timm's models do after theirs."""
        self.fc = nn.Linear(self.num_features, num_classes)
