"""Every choice that is made by name, listed once: settings, operators and modules share them.

A setting that is ``auto`` until a run has decided it has a name of its own, with ``Setting``.
"""

from __future__ import annotations

from typing import Literal

Backend = Literal["auto", "torch", "triton", "cuda", "cpu", "apex"]
Device = Literal["auto", "cpu", "cuda", "mps"]
Precision = Literal["auto", "fp32", "bf16", "fp16"]

SourceName = Literal[
    "demo", "folder", "webdataset", "cifar10", "cifar100", "voc2007", "cache", "python"
]
Labels = Literal["auto", "folder", "none"]
LoaderName = Literal["auto", "compiled", "dali", "pillow", "torchvision"]
Residence = Literal["disk", "ram", "device"]
ResidenceSetting = Literal["auto", Residence]

Stem = Literal["imagenet", "stride1", "cifar"]

Distillation = Literal["correlation", "log", "none"]
OffDiagonal = Literal["squared", "literal"]
Pairing = Literal["same_width", "cross_width"]
Variance = Literal["biased", "unbiased"]
Statistics = Literal["global", "local"]

SlimBatchNorm = Literal["shared", "separate"]
NormGradient = Literal["exact", "damped"]
NormGradientSetting = Literal["auto", NormGradient]
SlimMode = Literal["mask", "skip"]
SlimModeSetting = Literal["auto", SlimMode]

Plan = Literal["eager", "compile", "dense+mask", "dense+skip", "fused"]
PlanSetting = Literal["auto", Plan]
GradientType = Literal["fp32", "bf16"]
Switch = Literal["auto", "on", "off"]

OptimizerName = Literal["lars", "adamw"]
Width = Literal["dense", "slim"]
Widths = Literal["both", Width]
ResumeAt = Literal["step", "next_epoch"]

RateSchedule = Literal["auto", "cosine", "steps"]
Resume = Literal["never", "auto"]
Split = Literal["train", "val"]
SplitName = Literal["all", Split]
Projection = Literal["pca", "umap"]

BenchVariant = Literal[
    "pseudocode", "plain", "kernels", "trial", "skip", "dense", "fused", "graph", "run", "compiled"
]

ExportFormat = Literal["timm", "onnx", "torch-export", "executorch", "litert", "coreml"]
