"""Settings of the method: encoder, projector, loss, and the slim encoder."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import tyro

from sacl_fast.checks import (
    A_PATH,
    BelowOne,
    CountOrZero,
    NotNegative,
    Pattern,
    Positive,
    Probability,
    Range,
    Ratio,
    Settings,
)
from sacl_fast.config.choices import (
    Distillation,
    NormGradientSetting,
    OffDiagonal,
    Pairing,
    SlimBatchNorm,
    SlimModeSetting,
    Statistics,
    Stem,
    Variance,
)


@dataclass(frozen=True, kw_only=True)
class EncoderConfig(Settings, path="encoder"):
    """The encoder f."""

    name: str = "mobilenetv1_100"
    """Any timm model, or 'resnet20' (CIFAR)."""
    width: Annotated[float, Range(0.01, 64)] = 1.0
    """Width multiplier, for the families where timm has one (MobileNet-V1/V2/V3, EfficientNet,
    ResNet) and 'resnet20'."""
    stem: Stem = "imagenet"
    """'stride1': the stem's first convolution does not down-sample. 'cifar': nor does
    anything else in the stem (3x3 convolution, no max-pool). A ViT's patches get half or a quarter
    of their side instead."""
    pretrained: Annotated[str, A_PATH] | None = None
    """Weights to start from: 'timm' downloads timm's of this model; or the path of a file with some
    under timm's names (.safetensors, .pt, .pth), of an encoder or of a checkpoint of a run. A run
    that is resumed does not need it again."""
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
    distillation: Distillation = "correlation"
    """'log': the supplement's Eq. 1-2, L_CL + gamma * L_log. 'none': L_CL alone and no passes
    without gradient (with 'slim.ratio' 1: Barlow Twins)."""
    off_diagonal: OffDiagonal = "squared"
    """'literal': the supplement's pseudocode, which forgets the square in the XD term; unbounded
    below, for study only."""
    pairing: Pairing = "same_width"
    """XD compares the same encoder on the other view ('same_width'), or the other encoder on
    the same view ('cross_width')."""
    gamma: NotNegative = 1e-3
    """Weight of the 'log' distillation."""
    variance: Variance = "biased"
    """Standardise with the biased variance and 'eps' (Barlow Twins' code), or as the pseudocode
    with 'z.std(0)' and no eps."""
    eps: Annotated[float, Range(0, 1)] = 1e-5
    scale: Positive = 1.0
    """Factor on the whole loss. Matters under LARS only through biases and norms, which it leaves
    unscaled."""
    statistics: Statistics = "global"
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
    batch_norm: SlimBatchNorm = "shared"
    """'separate': the slim encoder has its own batch-norm statistics and affine."""
    norm_gradient: NormGradientSetting = "auto"
    """Gradient through the slim encoder's batch norms. 'exact': as it is; that is 316 times the
    norm's scale where zeroed filters leave a channel constant. 'damped': times
    min(1, variance / eps), so 0 there. 'auto': 'damped' where the architecture has two or more
    norms of constant channels in a row, over which an untrained encoder's gradients grow: RepViT to
    1e30, FastViT to 1e13, EfficientViT-M, EfficientViM, MobileOne and GhostNets; ResNets,
    MobileNets and EfficientNets stay exact. Where it is 'damped', norms also take a channel of
    variance below eps less its first value, so that rounding of a constant stays rounding."""
    mode: SlimModeSetting = "auto"
    """How the slim passes run, with equal results: 'mask' multiplies masks into the full weights
    and saves no work; 'skip' computes the kept filters only. 'auto' takes 'skip' where that was
    measured to be faster as a rule: in float32 on the compiled CPU operators."""
