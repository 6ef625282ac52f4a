"""An ONNX file with weights and activations in int8, by onnxruntime's static quantisation.

Weights have a scale for each output channel, activations one for each tensor: of the smallest and
largest value that calibration images give.
"""

from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor


def quantise(source: Path, images: Iterable[Tensor]) -> bytes:
    """The content of an ONNX file that is ``source`` in int8.

    Args:
        images: batches (N, 3, S, S) as the file takes them, to calibrate activations on.
    """
    from onnxruntime.quantization import CalibrationDataReader, QuantFormat, quantize_static
    from onnxruntime.quantization.shape_inference import quant_pre_process

    class Reader(CalibrationDataReader):
        def __init__(self) -> None:
            self._batches: Iterator[Tensor] = iter(images)

        def get_next(self) -> dict | None:
            batch = next(self._batches, None)
            return None if batch is None else {"images": batch.contiguous().numpy()}

    with tempfile.TemporaryDirectory() as folder, _without_remarks(), torch.no_grad():
        inferred, quantised = Path(folder) / "inferred.onnx", Path(folder) / "int8.onnx"
        # The exporter has written shapes. Symbolic inference fails where attention has unit length.
        quant_pre_process(source, inferred, skip_symbolic_shape=True)
        quantize_static(
            inferred, quantised, Reader(), quant_format=QuantFormat.QDQ, per_channel=True
        )
        return quantised.read_bytes()


@contextmanager
def _without_remarks() -> Iterator[None]:
    """Without the lines that onnxruntime logs by the root logger, one for each bias."""
    root = logging.getLogger()

    def others(record: logging.LogRecord) -> bool:
        return record.name != root.name

    root.addFilter(others)
    try:
        yield
    finally:
        root.removeFilter(others)
