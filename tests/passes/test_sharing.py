"""Two passes of a step that add up the gradients of their parameters at once."""

from __future__ import annotations

import gc
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from sacl_fast.passes import Passes, share_gradients
from sacl_fast.slim import Slicer
from tests.passes.pairs import encoder_of, images

RECORDED = 3


class Step:
    """A dense pass and a slim one after it."""

    def __init__(self, *, shared: bool) -> None:
        self.slicer = Slicer(encoder_of("mobilenetv3_small_100"), 0.5)
        passes = Passes("skip", dense="recorded", recorded=True)
        self.dense, self.slim = passes.dense_encoder(self.slicer), passes.slim_encoder(self.slicer)
        self.sharing = share_gradients(self.dense, self.slim) if shared else None
        self.parameters = list(self.slicer.encoder.parameters())
        for _ in range(RECORDED):
            z1, z2 = self.embed()
            (z1.sum() + z2.sum()).backward()
        self.clear()

    def clear(self) -> None:
        for p in self.parameters:
            p.grad = None

    def embed(self):
        found = self.dense(images()), self.slim(images())
        if self.sharing is not None:
            self.sharing.forget()
        return found

    def gradients(self, of=lambda z1, z2: (z1 * z2).sum(), **options):
        torch.manual_seed(0)
        of(*self.embed()).backward(**options)
        found = [None if p.grad is None else p.grad.clone() for p in self.parameters]
        self.clear()
        return found


@pytest.fixture(scope="module")
def steps():
    return Step(shared=True), Step(shared=False)


def equal(steps, of) -> None:
    shared, alone = (step.gradients(of) for step in steps)
    for ours, theirs in zip(shared, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_the_gradients_are_those_of_both(steps):
    for _ in range(2):
        equal(steps, lambda z1, z2: (z1 * z2).square().sum())


def test_only_one_of_both_has_a_gradient(steps):
    equal(steps, lambda z1, z2: z1.square().sum())
    equal(steps, lambda z1, z2: z2.square().sum())
    equal(steps, lambda z1, z2: (z1.detach() * z2).sum())
    equal(steps, lambda z1, z2: (z1 * z2).sum())


def test_gradients_of_some_parameters_alone(steps):
    found = []
    for step in steps:
        z1, z2 = step.embed()
        some = step.parameters[:3]
        found.append(torch.autograd.grad((z1 * z2).sum(), some))
    for pair in zip(*found, strict=True):
        torch.testing.assert_close(*pair, rtol=1e-5, atol=1e-6)
    equal(steps, lambda z1, z2: z1.sum() + z2.sum())  # nothing of that is left


def test_backward_twice(steps):
    for step in steps:
        z1, z2 = step.embed()
        loss = (z1 * z2).sum()
        loss.backward(retain_graph=True)
        once = [p.grad.clone() for p in step.parameters if p.grad is not None]
        loss.backward()
        twice = [p.grad for p in step.parameters if p.grad is not None]
        for a, b in zip(once, twice, strict=True):
            torch.testing.assert_close(2 * a, b)
        step.clear()


class Additions(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if "add" in name and "addmm" not in name:
            self.found.append(name)
        return func(*args, **(kwargs or {}))


def test_no_parameter_has_an_addition_of_its_own(steps):
    counts = []
    for step in steps:
        z1, z2 = step.embed()
        with Additions() as additions:
            (z1.sum() + z2.sum()).backward()
        counts.append(additions.found.count("add"))
        step.clear()
    shared, alone = counts
    assert alone - shared >= len(steps[0].parameters) - 5  # what the slim pass does not reach


def test_a_pass_is_freed_when_its_result_is():
    step = Step(shared=True)
    gc.disable()
    try:
        z1, z2 = step.embed()
        held = [weakref.ref(z.grad_fn) for z in (z1, z2)]
        (z1 * z2).sum().backward()
        del z1, z2
        assert [ref() for ref in held] == [None, None]
    finally:
        gc.enable()
