"""Where the pixels of a run are, by the memory that is free; and that they are the same there."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from sacl_fast.config import DataConfig
from sacl_fast.config.choices import Residence, ResidenceSetting
from sacl_fast.data.images.source import ArraySource
from sacl_fast.data.loading.open import open_view_loader
from sacl_fast.data.loading.residence import (
    Free,
    Pixels,
    choose,
    compacted,
    free_memory,
    gathered,
    is_mapped,
)
from sacl_fast.data.views.draws import draw_rows
from sacl_fast.data.views.packed import PackedViews
from sacl_fast.data.views.tables import CIFAR, IMAGENET
from sacl_fast.errors import UserError
from sacl_fast.ops import compiled
from tests.data.loading.cases import CPU, batches_by, config_of, loader_by, random_source

CUDA, GIB = torch.device("cuda"), 2**30
needs_compiled = pytest.mark.skipif(
    compiled.obstacle() is not None, reason=str(compiled.obstacle())
)


def chosen(
    asked: ResidenceSetting = "auto",
    size: float = 25,
    *,
    mapped: bool = True,
    device: torch.device = CUDA,
    host: float = 200,
    gpu: float = 80,
    on_device: bool = True,
    processes: int = 1,
) -> tuple[Residence, str]:
    """Sizes in GiB."""
    free = Free(int(host * GIB), int(gpu * GIB))
    return choose(
        asked,
        int(size * GIB),
        mapped=mapped,
        device=device,
        on_device=on_device,
        free=free,
        processes=processes,
    )


@pytest.mark.parametrize(
    ("given", "residence", "said"),
    [
        ({}, "device", "25.0 GiB fit in 80.0 GiB that the GPU has free"),
        ({"size": 0.15, "mapped": False}, "device", "154 MiB fit"),
        ({"size": 41}, "ram", "41.0 GiB fit in 200.0 GiB of free memory"),
        ({"gpu": 40}, "ram", ""),
        ({"on_device": False}, "ram", ""),
        ({"size": 41, "processes": 2}, "ram", "41.0 GiB in each of 2 processes fit"),
        ({"size": 41, "processes": 4}, "disk", "41.0 GiB in each of 4 processes are more than"),
        ({"size": 101}, "disk", "read ahead"),
        ({"size": 101, "mapped": False}, "ram", "in memory"),
        ({"processes": 8}, "device", ""),
        ({"device": CPU, "gpu": 0}, "disk", "all processes share"),
        ({"device": CPU, "gpu": 0, "mapped": False}, "ram", "in memory"),
        ({"asked": "disk"}, "disk", "as requested"),
        ({"asked": "ram"}, "ram", "as requested"),
        ({"asked": "ram", "size": 150}, "ram", "as requested"),
        ({"asked": "device", "size": 70}, "device", "as requested"),
        ({"asked": "ram", "size": 500, "mapped": False}, "ram", "as requested"),
    ],
)
def test_what_is_chosen(given: dict, residence: Residence, said: str) -> None:
    found = chosen(**given)
    assert found[0] == residence
    assert said in found[1]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"asked": "device", "device": CPU}, "run is on the CPU; auto, disk and ram work"),
        ({"asked": "device", "device": CPU, "mapped": False}, "on the CPU; auto and ram work"),
        ({"asked": "device", "size": 81}, r"take 81.0 GiB and the GPU has 80.0 GiB free; auto"),
        ({"asked": "device", "on_device": False}, "not built for it; auto, disk and ram work"),
        ({"asked": "disk", "mapped": False}, "are in memory and not in a file.*auto and ram work"),
        ({"asked": "ram", "size": 201}, "take 201.0 GiB and 200.0 GiB of memory are free; auto"),
        (
            {"asked": "ram", "size": 51, "processes": 4},
            "take 51.0 GiB in each of 4 processes and 200.0 GiB",
        ),
    ],
)
def test_what_cannot_be_had_is_one_sentence(given: dict, said: str) -> None:
    with pytest.raises(UserError, match=rf"^data\.residence is {given['asked']}, but .*{said}"):
        chosen(**given)


@needs_compiled
def test_a_run_asks_for_it() -> None:
    unfit: list[tuple[Residence, str]] = [("device", "run is on the CPU"), ("disk", "in memory")]
    for asked, said in unfit:
        with pytest.raises(UserError, match=said):
            loader_by("compiled", random_source(), config_of(data=DataConfig(residence=asked)))


def test_it_is_for_one_loader() -> None:
    given = config_of(data=DataConfig(residence="ram", loader="torchvision", workers=0))
    with pytest.raises(UserError, match=r"residence is ram.*by torchvision .*loader auto works"):
        open_view_loader(random_source(), given, device=CPU)


def test_free_memory_is_what_the_machine_has() -> None:
    free = free_memory(CPU)
    assert 2**20 < free.host < 2**50
    assert free.device == 0


def test_what_is_mapped(tmp_path: Path) -> None:
    np.arange(100, dtype=np.uint8).tofile(tmp_path / "x")
    mapped = np.memmap(tmp_path / "x", np.uint8, "r")
    assert is_mapped(mapped) and is_mapped(mapped[3:].reshape(-1)[5:])
    assert not is_mapped(np.zeros(4)[1:])
    assert not is_mapped(np.frombuffer(bytes(9), np.uint8))


def packed(count: int = 40) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(0)
    shapes = rng.integers(1, 60, (count, 2))
    sizes = 3 * shapes.prod(1)
    gaps = rng.integers(0, 20_000, count)
    offsets = (gaps + sizes).cumsum() - sizes
    order = rng.permutation(count)
    placement = np.column_stack((offsets, shapes))[order]
    placement[[3, 7]] = 0
    return rng.integers(0, 256, int((gaps + sizes).sum()), np.uint8), placement


def test_only_the_images_are_copied() -> None:
    pixels, placement = packed()
    runs, moved = compacted(placement)
    copy = np.concatenate([pixels[begin:end] for begin, end in runs])
    assert len(copy) < len(pixels)
    assert all(end < begin for (_, end), (begin, _) in pairwise(runs))
    assert np.array_equal(moved[:, 1:], placement[:, 1:])
    for (at, h, w), (before, _, _) in zip(moved.tolist(), placement.tolist(), strict=True):
        size = 3 * h * w
        assert np.array_equal(copy[at : at + size], pixels[before : before + size])
        assert at + size <= len(copy)


def test_nothing_to_copy() -> None:
    runs, moved = compacted(np.zeros((3, 3), np.int64))
    assert runs == [] and not moved.any()


def views_of(pixels: torch.Tensor, images: torch.Tensor, draws: torch.Tensor) -> torch.Tensor:
    return PackedViews(CIFAR, CPU)(pixels, images, draws)


@needs_compiled
def test_the_rows_of_the_crops_give_the_same_views() -> None:
    pixels, placement = packed()
    chosen_images = np.array([0, 5, 11, 5, 39, 20])  # one of them twice
    images = placement[chosen_images]
    for views in (CIFAR, IMAGENET):
        draws = draw_rows(views, 1, 2, chosen_images, images[:, 1:])
        expected = views_of(torch.from_numpy(pixels), torch.from_numpy(images), draws)
        before = draws.clone()
        memory, moved, rows = gathered(pixels, images, draws, pin=False)
        assert torch.equal(views_of(memory, moved, rows), expected)
        assert torch.equal(draws, before)
        assert not (moved[:, 0] % 16).any()
        assert memory.numel() < 3 * images[:, 1:].prod(1).sum() + 16 * len(images)


@pytest.mark.gpu
@needs_compiled
@pytest.mark.parametrize("residence", ["device", "ram"])
def test_on_a_gpu_the_views_are_those_of_the_cpu(residence: Residence) -> None:
    """Up to the roundings of the type that the encoder computes in."""
    if compiled.cuda_obstacle(CUDA) is not None:
        pytest.skip(str(compiled.cuda_obstacle(CUDA)))
    expected = batches_by("compiled", random_source(), config_of(), [(0, 0), (1, 1)])
    data = DataConfig(residence=residence, loader="compiled")
    given = config_of(data=data, precision="fp32")
    loader = open_view_loader(random_source(), given, device=CUDA)
    found = [*loader.epoch(0), *loader.epoch(1, 1)]
    loader.close()
    for ours, theirs in zip(found, expected, strict=True):
        assert torch.equal(ours.index, theirs.index)
        for a, b in ((ours.view_a, theirs.view_a), (ours.view_b, theirs.view_b)):
            assert a.is_cuda
            assert (a.cpu() - b).abs().max() <= 1.01 / 255 / min(given.views.std)
            assert (a.cpu() - b).abs().mean() < 1e-3


@pytest.mark.gpu
def test_pixels_in_the_memory_of_a_gpu() -> None:
    source: ArraySource = random_source()
    pixels = Pixels(source, "device", CUDA)
    assert pixels.memory.is_cuda
    assert np.array_equal(pixels.memory.cpu().numpy(), source.pixels)
    host = Pixels(source, "ram", CUDA)
    rows = draw_rows(CIFAR, 0, 0, np.arange(5), np.full((5, 2), 20))
    memory, images, _ = host.batch(np.arange(5), rows)
    assert memory.is_pinned() and len(images) == 5
