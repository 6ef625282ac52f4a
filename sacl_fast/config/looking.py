"""Settings of ``sacl-fast features`` and ``sacl-fast report``."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated

from sacl_fast.checks import A_PATH, Count, CountOrZero, Range, Rule, Settings
from sacl_fast.config.choices import Device, Precision, Projection, SplitName, Width
from sacl_fast.config.data import DataConfig


def _ends(*ends: str) -> Rule:
    return Rule(lambda path: path.endswith(ends), f"a name in {' or '.join(ends)} works")


@dataclass(frozen=True, kw_only=True)
class FeaturesConfig(Settings):
    """Which features are written, and how they are shown. The defaults of data are the run's."""

    out: Annotated[str, A_PATH, _ends(".npz", ".parquet")] | None = None
    """File of the features, .npz or .parquet (default: 'features.npz' in the run folder, or beside
    the encoder's file). The pictures and the page are written beside it, under its name. A file
    that is there already is refused, but at the default place where this command wrote it."""
    width: Width = "dense"
    """The encoder."""
    split: SplitName = "all"
    """Training images, validation images, or all."""
    images: CountOrZero = 0
    """Images at most, a random choice (0: all)."""
    normalise: bool = False
    """Write features of length 1, not as the encoder gives them."""
    pages: bool = True
    """Draw the picture, the nearest neighbours and the page."""
    project: Projection = "pca"
    """What makes two dimensions of the features. 'umap' needs umap-learn."""
    clusters: Annotated[int, Range(2, 100)] = 10
    """Clusters (k-means) that colour the picture, where there are no labels."""
    queries: Annotated[int, Range(1, 100)] = 12
    """Images whose nearest neighbours among all images are shown."""
    neighbours: Annotated[int, Range(1, 20)] = 8
    """Neighbours of an image."""
    shown: Annotated[int, Range(1, 5000)] = 500
    """Images on the page to click on; a thumbnail takes up to 4 KiB."""
    seed: Annotated[int, Range(0, 2**53 - 1)] = 0
    """Chooses images."""
    batch_size: Count = 256
    device: Device = "auto"
    precision: Precision = "auto"
    """Autocast type of the encoder (auto: bf16 on a GPU, fp32 on a CPU)."""
    data: DataConfig = field(default_factory=DataConfig)


@dataclass(frozen=True, kw_only=True)
class ReportConfig(Settings):
    """Where the comparison of runs is written."""

    out: Annotated[str, A_PATH, _ends(".html", ".md")] | None = None
    """'.html': one page with everything in it; '.md': Markdown, with the curves beside it as
    NAME_curves.png (default: only the tables, in the terminal). No file is replaced."""
