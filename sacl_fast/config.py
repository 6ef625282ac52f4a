"""The whole configuration of a run: frozen, keyword-only dataclasses.

Every value is checked where it is made, saved with the run as 'config.yaml', and is an
option of the command line ('--optim.lr 0.4'), which is generated from these classes. No torch
here: 'sacl-fast --help' and a mistyped option answer at once.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass, field
from typing import Annotated, Any, Literal

import tyro

from sacl_fast.errors import UserError


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise UserError(sentence)


def _require_probability(owner: str, **values: float) -> None:
    for name, value in values.items():
        _require(0.0 <= value <= 1.0, f"{owner}.{name} is {value}; a value from 0 to 1 works")


def _require_positive(owner: str, **values: float) -> None:
    for name, value in values.items():
        _require(value > 0, f"{owner}.{name} is {value}; a value above 0 works")


def _require_not_negative(owner: str, **values: float) -> None:
    for name, value in values.items():
        _require(value >= 0, f"{owner}.{name} is {value}; 0 or more works")


@dataclass(frozen=True, kw_only=True)
class DaliConfig:
    """How NVIDIA DALI makes the views, where it does ('data.loader'): from beginning to end, or, on
    the CPU where the compiled operators are built, from JPEG to pixels."""

    threads: int = -1
    """Threads that decode on the CPU, and as many that augment, per rank (-1: the cores this rank
    can have)."""
    readers: int = -1
    """Worker processes that read files and draw random numbers, per rank (0: the main process,
    where that takes 0.1 ms an image; -1: 0 with the views on the CPU, 4 with them on a GPU)."""
    prefetch: int = 2
    """Batches prepared ahead, at most."""
    memory: float = 4.0
    """GiB that batches prepared ahead may take, per rank: where 'prefetch' would take more, fewer
    are prepared, but always one. The decoded images of up to three batches come on top."""
    hw_decoder_load: float = 0.65
    """Share of the JPEGs for the GPU's hardware decoder, where it has one."""

    def __post_init__(self) -> None:
        for name in ("threads", "readers"):
            value = getattr(self, name)
            _require(value >= -1, f"data.dali.{name} is {value}; -1 (auto) or more works")
        _require(self.threads != 0, "data.dali.threads is 0; 1 or more works, or -1 (auto)")
        _require_positive("data.dali", prefetch=self.prefetch, memory=self.memory)
        _require_probability("data.dali", hw_decoder_load=self.hw_decoder_load)


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Where the images come from and how they are read."""

    source: Literal["demo", "folder", "webdataset", "cifar10", "cifar100"] = "folder"
    """'demo': drawn shapes, no download. 'folder': an image folder (or .tar, .tar.gz, .zip of
    one), with class folders or without labels; or a .txt file with the path of an image in each
    line. 'webdataset': a folder of .tar shards (or one shard), read where they are. 'cifar10',
    'cifar100': torchvision's data sets, downloaded to 'root' where missing; 'root' may also be an
    unpacked image folder or archive of them."""
    root: str | None = None
    """Folder, archive or list with the images. If it holds 'train' and 'val' (or 'test'), those
    are the two splits."""
    labels: Literal["auto", "folder", "none"] = "auto"
    """Labels are used by kNN evaluation only. 'folder': the first folder level names the class.
    'none': ignore folders. 'auto': 'folder' if all images lie in folders and the first level has
    two or more, else 'none'."""
    limit: int = 0
    """Use only this many training images, the same ones for the same seed (0: all)."""
    loader: Literal["auto", "dali", "torchvision"] = "auto"
    """What decodes the training images and makes their views. 'auto': NVIDIA DALI where it is
    installed and faster, else torchvision; 'sacl-fast doctor' says which, and why."""
    dali: DaliConfig = field(default_factory=DaliConfig)
    workers: int = -1
    """Worker processes that decode and augment with torchvision, per rank (-1: the cores this rank
    can have; 0: in the main process)."""
    prefetch: int = 4
    """Batches each worker prepares ahead."""
    max_bad_share: float = 0.1
    """Unreadable images are skipped and named; beyond this share of the data the run fails."""
    cache_dir: str | None = None
    """Where listings of large folders and unpacked archives are kept (default: the user's cache
    folder)."""

    def __post_init__(self) -> None:
        _require_not_negative("data", limit=self.limit)
        _require_positive("data", prefetch=self.prefetch)
        _require(self.workers >= -1, f"data.workers is {self.workers}; -1 (auto) or more works")
        _require_probability("data", max_bad_share=self.max_bad_share)


@dataclass(frozen=True, kw_only=True)
class ViewConfig:
    """The random augmentation of one view, in the order it is applied: crop, flip, jitter,
    grayscale, blur, solarise. A probability of 0 switches an operation off."""

    crop_scale: tuple[float, float] = (0.08, 1.0)
    """Area of the random resized crop as a share of the image."""
    crop_ratio: tuple[float, float] = (3 / 4, 4 / 3)
    """Aspect ratio (width / height) of the crop, drawn log-uniformly."""
    flip: float = 0.5
    """Probability of a horizontal flip."""
    jitter: float = 0.8
    """Probability of colour jitter; the four strengths follow."""
    brightness: float = 0.4
    contrast: float = 0.4
    saturation: float = 0.2
    hue: float = 0.1
    """Hue shift as a share of the colour circle, at most 0.5."""
    grayscale: float = 0.2
    """Probability of losing all colour."""
    blur: float = 0.0
    """Probability of Gaussian blur."""
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    """Standard deviation of the blur in pixels."""
    solarize: float = 0.0
    """Probability of inverting every value at or above the threshold."""
    solarize_threshold: int = 128

    def __post_init__(self) -> None:
        _require_probability(
            "views",
            flip=self.flip,
            jitter=self.jitter,
            grayscale=self.grayscale,
            blur=self.blur,
            solarize=self.solarize,
        )
        strengths = dict(
            brightness=self.brightness, contrast=self.contrast, saturation=self.saturation
        )
        _require_not_negative("views", **strengths, hue=self.hue)
        _require(self.hue <= 0.5, f"views.hue is {self.hue}; at most 0.5 works")
        low, high = self.crop_scale
        _require(
            0 < low <= high <= 1,
            f"views.crop_scale is {self.crop_scale}; 0 < low <= high <= 1 works",
        )
        for name in ("crop_ratio", "blur_sigma"):
            low, high = getattr(self, name)
            _require(0 < low <= high, f"views.{name} is {(low, high)}; 0 < low <= high works")
        _require(
            0 <= self.solarize_threshold <= 256,
            f"views.solarize_threshold is {self.solarize_threshold}; 0 to 256 works",
        )


@dataclass(frozen=True, kw_only=True)
class ViewsConfig:
    """The two asymmetric views of every image (tables: 'data/views.py')."""

    size: int = 224
    """Side of the square views, pixels."""
    blur_window: int = 23
    """Side of the blur's window, pixels (odd)."""
    mean: tuple[float, float, float] = (0.485, 0.456, 0.406)
    std: tuple[float, float, float] = (0.229, 0.224, 0.225)
    """Normalisation, for values scaled to 0..1."""
    a: ViewConfig = field(default_factory=ViewConfig)
    b: ViewConfig = field(default_factory=ViewConfig)

    def __post_init__(self) -> None:
        _require_positive("views", size=self.size)
        _require(
            self.blur_window > 0 and self.blur_window % 2 == 1,
            f"views.blur_window is {self.blur_window}; an odd number works",
        )
        _require(min(self.std) > 0, f"views.std is {self.std}; values above 0 work")


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """The encoder f."""

    name: str = "mobilenetv1_100"
    """Any timm model, or 'resnet20' (CIFAR)."""
    width: float = 1.0
    """Width multiplier, for the families where timm has one (MobileNet-V1/V2/V3, EfficientNet,
    ResNet) and 'resnet20'."""
    stem: Literal["imagenet", "stride1", "cifar"] = "imagenet"
    """'stride1': the stem's first convolution does not down-sample. 'cifar': nor does
    anything else in the stem (3x3 convolution, no max-pool). A ViT's patches get half or a quarter
    of their side instead."""
    drop_path: float = 0.0
    """Stochastic depth rate, where the model has it."""
    sync_batch_norm: bool = True
    """With several processes: batch-norm statistics over the global batch."""

    def __post_init__(self) -> None:
        _require_positive("encoder", width=self.width)
        _require(
            0 <= self.drop_path < 1,
            f"encoder.drop_path is {self.drop_path}; a value from 0 to below 1 works",
        )


