"""The recorded encoder against mode ``skip`` or ``whole``, to the bit, and what makes it record
anew."""

import copy
import pickle
from typing import Any, get_args

import pytest
import torch
from torch import nn

from sacl_fast.passes import RecordedEncoder
from sacl_fast.passes.recorded import RecordedMode
from sacl_fast.slim import Slicer
from tests.modules import channels_last
from tests.passes.pairs import RECORDED, Odd, Pair, encoder_of, images


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])  # compiled operators, PyTorch's
@pytest.mark.parametrize(
    "name",
    ["mobilenetv1_100", "mobilenetv3_small_100", "efficientnet_b0", "resnet18", "regnety_002"],
)
def test_equals_skip_to_the_bit(name, dtype):
    width = 1.0 if name == "regnety_002" else 0.5
    pair = Pair(encoder_of(name, dtype, width=width))
    assert pair.replays(images(dtype=dtype))
    assert pair.step(2 * images(dtype=dtype))  # other values


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "name", ["mobilenetv1_100", "efficientnet_b0", "resnet50", "convnext_atto", "regnety_002"]
)
def test_equals_whole_to_the_bit(name, dtype):
    width = 1.0 if name in ("convnext_atto", "regnety_002") else 0.25
    pair = Pair(encoder_of(name, dtype, width=width), mode="whole")
    assert pair.replays(images(n=3, dtype=dtype))
    assert pair.step(2 * images(n=3, dtype=dtype))  # other values


@pytest.mark.parametrize("name", ["convnext_atto", "ghostnet_050"])
def test_what_the_algebra_makes_dense_is_recorded_too(name):
    assert Pair(encoder_of(name, width=1.0)).replays(images())


def test_random_numbers_are_drawn_anew():
    for mode in get_args(RecordedMode):
        pair, x = Pair(encoder_of("efficientnet_b0", drop_path=0.5), mode=mode), images()
        assert pair.replays(x)
        assert not torch.equal(pair.recorded(x), pair.recorded(x))
    pair = Pair(encoder_of("efficientnet_b0", drop_path=0.5))
    seeds = iter(range(10))
    assert [pair.step(images(), seed=next(seeds)) for _ in range(6)] == [False] * 2 + [True] * 4


def test_separate_batch_norms():
    assert Pair(encoder_of(), batch_norm="separate").replays(images())


def test_masks_decide():
    pair = Pair(encoder_of())
    assert pair.replays(images())
    for slicer in (pair.slicer, pair.twins):
        slicer.refresh()
    kept = pair.slicer.kept
    with torch.no_grad():
        for encoder in (pair.encoder, pair.twin):
            for conv in (m for m in encoder.modules() if isinstance(m, nn.Conv2d)):
                conv.weight.copy_(conv.weight.flip(0))
    for slicer in (pair.slicer, pair.twins):
        slicer.refresh()
    assert kept != pair.slicer.kept and pair.replays(images())
    for slicer in (pair.slicer, pair.twins):
        slicer.enabled = False  # dense, which is not recorded
    assert not any(pair.step(images()) for _ in range(5))
    for slicer in (pair.slicer, pair.twins):
        slicer.enabled = True
    assert pair.step(images())


@pytest.mark.parametrize("name", ["resnet18", "vit_tiny_patch16_224"])
@pytest.mark.parametrize("ratio", [0.5, 1.0])
def test_the_dense_encoder_does_not_depend_on_masks(name, ratio):
    width = 0.5 if name == "resnet18" else 1.0
    pair = Pair(encoder_of(name, width=width), ratio, mode="whole", batch_norm="separate")
    assert pair.replays(images())
    for slicer in (pair.slicer, pair.twins):
        slicer.enabled = False
        for mask in slicer.masks.values():
            mask.copy_(mask.flip(0))
        slicer.load_state_dict(slicer.state_dict())
        slicer.norm_gradient = "damped"
    assert pair.step(images())


def test_the_form_of_the_images_decides():
    pair = Pair(encoder_of("resnet18"))
    assert pair.replays(images())
    assert pair.replays(images(n=3))  # the last batch of an epoch
    assert pair.step(images())  # and the others are not forgotten
    assert pair.replays(images().contiguous())
    assert pair.replays(images(size=48))


def test_the_mode_of_modules_and_weights_decides():
    pair = Pair(encoder_of("resnet18"))
    assert pair.replays(images())

    def both(change):
        for encoder in (pair.encoder, pair.twin):
            change(encoder)

    both(lambda e: e.eval())
    assert pair.replays(images())
    both(lambda e: e.bn1.train())
    assert pair.replays(images())
    both(lambda e: e.conv1.requires_grad_(False))
    assert pair.replays(images())
    both(lambda e: setattr(e.layer1[0].bn1, "weight", nn.Parameter(torch.full((32,), 0.7))))
    assert pair.replays(images())
    both(lambda e: e.load_state_dict({k: v * 1.01 for k, v in e.state_dict().items()}))
    assert pair.step(images())  # the same memory
    both(lambda e: e.double())
    pair.slicer.double()
    pair.twins.double()
    assert pair.replays(images(dtype=torch.float64))


def test_inference_and_frozen_encoders():
    pair = Pair(encoder_of("resnet18").eval())
    for _ in range(5):
        with torch.inference_mode():
            assert torch.equal(pair.recorded(images()), pair.skip(images()))
    for p in (*pair.encoder.parameters(), *pair.twin.parameters()):
        p.requires_grad_(False)
    replayed = []
    for _ in range(5):
        before = pair.skipped
        out = pair.recorded(images())
        assert not out.requires_grad and torch.equal(out, pair.skip(images()))
        replayed.append(pair.skipped == before)
    assert replayed[-1]


