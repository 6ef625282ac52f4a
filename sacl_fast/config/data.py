"""Settings of the images and of their views."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from sacl_fast.checks import (
    A_PATH,
    Count,
    CountOrZero,
    NotNegative,
    Probability,
    Range,
    Ratio,
    Rising,
    Rule,
    Settings,
)
from sacl_fast.config.choices import Labels, LoaderName, ResidenceSetting, SourceName

# What can be asked of any machine; 'engine.preflight' holds it against the one at hand.
_PROCESSES = Range(-1, 512)
_NOT_NONE = Rule(lambda number: number != 0, "1 or more works, or -1 (auto)")
_ODD = Rule(lambda number: number % 2 == 1, "an odd number works")
_Strength = Annotated[float, Range(0, 100)]
_Aspect = Annotated[float, Range(0.001, 1000)]
_Sigma = Annotated[float, Range(0, 1000, above=True)]
_Mean = Annotated[float, Range(-1000, 1000)]
_Std = Annotated[float, Range(0.001, 1000)]


@dataclass(frozen=True, kw_only=True)
class DaliConfig(Settings, path="data.dali"):
    """How NVIDIA DALI makes the views, where it does ('data.loader'): from JPEG to pixels, and on
    from there where the compiled operator is not built for the device."""

    threads: Annotated[int, _PROCESSES, _NOT_NONE] = -1
    """Threads that decode on the CPU, and as many that augment, per rank (-1: the cores this rank
    can have)."""
    readers: Annotated[int, _PROCESSES] = -1
    """Worker processes that read files and draw random numbers, per rank (0: the main process,
    where that takes 0.1 ms an image; -1: 0 with the views on the CPU, 4 with them on a GPU)."""
    prefetch: Annotated[int, Range(1, 64)] = 2
    """Batches prepared ahead, at most."""
    memory: Annotated[float, Range(0, 4096, above=True)] = 4.0
    """GiB that batches prepared ahead may take, per rank: where 'prefetch' would take more, fewer
    are prepared, but always one. The decoded images of a few batches come on top."""
    hw_decoder_load: Probability = 0.65
    """Share of the JPEGs for the GPU's hardware decoder, where it has one."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings, path="data"):
    """Where the images come from and how they are read."""

    source: SourceName = "folder"
    """'demo': drawn shapes, no download. 'folder': an image folder (or .tar, .tar.gz, .zip of
    one), with class folders or without labels; or a .txt file with the path of an image in each
    line. 'webdataset': a folder of .tar shards (or one shard), read where they are. 'cifar10',
    'cifar100': torchvision's data sets, downloaded to 'root' where missing; 'root' may also be an
    unpacked image folder or archive of them. 'voc2007': likewise, in its official layout; images
    with several labels, which 'sacl-fast finetune' learns and all else passes over. 'cache': a file
    of decoded images, which 'sacl-fast cache' makes of any other source. 'python': what
    'sacl_fast.train(config, source=...)' was given, which no command can open."""
    root: Annotated[str, A_PATH] | None = None
    """Folder, archive, list or cache with the images. If a folder holds 'train' and 'val' (or
    'test'), however spelt, those are the two splits."""
    labels: Labels = "auto"
    """Training uses none; evaluation and fine-tuning do. 'folder': the first folder level names the
    class. 'none': ignore folders and other labels. 'auto': 'folder' if all images lie in folders
    and the first level has two or more, else 'none'."""
    limit: CountOrZero = 0
    """Use only this many training images, the same ones for the same seed (0: all)."""
    loader: LoaderName = "auto"
    """What decodes the training images and makes their views. 'auto': for images that are pixels
    (a cache, CIFAR) 'compiled', the compiled operator alone, where that is built; NVIDIA DALI where
    it is installed and faster; else 'pillow', Pillow and the compiled operator; else 'torchvision'.
    'sacl-fast doctor' says which, and why."""
    residence: ResidenceSetting = "auto"
    """Where the pixels are that loader 'compiled' makes views of. 'device': in the GPU's memory.
    'ram': read into memory before the first step, by each process. 'disk': where the file is,
    mapped into memory and read ahead. 'auto': on a GPU the first of these that fits in half of what
    is free; on a CPU the file, which processes share, or the memory that the images are in."""
    dali: DaliConfig = field(default_factory=DaliConfig)
    workers: Annotated[int, _PROCESSES] = -1
    """Worker processes that decode and augment without DALI, per rank (-1: the cores this rank
    can have; 0: in the main process); threads of loader 'compiled'."""
    prefetch: Annotated[int, Range(1, 256)] = 4
    """Batches each worker prepares ahead, and loader 'compiled' at most."""
    batch_timeout: NotNegative = 1800.0
    """Seconds that a batch may take to load before the run fails (0: any time)."""
    max_bad_share: Probability = 0.1
    """Unreadable images are skipped, and the first ones named; beyond this share of the training
    images the run fails, and where chance does not explain how many there are in an evaluation."""
    max_file_bytes: Count = 2**28
    """Image files, and images in shards, of more bytes than this are unreadable (2^28: 256 MiB), as
    is what is no file: pipes and devices."""
    cache_dir: Annotated[str, A_PATH] | None = None
    """Where listings of large folders, indices of shards and unpacked archives are kept (default:
    the user's cache folder). Others must not be able to write there."""


@dataclass(frozen=True, kw_only=True)
class ViewConfig(Settings, path="views.*"):
    """The random augmentation of one view, in the order it is applied: crop, flip, jitter,
    grayscale, blur, solarise. A probability of 0 switches an operation off."""

    crop_scale: Annotated[tuple[Ratio, Ratio], Rising] = (0.08, 1.0)
    """Area of the random resized crop as a share of the image."""
    crop_ratio: Annotated[tuple[_Aspect, _Aspect], Rising] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the crop, drawn log-uniformly."""
    flip: Probability = 0.5
    """Probability of a horizontal flip."""
    jitter: Probability = 0.8
    """Probability of colour jitter; the four strengths follow."""
    brightness: _Strength = 0.4
    contrast: _Strength = 0.4
    saturation: _Strength = 0.2
    hue: Annotated[float, Range(0, 0.5)] = 0.1
    """Hue shift as a share of the colour circle, at most 0.5."""
    grayscale: Probability = 0.2
    """Probability of losing all colour."""
    blur: Probability = 0.0
    """Probability of Gaussian blur."""
    blur_sigma: Annotated[tuple[_Sigma, _Sigma], Rising] = (0.1, 2.0)
    """Standard deviation of the blur in pixels."""
    solarize: Probability = 0.0
    """Probability of inverting every value at or above the threshold."""
    solarize_threshold: Annotated[int, Range(0, 256)] = 128


@dataclass(frozen=True, kw_only=True)
class ViewsConfig(Settings, path="views"):
    """The two asymmetric views of every image (tables: 'data/views/tables.py')."""

    size: Annotated[int, Range(4, 8192)] = 224
    """Side of the square views, pixels."""
    blur_window: Annotated[int, Range(1, 8191), _ODD] = 23
    """Side of the blur's window, pixels (odd)."""
    mean: tuple[_Mean, _Mean, _Mean] = (0.485, 0.456, 0.406)
    std: tuple[_Std, _Std, _Std] = (0.229, 0.224, 0.225)
    """Normalisation, for values scaled to 0..1."""
    a: ViewConfig = field(default_factory=ViewConfig)
    b: ViewConfig = field(default_factory=ViewConfig)
