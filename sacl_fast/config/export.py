"""Settings of ``sacl-fast export``."""

from __future__ import annotations

from dataclasses import dataclass, field

from sacl_fast.checks import Settings
from sacl_fast.config.data import DataConfig


@dataclass(frozen=True, kw_only=True)
class ExportConfig(Settings):
    """What is exported, and how."""

    width: str = "dense"
    """Encoders, with commas between them. 'dense'; 'slim': at the ratio it was trained with; a
    number in (0, 1]: the filters of largest L1 norm at that ratio, with batch-norm statistics
    estimated on the training images."""
    format: str = "timm"
    """Formats, with commas between them. 'timm' ('safetensors'): weights, as a run leaves them;
    'onnx' and 'torch-export': graphs for any batch size; 'executorch', 'litert' and 'coreml':
    graphs of one image, for devices."""
    fold_norm: bool = False
    """Graphs take images scaled to 0..1 and normalise them themselves."""
    int8: bool = False
    """Each ONNX, ExecuTorch and LiteRT file in int8 besides, calibrated on the training images."""
    knn: bool = False
    """Measure the kNN accuracy of each file too, as the run did."""
    data: DataConfig = field(default_factory=DataConfig)
