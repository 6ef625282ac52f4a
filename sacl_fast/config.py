"""The whole configuration of a run: frozen, keyword-only dataclasses.

Every value is checked where it is made, saved with the run as 'config.yaml', and is an
option of the command line ('--optim.lr 0.4'), which is generated from these classes. No torch
here: 'sacl-fast --help' and a mistyped option answer at once.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from sacl_fast.checks import (
    A_PATH,
    BelowOne,
    Count,
    CountOrZero,
    NotNegative,
    Pattern,
    Positive,
    Probability,
    Range,
    Ratio,
    Rising,
    Rule,
    Settings,
)
from sacl_fast.errors import UserError

Backend = Literal["auto", "torch", "triton", "cuda", "cpu", "apex"]

# What can be asked of any machine; 'engine.preflight' holds it against the one at hand.
_PROCESSES = Range(-1, 512)
_NOT_NONE = Rule(lambda number: number != 0, "1 or more works, or -1 (auto)")
_ODD = Rule(lambda number: number % 2 == 1, "an odd number works")
_FILE_NAME = Rule(lambda text: "/" not in text and text[0] != ".", "a name without '/' works")
_STANDARDISED = "the loss standardises every feature over the batch"
_EXACT = "larger ones are rounded by what reads all numbers as floats; the clock's microseconds fit"
_Strength = Annotated[float, Range(0, 100)]
_Aspect = Annotated[float, Range(0.001, 1000)]
_Sigma = Annotated[float, Range(0, 1000, above=True)]
_Mean = Annotated[float, Range(-1000, 1000)]
_Std = Annotated[float, Range(0.001, 1000)]


@dataclass(frozen=True, kw_only=True)
class DaliConfig(Settings, path="data.dali"):
    """How NVIDIA DALI makes the views, where it does ('data.loader'): from beginning to end, or, on
    the CPU where the compiled operators are built, from JPEG to pixels."""

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
    are prepared, but always one. The decoded images of up to three batches come on top."""
    hw_decoder_load: Probability = 0.65
    """Share of the JPEGs for the GPU's hardware decoder, where it has one."""


@dataclass(frozen=True, kw_only=True)
class DataConfig(Settings, path="data"):
    """Where the images come from and how they are read."""

    source: Literal["demo", "folder", "webdataset", "cifar10", "cifar100"] = "folder"
    """'demo': drawn shapes, no download. 'folder': an image folder (or .tar, .tar.gz, .zip of
    one), with class folders or without labels; or a .txt file with the path of an image in each
    line. 'webdataset': a folder of .tar shards (or one shard), read where they are. 'cifar10',
    'cifar100': torchvision's data sets, downloaded to 'root' where missing; 'root' may also be an
    unpacked image folder or archive of them."""
    root: Annotated[str, A_PATH] | None = None
    """Folder, archive or list with the images. If it holds 'train' and 'val' (or 'test'), however
    spelt, those are the two splits."""
    labels: Literal["auto", "folder", "none"] = "auto"
    """Labels are used by kNN evaluation only. 'folder': the first folder level names the class.
    'none': ignore folders and other labels. 'auto': 'folder' if all images lie in folders and the
    first level has two or more, else 'none'."""
    limit: CountOrZero = 0
    """Use only this many training images, the same ones for the same seed (0: all)."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """What decodes the training images and makes their views. 'auto': NVIDIA DALI where it is
    installed and faster, else torchvision; 'sacl-fast doctor' says which, and why."""
    dali: DaliConfig = field(default_factory=DaliConfig)
    workers: Annotated[int, _PROCESSES] = -1
    """Worker processes that decode and augment with torchvision, per rank (-1: the cores this rank
    can have; 0: in the main process)."""
    prefetch: Annotated[int, Range(1, 256)] = 4
    """Batches each worker prepares ahead."""
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


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Settings, path="encoder"):
    """The encoder f."""

    name: str = "mobilenetv1_100"
    """Any timm model, or 'resnet20' (CIFAR)."""
    width: Annotated[float, Range(0.01, 64)] = 1.0
    """Width multiplier, for the families where timm has one (MobileNet-V1/V2/V3, EfficientNet,
    ResNet) and 'resnet20'."""
    stem: Literal["imagenet", "stride1", "cifar"] = "imagenet"
    """'stride1': the stem's first convolution does not down-sample. 'cifar': nor does
    anything else in the stem (3x3 convolution, no max-pool). A ViT's patches get half or a quarter
    of their side instead."""
    drop_path: BelowOne = 0.0
    """Stochastic depth rate, where the model has it."""
    sync_batch_norm: bool = True
    """With several processes: batch-norm statistics over the global batch."""


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig(Settings, path="projector"):
    """The projector h: (Linear, batch norm, ReLU) x (layers - 1), Linear."""

    hidden: Annotated[int, Range(1, 65_536)] = 2048
    out: Annotated[int, Range(2, 65_536, because="it correlates features")] = 2048
    layers: Annotated[int, Range(1, 16)] = 3


@dataclass(frozen=True, kw_only=True)
class LossConfig(Settings, path="loss"):
    """SACL-XD's objective; see 'sacl_fast.ops.xcorr_loss' for the equations."""

    alpha: Probability = 0.95
    """Weight of the contrastive term; the cross-distillation term has 1 - alpha."""
    lambda_: Annotated[NotNegative, tyro.conf.arg(name="lambda")] = 0.005
    """Weight of the off-diagonal correlations."""
    distillation: Literal["correlation", "log", "none"] = "correlation"
    """'log': the supplement's Eq. 1-2, L_CL + gamma * L_log. 'none': L_CL alone and no passes
    without gradient (with 'slim.ratio' 1: Barlow Twins)."""
    off_diagonal: Literal["squared", "literal"] = "squared"
    """'literal': the supplement's pseudocode, which forgets the square in the XD term; unbounded
    below, for study only."""
    pairing: Literal["same_width", "cross_width"] = "same_width"
    """XD compares the same encoder on the other view ('same_width'), or the other encoder on
    the same view ('cross_width')."""
    gamma: NotNegative = 1e-3
    """Weight of the 'log' distillation."""
    variance: Literal["biased", "unbiased"] = "biased"
    """Standardise with the biased variance and 'eps' (Barlow Twins' code), or as the pseudocode
    with 'z.std(0)' and no eps."""
    eps: Annotated[float, Range(0, 1)] = 1e-5
    scale: Positive = 1.0
    """Factor on the whole loss. Matters under LARS only through biases and norms, which it leaves
    unscaled."""
    statistics: Literal["global", "local"] = "global"
    """With several processes: one loss over the global batch with the exact gradient, or one per
    rank."""


