"""Settings of the evaluation of a trained encoder: 'sacl-fast eval', 'sacl_fast.evaluate'."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from sacl_fast.checks import A_PATH, Count, Positive, Range, Rule, Settings
from sacl_fast.config.choices import Device, Precision
from sacl_fast.config.data import DataConfig
from sacl_fast.config.training import EvalConfig

_SOME = Rule(lambda values: len(values) > 0, "one value or more works")
_Percent = Annotated[float, Range(0, 100, above=True)]


@dataclass(frozen=True, kw_only=True)
class Evaluation(Settings):
    """How a trained encoder is evaluated, and on which images. The defaults are the run's own."""

    out: Annotated[str, A_PATH] | None = None
    """Folder of the results (default: 'eval' in the run folder, or beside the encoder's file)."""
    control: bool = True
    """Evaluate the same encoder untrained, beside."""
    supervised: Annotated[str, A_PATH] | None = None
    """Evaluate supervised weights of the same encoder, beside: 'timm' downloads timm's; or the path
    of a file that holds them (.safetensors, .pth)."""
    seed: Annotated[int, Range(0, 2**53 - 1)] = 0
    """Chooses images and draws."""
    device: Device = "auto"
    precision: Precision = "auto"
    """Autocast type of the encoder (auto: bf16 on a GPU, fp32 on a CPU)."""
    data: DataConfig = field(default_factory=DataConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)


@dataclass(frozen=True, kw_only=True)
class KnnEvaluation(Evaluation):
    """Weighted kNN, as while training."""


@dataclass(frozen=True, kw_only=True)
class LinearEvaluation(Evaluation):
    """A linear classifier on the frozen features of all training images."""

    weight_decays: Annotated[tuple[Positive, ...], _SOME] = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """To choose from, by the accuracy on a tenth of the training images that is held out for it."""


@dataclass(frozen=True, kw_only=True)
class FewShotEvaluation(Evaluation):
    """Classifiers on the frozen features of few training images, drawn several times."""

    per_class: Annotated[tuple[Count, ...], _SOME] = (1, 5, 10)
    """Images of each class."""
    percent: tuple[_Percent, ...] = (1.0, 10.0)
    """Shares of the training images, the same of each class."""
    draws: Annotated[int, Range(3, 10_000)] = 10
    """How many times images are drawn; mean and 95 % interval are over draws."""
    weight_decays: Annotated[tuple[Positive, ...], _SOME] = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
    """Of the linear classifiers of 'percent'; chosen as in linear evaluation, on the first draw."""
