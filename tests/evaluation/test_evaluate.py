"""Evaluation as the trainer calls it: the right network, and training none the wiser."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from sacl_fast.config import EvalConfig
from sacl_fast.errors import UserError
from sacl_fast.evaluation.evaluate import evaluate_encoders, first_images
from sacl_fast.evaluation.features import extract_features
from sacl_fast.slim.slicer import Slicer

CPU = torch.device("cpu")
CONFIG = EvalConfig(k=5, recalibrate_batches=2, batch_size=16, rank_images=0)


def loader(n: int, shuffle: bool = False, seed: int = 0) -> DataLoader[tuple[Tensor, ...]]:
    """Images (3, 8, 8) of three classes that differ in the mean of one channel."""
    g = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % 3
    images = torch.randn(n, 3, 8, 8, generator=g) + torch.eye(3)[labels].view(n, 3, 1, 1)
    return DataLoader(TensorDataset(images, labels), batch_size=16, shuffle=shuffle)


def network(ratio: float = 0.5) -> tuple[nn.Sequential, Slicer]:
    torch.manual_seed(0)
    encoder = nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Dropout(0.2),
        nn.Conv2d(8, 8, 3, stride=2),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    return encoder.train(), Slicer(encoder, ratio=ratio)


def evaluate(encoder: nn.Module, slicer: Slicer, config: EvalConfig = CONFIG, **more: Any):
    options = {"device": CPU, "amp_dtype": None} | more
    return evaluate_encoders(encoder, slicer, loader(90), loader(30, seed=1), config, 3, **options)


@pytest.mark.parametrize(
    ("encoders", "keys"),
    [
        ("both", ["knn_dense", "knn_slim"]),
        ("dense", ["knn_dense"]),
        ("slim", ["knn_slim"]),
    ],
)
def test_the_encoders_asked_for_are_evaluated(encoders: Any, keys: list[str]):
    config = EvalConfig(k=5, recalibrate_batches=2, encoders=encoders, rank_images=0)
    scores = evaluate(*network(), config)
    assert list(scores) == keys
    assert all(45 < score <= 100 for score in scores.values())  # chance: 33


@pytest.mark.parametrize("encoders", ["both", "slim"])
def test_one_network_is_evaluated_once(encoders: Any):
    encoder, slicer = network(ratio=1.0)
    assert not slicer.active
    passes = []
    encoder.register_forward_hook(lambda *_: passes.append(1))
    scores = evaluate(
        encoder, slicer, EvalConfig(k=5, recalibrate_batches=2, encoders=encoders, rank_images=0)
    )
    assert list(scores) == ["knn_dense"]
    assert len(passes) == 2 + 6 + 2


def test_each_width_has_its_own_statistics_and_filters():
    """Features are kept from inside: the slim ones have constant channels, the dense ones none,
    and each network's are normalised by its own statistics."""
    encoder, slicer = network()
    features: list[Tensor] = []
    probe = encoder[5]

    def keep(module: nn.Module, given: tuple[Tensor, ...], out: Tensor) -> None:
        features.append(out)

    probe.register_forward_hook(keep)
    evaluate(encoder, slicer)
    dense, slim = features[2], features[2 + 6 + 2 + 2]  # each the first batch after estimating
    assert (dense.std(dim=(0, 2, 3)) > 0.1).all()
    assert (slim.std(dim=(0, 2, 3)) < 1e-6).sum() == 4
    for out in (dense, slim):
        live = out.std(dim=(0, 2, 3)) > 0.1
        assert (out.mean(dim=(0, 2, 3)).abs()[live] < 0.3).all()
        assert ((out.std(dim=(0, 2, 3)) - 1).abs()[live] < 0.3).all()


def test_training_is_undisturbed():
    def train(evaluating: bool) -> tuple[list[Tensor], Tensor]:
        encoder, slicer = network()
        optimizer = torch.optim.SGD(encoder.parameters(), lr=0.1)
        for images, labels in loader(32, shuffle=True):
            with slicer.mode("mask"):
                loss = nn.functional.cross_entropy(encoder(images), labels)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if evaluating:
                evaluate(encoder, slicer)
        return list(encoder.state_dict().values()), torch.get_rng_state()

    (plain, plain_rng), (evaluated, evaluated_rng) = train(False), train(True)
    assert all(torch.equal(a, b) for a, b in zip(plain, evaluated, strict=True))
    assert torch.equal(plain_rng, evaluated_rng)


def test_random_numbers_are_given_back_after_an_error():
    encoder, slicer = network()
    state = torch.get_rng_state()

    def breaking():
        yield from loader(32, shuffle=True)
        raise OSError("unreadable")

    with pytest.raises(OSError, match="unreadable"):
        evaluate_encoders(
            encoder, slicer, loader(90), breaking(), CONFIG, 3, device=CPU, amp_dtype=None
        )
    assert torch.equal(state, torch.get_rng_state())
    assert encoder.training
    with slicer.mode("mask"):  # left in order
        pass


def test_autocast():
    encoder, slicer = network()
    with torch.no_grad():
        features, labels = extract_features(
            encoder.eval(), loader(20), device=CPU, amp_dtype=torch.bfloat16
        )
        full, _ = extract_features(encoder, loader(20), device=CPU)
    assert features.dtype == torch.float32
    assert features.shape == (20, 8)
    assert labels.tolist() == [i % 3 for i in range(20)]
    assert not torch.equal(features, full)
    torch.testing.assert_close(features, full, rtol=0.05, atol=0.05)
    assert evaluate(encoder, slicer, amp_dtype=torch.bfloat16)["knn_dense"] > 45


def test_an_empty_set_is_said():
    with pytest.raises(UserError, match="empty"):
        extract_features(network()[0], [], device=CPU)


@pytest.mark.parametrize(
    ("images", "count", "sizes"), [(40, 2, [16, 16]), (40, 9, [16, 16]), (7, 2, [7])]
)
def test_a_short_last_batch_is_not_estimated_from(images: int, count: int, sizes: list[int]):
    assert [len(x) for x in first_images(loader(images), count, CPU)] == sizes


@pytest.mark.gpu
def test_gpu_training_is_undisturbed():
    encoder, slicer = network()
    cuda = torch.device("cuda")
    encoder.to(cuda)
    slicer.to(cuda)
    before, state = torch.cuda.get_rng_state(), torch.get_rng_state()
    scores = evaluate(encoder, slicer, device=cuda, amp_dtype=torch.bfloat16)
    assert min(scores.values()) > 45
    assert torch.equal(before, torch.cuda.get_rng_state())
    assert torch.equal(state, torch.get_rng_state())
    # cuDNN may choose another algorithm, whose bf16 sums differ: two of the 30 queries may turn.
    again = evaluate(encoder, slicer, device=cuda, amp_dtype=torch.bfloat16)
    assert scores == pytest.approx(again, abs=100 * 2.5 / 30)