def test_all_weights_learn_under_autocast():
    """Whose cache of weights in half precision holds those of the passes before."""
    encoder, x = encoder_of("resnet18"), images()
    slicer = Slicer(encoder, 0.5)
    recorded = RecordedEncoder(slicer)
    results = []
    for _ in range(RECORDED + 2):
        encoder.zero_grad()
        with torch.autocast("cpu", torch.bfloat16):
            (encoder(x).float().sum() + recorded(x).float().square().sum()).backward()
        results.append([p.grad.clone() for p in encoder.parameters()])
        with torch.no_grad():
            for p in encoder.parameters():
                p *= 1.0  # in place; another cast
    for first, *others in zip(*results, strict=True):
        for other in others:
            assert (other - first).norm() < 0.05 * first.norm() + 1e-3
    with torch.no_grad():
        for p in encoder.parameters():
            p.zero_()
    with torch.autocast("cpu", torch.bfloat16):
        assert not recorded(x).any()  # no cast of old weights


def test_gradients_as_autograd_gives_them():
    pair, x = Pair(encoder_of("mobilenetv1_100")), images()
    for _ in range(RECORDED + 1):
        pair.recorded(x).sum().backward()
        pair.skip(x).sum().backward()
    out, twin = pair.recorded(x), pair.skip(x)
    for _ in range(2):  # a retained graph
        for o in (out, twin):
            o.sum().backward(retain_graph=True)  # an expanded gradient
        pair.compare()
    with pytest.raises(RuntimeError, match="twice"):
        weight = pair.encoder.get_parameter("conv_stem.weight")
        (gradient,) = torch.autograd.grad(out.square().sum(), weight, create_graph=True)
        gradient.sum().backward()
    out = pair.recorded(x)
    with torch.no_grad():
        for p in pair.encoder.parameters():
            p.add_(1)
    with pytest.raises(RuntimeError, match=r"modified .*inplace"):
        out.sum().backward()
    pair.recorded(x)  # a result that nobody differentiates
    assert pair.recorded(x).requires_grad


def test_hooks_are_called():
    pair, x, seen = Pair(encoder_of("resnet18")), images(), []
    for _ in range(4):
        pair.recorded(x).sum().backward()
    stage = pair.encoder.get_submodule("layer1")
    handle = stage.register_forward_hook(lambda *call: seen.append(call[0]))
    for _ in range(5):
        pair.recorded(x)
    assert len(seen) == 5
    handle.remove()
    weight = pair.encoder.get_parameter("conv1.weight")
    handle = weight.register_hook(lambda gradient: seen.append(gradient))
    for _ in range(5):
        pair.recorded(x).sum().backward()
    assert len(seen) == 10
    handle.remove()
    before = pair.skipped
    pair.recorded(x)
    assert pair.skipped == before


def test_copies_record_for_themselves():
    pair, x = Pair(encoder_of("resnet18")), images()
    del pair.slicer.mode  # the counter, which cannot be copied
    for _ in range(RECORDED + 1):
        with torch.no_grad():
            pair.recorded(x)
    for made in (copy.deepcopy(pair.recorded), pickle.loads(pickle.dumps(pair.recorded))):
        with torch.no_grad():
            for p in made.slicer.encoder.parameters():
                p.zero_()
            assert not made(x).any()
            assert pair.recorded(x).any()


def test_a_mask_that_keeps_the_shape_is_recorded():
    def doubles_some(module, x):
        return x.masked_fill(x > 0.5, 0.0) + torch.where(x[:, :1] < 0, x, 2 * x)

    pair = Pair(channels_last(Odd(doubles_some)))
    assert pair.replays(images())
    assert pair.step(-images())


def test_indices_by_number_are_recorded():
    order = torch.tensor([2, 1, 0])
    encoder = Odd(lambda module, x: x[:, module.order])
    encoder.register_buffer("order", order)
    assert Pair(channels_last(encoder)).replays(images())


def test_cumulative_batch_norm_reads_its_counter():
    encoder = encoder_of("resnet18")
    norm = encoder.get_submodule("bn1")
    assert isinstance(norm, nn.BatchNorm2d)
    norm.momentum = None
    pair = Pair(encoder)
    assert not any(pair.step(images()) for _ in range(6))


def test_memory_is_that_of_skip():
    """At the peak, of live tensors: what backward has read is not held until its end."""
    from torch.profiler import ProfilerActivity, profile

    encoder, x = encoder_of("resnet18"), images(n=16, size=64)
    slicer = Slicer(encoder, 0.5)
    recorded = RecordedEncoder(slicer)

    def skip(x):
        with slicer.mode("skip"):
            return encoder(x)

    def peak(run) -> int:
        encoder.zero_grad()
        with profile(
            activities=[ProfilerActivity.CPU], profile_memory=True, acc_events=True
        ) as profiler:
            run(x).sum().backward()
        assert profiler.profiler is not None and profiler.profiler.kineto_results is not None
        events: list[Any] = profiler.profiler.kineto_results.events()
        held = peak = 0
        for event in sorted(events, key=lambda e: e.start_ns()):
            if event.name() == "[memory]":
                held += event.nbytes()
                peak = max(peak, held)
        return peak

    for _ in range(RECORDED + 1):
        recorded(x).sum().backward()
        skip(x).sum().backward()
    assert peak(recorded) < 1.15 * peak(skip)
