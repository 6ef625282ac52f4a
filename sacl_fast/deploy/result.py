"""What an export gave: a row for each file, and the table of them."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from sacl_fast.deploy.check import Parity


@dataclass(frozen=True)
class Exported:
    """A file, or the encoder in PyTorch that the files stand beside."""

    name: str
    width: str
    format: str
    parameters: int
    flops: int
    """Of one image, two for a multiply-add."""
    size: int
    """Bytes."""
    milliseconds: float | None
    """Median of one image; None where it was not run."""
    parity: Parity | None = None
    """With the encoder; None where it is the encoder, or was not run."""
    rounding: float | None = None
    """Largest difference, as ``parity`` has it, of the encoder in float32 from itself in float64,
    where the file was held against that."""
    knn: float | None = None
    """kNN accuracy in percent."""
    not_run: str | None = None
    """What running it needs that this machine is not."""

    @property
    def is_file(self) -> bool:
        return self.format != "torch"


@dataclass(frozen=True)
class ExportResult:
    """The folder that ``export`` made."""

    folder: Path
    rows: tuple[Exported, ...]
    """The encoder in PyTorch, then the files."""
    compared_with: str
    """The images on which files and encoder were compared."""
    threads: int
    """With which the times were measured."""
    refused: tuple[str, ...] = ()
    """Files that could not be made, or did not give the encoder's features: name and why."""

    @property
    def files(self) -> tuple[Path, ...]:
        """All but the model card."""
        return tuple(self.folder / row.name for row in self.rows if row.is_file)

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Head and rows."""
        has_knn = any(row.knn is not None for row in self.rows)
        has_mean = any(row.format.endswith("int8") for row in self.rows)
        head = ["file", "parameters", "MFLOPs", "MB", "ms", "difference", "cosine"]
        more = ["mean cosine"] * has_mean + ["kNN %"] * has_knn
        return [*head, *more], [
            [
                row.name,
                f"{row.parameters:,}",
                f"{row.flops / 1e6:,.1f}",
                f"{row.size / 1e6:.2f}",
                _text(row.milliseconds, ".2f"),
                f"{row.parity.difference:.1e}" if row.parity else "not run" if row.not_run else "",
                "" if row.parity is None else f"{row.parity.cosine:.6f}",
                *(["" if row.parity is None else f"{row.parity.mean_cosine:.6f}"] * has_mean),
                *([_text(row.knn, ".2f")] * has_knn),
            ]
            for row in self.rows
        ]

    @property
    def caption(self) -> str:
        """What the columns of the table mean."""
        threads = "1 thread" if self.threads == 1 else f"{self.threads} threads"
        return (
            f"ms: median of one image, CPU, {threads}. Difference (the largest, over the largest "
            f"feature) and cosine (the lowest): of the features in PyTorch and from the file, on "
            f"{self.compared_with}."
            + (
                " Files in int8 are kept by the mean cosine."
                if any(row.format.endswith("int8") for row in self.rows)
                else ""
            )
            + (
                " kNN %: accuracy on validation images, by their nearest training images."
                if any(row.knn is not None for row in self.rows)
                else ""
            )
            + "".join(
                f" {row.name} was not run, which needs {row.not_run}, and not compared."
                for row in self.rows
                if row.not_run
            )
            + "".join(
                f" {row.name} differs more than others since the encoder multiplies rounding: in "
                f"float64 its features differ by {row.rounding:.1e}."
                for row in self.rows
                if row.rounding is not None
            )
        )


def _text(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)