@dataclass(frozen=True, kw_only=True)
class SlimConfig(Settings, path="slim"):
    """Which filters the slim encoder keeps, and when they are chosen."""

    ratio: Ratio = 0.5
    """Share s of output filters kept in each convolution: the int(s * Cout), at least 1, of
    largest L1 norm. 1: the slim encoder is the dense one (cross-distillation alone)."""
    refresh_steps: CountOrZero = 0
    """Choose the filters anew every so many steps (0: at the end of each epoch)."""
    warmup_epochs: CountOrZero = 0
    """Epochs at the start in which the slim encoder stays dense."""
    exclude: tuple[Pattern, ...] = (
        r"(^|\.)(se|se_module)\.",
        r"(?<!stages\.\d)\.(downsample|shortcut)\.",
        r"(^|\.)patch_embed\.",
    )
    """Regular expressions ('re.search') on module names that are never slimmed; the defaults are
    squeeze-excite blocks, residual down-sampling shortcuts and the patch embedding of vision
    transformers (which therefore train with cross-distillation alone), under timm's names."""
    batch_norm: Literal["shared", "separate"] = "shared"
    """'separate': the slim encoder has its own batch-norm statistics and affine."""
    norm_gradient: Literal["auto", "exact", "damped"] = "auto"
    """Gradient through the slim encoder's batch norms. 'exact': as it is; that is 316 times the
    norm's scale where zeroed filters leave a channel constant. 'damped': times
    min(1, variance / eps), so 0 there. 'auto': 'damped' where the architecture has two or more
    norms of constant channels in a row, over which an untrained encoder's gradients grow: RepViT to
    1e30, FastViT to 1e13, EfficientViT-M, EfficientViM, MobileOne and GhostNets; ResNets,
    MobileNets and EfficientNets stay exact."""
    mode: Literal["auto", "mask", "skip"] = "auto"
    """How the slim passes run, with equal results: 'mask' multiplies masks into the full weights
    and saves no work; 'skip' computes the kept filters only. 'auto' takes 'skip' where that was
    measured to be faster as a rule: in float32 on the compiled CPU operators."""