@dataclass(frozen=True, kw_only=True)
class ProjectorConfig:
    """The projector h: (Linear, batch norm, ReLU) x (layers - 1), Linear."""

    hidden: int = 2048
    out: int = 2048
    layers: int = 3

    def __post_init__(self) -> None:
        _require_positive("projector", hidden=self.hidden, out=self.out, layers=self.layers)


@dataclass(frozen=True, kw_only=True)
class LossConfig:
    """SACL-XD's objective; see 'sacl_fast.ops.xcorr_loss' for the equations."""

    alpha: float = 0.95
    """Weight of the contrastive term; the cross-distillation term has 1 - alpha."""
    lambda_: Annotated[float, tyro.conf.arg(name="lambda")] = 0.005
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
    gamma: float = 1e-3
    """Weight of the 'log' distillation."""
    variance: Literal["biased", "unbiased"] = "biased"
    """Standardise with the biased variance and 'eps' (Barlow Twins' code), or as the pseudocode
    with 'z.std(0)' and no eps."""
    eps: float = 1e-5
    scale: float = 1.0
    """Factor on the whole loss. Matters under LARS only through biases and norms, which it leaves
    unscaled."""
    statistics: Literal["global", "local"] = "global"
    """With several processes: one loss over the global batch with the exact gradient, or one per
    rank."""

    def __post_init__(self) -> None:
        _require_probability("loss", alpha=self.alpha)
        _require_not_negative("loss", lambda_=self.lambda_, gamma=self.gamma, eps=self.eps)
        _require_positive("loss", scale=self.scale)


