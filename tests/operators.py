"""Which of PyTorch's operators run."""

from collections import Counter
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


class Operators(TorchDispatchMode):
    """Counts by name the operators that run within it."""

    def __init__(self) -> None:
        super().__init__()
        self.count: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


class Convolutions(TorchDispatchMode):
    """Notes the backward passes of convolutions: weight, stride, whether in channels-last."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten.convolution_backward.default:
            _, x, weight, _, stride, *_ = args
            last = x.is_contiguous(memory_format=torch.channels_last)
            self.seen.append((tuple(weight.shape), tuple(stride), last))
        return func(*args, **kwargs or {})

    def narrow(self):
        """Of 1x1 convolutions with a stride and fewer than 16 channels: whether in channels-last,
        where oneDNN overwrites memory."""
        return [
            last
            for (_, channels, *kernel), stride, last in self.seen
            if kernel == [1, 1] and stride != (1, 1) and channels < 16
        ]
