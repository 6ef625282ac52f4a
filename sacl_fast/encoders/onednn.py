"""A fault of oneDNN, which computes convolutions on CPUs, and the way around it."""

from __future__ import annotations

from functools import partial

import torch.nn.functional as F
from torch import Tensor, nn

from sacl_fast.ops.slim_channels import take_pixels


def avoid_memory_overwrite(model: nn.Module) -> None:
    """Compute some convolutions differently, in training of which oneDNN overwrites memory.

    For the weight gradient of a 1x1 convolution with a stride, in channels-last memory, of fewer
    than 16 channels it reserves too little (seen with version 3.10 in torch 2.11, by AVX-512 and
    by AVX2, where a few steps of a narrow ResNet end in "double free or corruption").
    """
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and type(module).forward is nn.Conv2d.forward  # others may change the weight
            and (module.kernel_size, module.padding) == ((1, 1), (0, 0))
            and (module.stride != (1, 1) and module.groups == 1 and module.in_channels < 16)
        ):
            module.forward = partial(_convolve_pixels_that_are_read, module)


def _convolve_pixels_that_are_read(conv: nn.Conv2d, input: Tensor) -> Tensor:
    if type(input) is not Tensor:  # of another kind, which convolves in its own way
        return nn.Conv2d.forward(conv, input)
    down, right = conv.stride
    return F.conv2d(take_pixels(input, (down, right)), conv.weight, conv.bias)