@dataclass(frozen=True, kw_only=True)
class SlimConfig:
    """Which filters the slim encoder keeps, and when they are chosen."""

    ratio: float = 0.5
    """Share s of output filters kept in each convolution: the int(s * Cout), at least 1, of
    largest L1 norm. 1: the slim encoder is the dense one (cross-distillation alone)."""
    refresh_steps: int = 0
    """Choose the filters anew every so many steps (0: at the end of each epoch)."""
    warmup_epochs: int = 0
    """Epochs at the start in which the slim encoder stays dense."""
    exclude: tuple[str, ...] = (
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

    def __post_init__(self) -> None:
        _require(
            0 < self.ratio <= 1,
            f"slim.ratio is {self.ratio}; a value above 0 and at most 1 works",
        )
        _require_not_negative(
            "slim", refresh_steps=self.refresh_steps, warmup_epochs=self.warmup_epochs
        )
        for pattern in self.exclude:
            try:
                re.compile(pattern)
            except re.error as error:
                raise UserError(
                    f"slim.exclude holds {pattern!r}, which is no regular expression: {error}"
                ) from None


@dataclass(frozen=True, kw_only=True)
class OptimConfig:
    """The optimiser and its schedule."""

    name: Literal["lars", "adamw"] = "lars"
    lr: float = 0.3
    """Learning rate for a global batch of 256; the rate used is lr * batch_size / 256."""
    weight_decay: float = 1e-4
    """Not applied to one-dimensional parameters (biases, norms)."""
    momentum: float = 0.9
    """LARS."""
    eta: float = 0.02
    """LARS trust coefficient."""
    clip: bool = True
    """LARS: bound the trust ratio so that no layer's rate exceeds lr."""
    betas: tuple[float, float] = (0.9, 0.999)
    """AdamW."""
    warmup_epochs: int = 10
    """Linear warm-up, then cosine to 0, per step."""

    def __post_init__(self) -> None:
        _require_positive("optim", lr=self.lr, eta=self.eta)
        _require_not_negative(
            "optim", weight_decay=self.weight_decay, warmup_epochs=self.warmup_epochs
        )
        _require(
            0 <= self.momentum < 1,
            f"optim.momentum is {self.momentum}; a value from 0 to below 1 works",
        )


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """kNN accuracy of the frozen features, for the dense and the slim encoder."""

    every: int = 10
    """Epochs between evaluations (0: only before and after training)."""
    k: int = 20
    """Neighbours."""
    temperature: float = 0.07
    """Of the neighbours' weights exp(similarity / temperature)."""
    bank: int = 50_000
    """Training images to search among, at most."""
    queries: int = 10_000
    """Validation images to classify, at most."""
    batch_size: int = 256
    encoders: Literal["both", "dense", "slim"] = "both"
    recalibrate_batches: int = 20
    """Batches from which batch-norm statistics are estimated anew for each encoder before it is
    evaluated: the running ones mix the dense and the slim network."""

    def __post_init__(self) -> None:
        _require_not_negative("eval", every=self.every)
        _require_positive(
            "eval",
            k=self.k,
            temperature=self.temperature,
            bank=self.bank,
            queries=self.queries,
            batch_size=self.batch_size,
            recalibrate_batches=self.recalibrate_batches,
        )


@dataclass(frozen=True, kw_only=True)
class LogConfig:
    """What is written while training; 'metrics.jsonl' and the pictures always are."""

    every: int = 10
    """Steps between readings of the metrics. The device is not waited for in between."""
    tensorboard: bool = True
    """Also write TensorBoard events, where it is installed."""
    wandb: str | None = None
    """Weights & Biases project to log to."""
    min_std: float = 0.02
    """Collapse alarm: mean over dimensions of sqrt(D) * std of the length-normalised embeddings
    (1: spread evenly, 0: all the same)."""
    min_rank: float = 2.0
    """Collapse alarm: effective rank of the embeddings."""

    def __post_init__(self) -> None:
        _require_positive("log", every=self.every)
        _require_not_negative("log", min_std=self.min_std, min_rank=self.min_rank)


@dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
    """When the state of the run is written."""

    every_steps: int = 0
    """Steps between checkpoints, besides the one at the end of each epoch (0: none besides)."""
    every_epochs: int = 1
    """Epochs between checkpoints."""
    keep: int = 2
    """How many of the last checkpoints to keep; the one with the best kNN is kept besides."""

    def __post_init__(self) -> None:
        _require_not_negative("checkpoint", every_steps=self.every_steps)
        _require_positive("checkpoint", keep=self.keep, every_epochs=self.every_epochs)


@dataclass(frozen=True, kw_only=True)
class Config:
    """A run of SACL-XD pre-training."""

    preset: tyro.conf.Suppress[str] = "custom"
    """The preset this configuration started from."""
    out: str | None = None
    """Run folder (default: runs/PRESET/DATE-TIME)."""
    resume: str = "never"
    """'auto': go on from the newest checkpoint of the run folder (without 'out': of the newest
    unfinished run of the preset), or start where there is none. 'never': start. Or the path of
    a checkpoint."""
    seed: int = 0
    epochs: int = 100
    batch_size: int = 256
    """Images in a step, over all processes."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    precision: Literal["auto", "fp32", "bf16", "fp16"] = "auto"
    """Autocast type of the encoder and projector (auto: bf16 on a GPU, fp32 on a CPU). The loss is
    always fp32."""
    channels_last: bool = True
    """Memory format of images, activations and convolution weights."""
    backend: Literal["auto", "torch", "triton", "cuda", "cpu", "apex"] = "auto"
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
        _require_positive("config", epochs=self.epochs)
        _require_not_negative("config", seed=self.seed)
        _require(
            self.batch_size >= 2,
            f"batch_size is {self.batch_size}; 2 or more works, because the loss standardises "
            "every feature over the batch",
        )

    @property
    def base_lr(self) -> float:
        """The learning rate after warm-up, scaled with the global batch."""
        return self.optim.lr * self.batch_size / 256


def to_dict(config: Any) -> dict[str, Any]:
    """A configuration as plain dictionaries, lists and numbers (for YAML and checkpoints)."""

    def plain(value: Any) -> Any:
        if dataclasses.is_dataclass(value):
            return {f.name: plain(getattr(value, f.name)) for f in dataclasses.fields(value)}
        return [plain(v) for v in value] if isinstance(value, tuple) else value

    return plain(config)


def to_flags(values: dict[str, Any], prefix: str = "") -> list[str]:
    """The command-line options that say the same as a (partial) dictionary of 'to_dict'."""
    flags: list[str] = []
    for key, value in values.items():
        name = f"{prefix}{str(key).strip('_').replace('_', '-')}"
        if isinstance(value, dict):
            flags += to_flags(value, f"{name}.")
        elif isinstance(value, bool):
            head, _, tail = name.rpartition(".")
            dot = "." if head else ""
            flags.append(f"--{name}" if value else f"--{head}{dot}no-{tail}")
        elif isinstance(value, (list, tuple)):
            flags += [f"--{name}", *map(str, value)]
        else:
            flags += [f"--{name}", str(value)]
    return flags