@dataclass(frozen=True, kw_only=True)
class OptimConfig(Settings, path="optim"):
    """The optimiser and its schedule."""

    name: Literal["lars", "adamw"] = "lars"
    lr: Positive = 0.3
    """Learning rate for a global batch of 256; the rate used is lr * batch_size / 256."""
    weight_decay: NotNegative = 1e-4
    """Not applied to one-dimensional parameters (biases, norms)."""
    momentum: BelowOne = 0.9
    """LARS."""
    eta: Positive = 0.02
    """LARS trust coefficient."""
    clip: bool = True
    """LARS: bound the trust ratio so that no layer's rate exceeds lr."""
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)
    """AdamW."""
    warmup_epochs: CountOrZero = 10
    """Linear warm-up, then cosine to 0, per step. In a run of no more epochs than this: a tenth of
    the run."""


@dataclass(frozen=True, kw_only=True)
class EvalConfig(Settings, path="eval"):
    """kNN accuracy of the frozen features, for the dense and the slim encoder."""

    every: CountOrZero = 10
    """Epochs between evaluations (0: only before and after training)."""
    k: Count = 20
    """Neighbours."""
    temperature: Annotated[float, Range(1e-4, 1e4)] = 0.07
    """Of the neighbours' weights exp(similarity / temperature)."""
    bank: Count = 50_000
    """Training images to search among, at most."""
    queries: Count = 10_000
    """Validation images to classify, at most."""
    batch_size: Count = 256
    encoders: Literal["both", "dense", "slim"] = "both"
    recalibrate_batches: Count = 20
    """Batches from which batch-norm statistics are estimated anew for each encoder before it is
    evaluated: the running ones mix the dense and the slim network."""


@dataclass(frozen=True, kw_only=True)
class LogConfig(Settings, path="log"):
    """What is written while training; 'metrics.jsonl' and the pictures always are."""

    every: Count = 10
    """Steps between readings of the metrics. The device is not waited for in between."""
    tensorboard: bool = True
    """Also write TensorBoard events, where it is installed."""
    wandb: str | None = None
    """Weights & Biases project to log to."""
    min_std: NotNegative = 0.02
    """Collapse alarm: mean over dimensions of sqrt(D) * std of the length-normalised embeddings
    (1: spread evenly, 0: all the same)."""
    min_rank: NotNegative = 2.0
    """Collapse alarm: effective rank of the embeddings."""


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig(Settings, path="checkpoint"):
    """When the state of the run is written."""

    every_steps: CountOrZero = 0
    """Steps between checkpoints, besides the one at the end of each epoch (0: none besides)."""
    every_epochs: Count = 1
    """Epochs between checkpoints."""
    keep: Count = 2
    """How many of the last checkpoints to keep; the one with the best kNN is kept besides."""


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
    resume_at: Literal["step", "next_epoch"] = "step"
    """Where to go on from a checkpoint. 'step': after its last step, with the images, seed and
    batch size it was trained with; others are refused. 'next_epoch': where they are others, with
    the next epoch."""
    seed: Annotated[int, Range(0, 2**53 - 1, because=_EXACT)] = 0
    epochs: Count = 100
    batch_size: Annotated[int, Range(2, because=_STANDARDISED)] = 256
    """Images in a step, over all processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type of the encoder and projector (auto: bf16 on a GPU, fp32 on a CPU). The loss is
    always fp32."""
    channels_last: bool = True
    """Memory format of images, activations and convolution weights."""
    backend: Backend = "auto"
    """Implementation of the operators ('sacl-fast doctor' lists them). 'torch': plain PyTorch,
    nothing compiled."""
    data: DataConfig = field(default_factory=DataConfig)
    views: ViewsConfig = field(default_factory=ViewsConfig)
    encoder: EncoderConfig = field(default_factory=EncoderConfig)
    projector: ProjectorConfig = field(default_factory=ProjectorConfig)
    loss: LossConfig = field(default_factory=LossConfig)
    slim: SlimConfig = field(default_factory=SlimConfig)
    optim: OptimConfig = field(default_factory=OptimConfig)
    eval: EvalConfig = field(default_factory=EvalConfig)
    log: LogConfig = field(default_factory=LogConfig)
    checkpoint: CheckpointConfig = field(default_factory=CheckpointConfig)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.eval.k > self.eval.bank:
            raise UserError(
                f"eval.k is {self.eval.k}, but eval.bank has {self.eval.bank} images to choose "
                f"neighbours from; eval.k of at most {self.eval.bank} works"
            )
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
