"""Settings of the evaluation of a trained encoder: 'sacl-fast eval', 'sacl_fast.evaluate'."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Annotated

from sacl_fast.checks import (
    A_PATH,
    Count,
    NotNegative,
    Percent,
    Positive,
    Range,
    Rule,
    Settings,
)
from sacl_fast.config.choices import Device, Precision, RateSchedule
from sacl_fast.config.data import DataConfig
from sacl_fast.config.training import EvalConfig
from sacl_fast.errors import UserError

_SOME = Rule(lambda values: len(values) > 0, "one value or more works")
_OF_PROTOCOL = ("epochs", "batch_size", "lr", "schedule", "weight_decay")


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
    """A linear classifier on the frozen encoder: by the usual protocol, SGD on augmented images, or
    'fast', on features of all training images that are computed once."""

    fast: bool = False
    """Logistic regression on features of images that are not augmented, in the time of an epoch.
    Its figures and those of the protocol are not comparable."""
    epochs: Count = 100
    """Of the protocol, as the four settings below."""
    batch_size: Annotated[int, Range(2)] = 256
    lr: Positive | None = None
    """Learning rate (default: 0.1; of 1,000 classes or more 0.3)."""
    schedule: RateSchedule = "auto"
    """'steps': divided by 10 after 60 % and after 80 % of the epochs. 'cosine': to 0. 'auto':
    'steps'; of 1,000 classes or more 'cosine'."""
    weight_decay: NotNegative | None = None
    """(default: 0; of 1,000 classes or more 1e-5)"""
    weight_decays: Annotated[tuple[Positive, ...], _SOME] = (1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
    """Of 'fast', to choose from by the accuracy on a tenth of the training images that is held out
    for it."""

    def __post_init__(self) -> None:
        super().__post_init__()
        others = ("weight_decays",) if not self.fast else _OF_PROTOCOL
        default = {setting.name: setting.default for setting in fields(self)}
        for name in others:
            if getattr(self, name) == default[name]:
                continue
            if self.fast:
                raise UserError(f"{name} is of the protocol; without --fast it works")
            raise UserError(f"{name} is of --fast; with --fast it works")


@dataclass(frozen=True, kw_only=True)
class FewShotEvaluation(Evaluation):
    """Classifiers on the frozen features of few training images, drawn several times."""

    per_class: Annotated[tuple[Count, ...], _SOME] = (1, 5, 10)
    """Images of each class."""
    percent: tuple[Percent, ...] = (1.0, 10.0)
    """Shares of the training images, the same of each class."""
    draws: Annotated[int, Range(3, 10_000)] = 10
    """How many times images are drawn; mean and 95 % interval are over draws."""
    weight_decays: Annotated[tuple[Positive, ...], _SOME] = (1.0, 0.1, 1e-2, 1e-3, 1e-4)
    """Of the linear classifiers of 'percent'; chosen as in linear evaluation, on the first draw."""
