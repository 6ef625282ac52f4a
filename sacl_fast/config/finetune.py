"""Settings of 'sacl-fast finetune' and 'sacl_fast.evaluate.finetune'."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from sacl_fast.checks import (
    A_PATH,
    BelowOne,
    Count,
    CountOrZero,
    NotNegative,
    Percent,
    Positive,
    Range,
    Settings,
)
from sacl_fast.config.choices import Device, Precision, Resume, Width
from sacl_fast.config.data import DataConfig
from sacl_fast.errors import UserError


@dataclass(frozen=True, kw_only=True)
class FinetuneConfig(Settings):
    """How all weights of a trained encoder and a classifier on it are trained on labelled images:
    SGD with Nesterov momentum and a cosine from 'lr' to 0."""

    out: Annotated[str, A_PATH] | None = None
    """Folder of the results (default: 'finetune/IMAGES' in the run folder, or beside the encoder's
    file)."""
    resume: Resume = "never"
    """'auto': go on from the last checkpoint in the folder, or start where there is none."""
    width: Width = "dense"
    """The encoder to fine-tune. 'slim': filters that are not kept stay zero, so that the result is
    as small as the slim encoder."""
    from_scratch: bool = False
    """Then train the same encoder from random weights in the same way, and say what pre-training
    adds. Twice the time."""
    percent: Percent | None = None
    """Learn from so many percent of the training images of each class only, at least one."""
    per_class: Count | None = None
    """Learn from so many training images of each class only."""
    steps: Count | None = None
    """(default: 10,000; of few labels ('percent', 'per_class') as many as pass over them 60 times,
    1,000 or more)"""
    batch_size: Annotated[int, Range(2)] = 64
    """Where there are fewer training images, a batch has several crops of each."""
    lr: Positive = 0.1
    backbone_lr: Positive | None = None
    """Rate of the trained encoder's weights; 'lr' is then that of the classifier, and of all
    weights from scratch (default: 'lr')."""
    momentum: Annotated[BelowOne, Range(0, above=True)] = 0.9
    weight_decay: NotNegative = 0.0
    size: Annotated[int, Range(4, 8192)] = 224
    """Side of the square images, pixels; smaller ones are enlarged."""
    eval_every: CountOrZero = 1000
    """Steps between evaluations on the validation images (0: only at the end)."""
    checkpoint_every: Count = 500
    """Steps between checkpoints."""
    log_every: Count = 10
    """Steps between readings of the metrics."""
    seed: Annotated[int, Range(0, 2**53 - 1)] = 0
    """Draws the few labels, too, as the first draw of 'sacl-fast eval few-shot'."""
    device: Device = "auto"
    precision: Precision = "auto"
    """Autocast type (auto: bf16 on a GPU, fp32 on a CPU)."""
    data: DataConfig = field(default_factory=DataConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.percent is not None and self.per_class is not None:
            raise UserError(
                f"percent is {self.percent:g} and per_class is {self.per_class}; one of the two "
                "works"
            )

    @property
    def few_labels(self) -> str:
        """How few are learnt from, for a sentence; '' for all."""
        if self.percent is not None:
            return f"{self.percent:g} % of labels"
        return "" if self.per_class is None else f"{self.per_class} per class"
