"""The configuration of a run."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any

import tyro

from sacl_fast.checks import A_PATH, Count, Range, Rule, Settings, counted
from sacl_fast.config.choices import Backend, Device, Precision, ResumeAt
from sacl_fast.config.data import DataConfig, ViewsConfig
from sacl_fast.config.engine import EngineConfig
from sacl_fast.config.method import EncoderConfig, LossConfig, ProjectorConfig, SlimConfig
from sacl_fast.config.training import CheckpointConfig, EvalConfig, LogConfig, OptimConfig
from sacl_fast.errors import UserError

_FILE_NAME = Rule(lambda text: "/" not in text and text[0] != ".", "a name without '/' works")
_STANDARDISED = "the loss standardises every feature over the batch"
_EXACT = "larger ones are rounded by what reads all numbers as floats; the clock's microseconds fit"
# Of the plans that have one of their own.
_SLIM_MODES = {
    "compile": ("mask",),
    "dense+mask": ("mask",),
    "dense+skip": ("skip",),
    "fused": ("skip",),
}


@dataclass(frozen=True, kw_only=True)
class Config(Settings):
    """A run of SACL-XD pre-training."""

    preset: tyro.conf.Suppress[Annotated[str, _FILE_NAME]] = "custom"
    """The preset this configuration started from."""
    out: Annotated[str, A_PATH] | None = None
    """Run folder (default: runs/PRESET/DATE-TIME)."""
    resume: Annotated[str, A_PATH] = "never"
    """'auto': go on from the newest checkpoint of the run folder (without 'out': of the newest
    unfinished run of the preset), or start where there is none. 'never': start. Or the path of
    a checkpoint."""
    resume_at: ResumeAt = "step"
    """Where to go on from a checkpoint. 'step': after its last step, with the images, seed and
    batch size it was trained with; others are refused. 'next_epoch': where they are others, with
    the next epoch."""
    seed: Annotated[int, Range(0, 2**53 - 1, because=_EXACT)] = 0
    epochs: Count = 100
    batch_size: Annotated[int, Range(2, because=_STANDARDISED)] = 256
    """Images in a step, over all processes."""
    device: Device = "auto"
    """'auto': a CUDA GPU where there is one, else the CPU. 'mps': an Apple GPU, by PyTorch alone,
    which is asked for by name."""
    precision: Precision = "auto"
    """Autocast type of the encoder and projector (auto: bf16 on a GPU, fp32 on a CPU). The loss is
    always fp32."""
    channels_last: bool = True
    """Memory format of images, activations and convolution weights."""
    backend: Backend = "auto"
    """Implementation of the operators ('sacl-fast doctor' lists them; auto takes those that passed
    a check on this machine). 'torch': plain PyTorch, nothing compiled."""
    deterministic: bool = False
    """On one device, the same figures every time, to the bit, also after a resume: torch's
    deterministic operations, and nothing chosen by time. An operation that has no such form is an
    error. Slower on a GPU."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    slim: SlimConfig = field(default_factory=SlimConfig)
    engine: EngineConfig = field(default_factory=EngineConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval.k > self.eval.bank:
            raise UserError(
                f"eval.k is {self.eval.k}, but eval.bank has "
                f"{counted(self.eval.bank, 'image')} to choose "
                f"neighbours from; eval.k of at most {self.eval.bank} works"
            )
        plan, mode = self.engine.plan, self.slim.mode
        if mode != "auto" and plan in _SLIM_MODES and mode not in _SLIM_MODES[plan]:
            fitting = ", ".join(name for name, modes in _SLIM_MODES.items() if mode in modes)
            raise UserError(
                f"engine.plan {plan} runs the slim passes in mode {_SLIM_MODES[plan][0]}, but "
                f"slim.mode is {mode}; engine.plan eager, {fitting} or slim.mode auto works"
            )
        check_parts(self.batch_size, self.engine.accumulate)
        if self.slim.warmup_epochs >= self.epochs:
            raise UserError(
                f"slim.warmup_epochs is {self.slim.warmup_epochs} in a run of {self.epochs} "
                f"epochs, in which no filter would ever be left out; less than epochs works, or "
                "slim.ratio 1"
            )

    @property
    def warmup_epochs(self) -> float:
        """Epochs of warm-up as they are trained, see 'warmup_as_trained'."""
        return warmup_as_trained(self.optim.warmup_epochs, self.epochs)

    @property
    def base_lr(self) -> float:
        """The learning rate after warm-up, scaled with the global batch."""
        return self.optim.lr * self.batch_size / 256


def check_parts(batch_size: int, parts: int, processes: int = 1) -> None:
    """Refuse a batch that does not fall into equal parts of two or more images in each process.

    Raises:
        UserError: it names a number of parts that works.
    """
    share = batch_size // processes
    if share % parts or share // parts < 2 <= parts:
        works = max((n for n in range(1, min(parts, share // 2) + 1) if share % n == 0), default=1)
        where = f" over {processes} processes" if processes > 1 else ""
        raise UserError(
            f"engine.accumulate is {parts}, but batch_size {batch_size}{where} does not fall into "
            f"{parts} equal parts of 2 or more images each; engine.accumulate {works} works"
        )


def warmup_as_trained(asked: int, epochs: int) -> float:
    """The epochs of warm-up that were asked for, or a tenth of the run where it has no more epochs
    than that, since the learning rate would only rise."""
    return asked if asked < epochs else epochs / 10


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries, lists and numbers (for YAML and checkpoints)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(config)
