"""An encoder that is recorded beside its twin that is not."""

import copy

import torch
from torch import nn

from sacl_fast.encoders import build_encoder
from sacl_fast.encoders.resnet20 import ResNet20
from sacl_fast.passes import RecordedEncoder
from sacl_fast.passes.recorded import RecordedMode
from sacl_fast.slim import Slicer
from tests.modules import channels_last

SIZE = 64
RECORDED = 2
"""Passes of a kind that run as ever and are recorded."""


class Pair:
    """An encoder that is recorded and its twin that is not, in step with one another."""

    def __init__(
        self, encoder: nn.Module, ratio: float = 0.4, *, mode: RecordedMode = "skip", **options
    ) -> None:
        self.encoder, self.twin = encoder, copy.deepcopy(encoder)
        self.slicer, self.twins = (Slicer(e, ratio, **options) for e in (self.encoder, self.twin))
        self.mode: RecordedMode = mode
        self.recorded = RecordedEncoder(self.slicer, mode)
        self.skipped = 0
        enter = self.slicer.mode

        def counted(name):
            self.skipped += 1
            return enter(name)

        self.slicer.mode = counted  # type: ignore[method-assign]

    def modules(self):
        return (self.encoder, self.slicer), (self.twin, self.twins)

    def skip(self, x):
        with self.twins.mode(self.mode):
            return self.twin(x)

    def step(self, x, seed=0) -> bool:
        """Both forward, backward and update, which must be equal; whether it was a replay."""
        before = self.skipped
        ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
        results = []
        for run, own in ((self.recorded, ours), (self.skip, theirs)):
            torch.manual_seed(seed)
            out = run(own)
            assert type(out) is torch.Tensor
            weights = torch.linspace(-1, 1, out.numel(), dtype=out.dtype).view(out.shape)
            (out.square() + weights * out).sum().backward()
            torch.manual_seed(seed)  # where it stands after each does not count
            with torch.no_grad():
                results.append((out, run(own)))
        assert all(map(torch.equal, *results))
        self.compare()
        torch.testing.assert_close(ours.grad, theirs.grad, rtol=0, atol=0)
        with torch.no_grad():
            for parts in self.modules():
                for p in (p for part in parts for p in part.parameters()):
                    if p.grad is not None:
                        p -= 0.01 * p.grad / (p.grad.norm() + 1e-3)
                        p.grad = None
        return self.skipped == before

    def compare(self) -> None:
        for part, other in zip(*self.modules(), strict=True):
            for (name, p), q in zip(part.named_parameters(), other.parameters(), strict=True):
                assert (p.grad is None) == (q.grad is None), name
                if p.grad is not None and q.grad is not None:
                    assert torch.equal(p.grad, q.grad), name
            for (name, p), q in zip(part.named_buffers(), other.buffers(), strict=True):
                assert torch.equal(p, q), name

    def replays(self, x, **options) -> bool:
        """Whether passes of this kind are replayed, once they have been seen."""
        seen = [self.step(x, **options) for _ in range(RECORDED + 2)]  # or one more
        assert not any(seen[:RECORDED])
        return seen[-1]


def images(n=4, size=SIZE, dtype=torch.float32):
    torch.manual_seed(1)
    return torch.randn(n, 3, size, size, dtype=dtype).contiguous(memory_format=torch.channels_last)


def encoder_of(name="mobilenetv3_small_100", dtype=torch.float32, **options) -> nn.Module:
    torch.manual_seed(0)
    encoder = build_encoder(name, image_size=SIZE, **{"width": 0.5, **options}).train()
    return channels_last(encoder.to(dtype))


class Odd(ResNet20):
    """A ResNet-20 that does something more to the output of its stem."""

    def __init__(self, what) -> None:
        super().__init__(0.5)
        self.what, self.calls, self.seen = what, 0, torch.ones(1)

    def forward(self, x):
        self.calls += 1
        return super().forward(self.what(self, x))
