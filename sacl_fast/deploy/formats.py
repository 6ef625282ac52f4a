"""The formats that an encoder is exported in: what each needs, how it is written and run again.

A file is run on images (N, 3, S, S), float32, on the CPU, and gives features (N, F). The graphs
have one input, ``images``, and one output, ``features``; images are normalised or, with
``fold_norm``, scaled to 0..1. Those for devices (``mobile``) take one image.
"""

from __future__ import annotations

import importlib.util
import io
import json
import logging
import warnings
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sacl_fast.config.choices import ExportFormat
from sacl_fast.deploy import int8, mobile
from sacl_fast.deploy.graph import METADATA, Runner, graph_metadata, graph_module, in_one_sentence
from sacl_fast.deploy.network import Network
from sacl_fast.encoders.file import encode_encoder, load_encoder
from sacl_fast.errors import UserError, reason_of
from sacl_fast.slim.export import load_compact

logger = logging.getLogger(__name__)

Content = bytes | Mapping[str, bytes]
"""Of a file, or of a folder's files by their paths in it."""


@dataclass(frozen=True)
class Format:
    """How files of a format are written and run."""

    suffix: str
    content: Callable[[Network, bool], Content]
    """Of a network's file, with the images' normalisation folded in or not."""
    load: Callable[[Path], Runner]
    """Raises ``NotRunHere`` for a file that is sound and cannot be run on this machine."""
    is_graph: bool = True
    """Whether the file holds the computation, not the weights alone."""
    packages: tuple[str, ...] = ()
    """Modules that it takes to write and check a file."""
    install: str = ""
    """The command that brings them."""
    int8: Callable[[Network, bool, Path, Iterable[Tensor]], bytes] | None = None
    """The file in int8: of a network, its file in float32, and batches (N, 3, S, S) as the file
    takes them, on which activations are calibrated."""


def check_packages(formats: Iterable[ExportFormat]) -> None:
    """Raise UserError where a package is missing that one of the formats needs."""
    for name in formats:
        form = FORMATS[name]
        missing = [m for m in form.packages if importlib.util.find_spec(m) is None]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise UserError(
                f"format {name} needs {' and '.join(missing)}, which {verb} not installed; "
                f"{form.install} brings what is missing"
            )


def _timm_content(network: Network, fold_norm: bool) -> bytes:
    return encode_encoder(network.state, network.metadata)


def _load_timm(path: Path) -> Runner:
    encoder = load_encoder(path)
    compact = load_compact(path)
    smaller = sum(p.numel() for p in compact.parameters()) < sum(
        p.numel() for p in encoder.parameters()
    )
    return compact if smaller else encoder


def _example(network: Network) -> tuple[tuple[Tensor], tuple]:
    """An example of images, and which sizes are free."""
    images = torch.zeros(2, 3, network.size, network.size)
    return (images,), ({0: torch.export.Dim("N", min=1)},)


def _onnx_content(network: Network, fold_norm: bool) -> bytes:
    example, free = _example(network)
    logger.info("(PyTorch traces and translates it: of many operators, a minute or more)")
    with in_one_sentence(network, "ONNX"):
        program = torch.onnx.export(
            graph_module(network, fold_norm),
            example,
            dynamo=True,
            dynamic_shapes=free,
            input_names=["images"],
            output_names=["features"],
            verbose=False,
        )
        assert program is not None
        program.model.metadata_props.update(graph_metadata(network, fold_norm))
        return program.model_proto.SerializeToString()


def _load_onnx(path: Path) -> Runner:
    import onnxruntime
    from onnxruntime.capi import (
        onnxruntime_pybind11_state as errors,  # pyright: ignore[reportAttributeAccessIssue]
    )

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.log_severity_level = 3
    try:
        session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])
    except (errors.Fail, errors.InvalidGraph, errors.NotImplemented) as error:
        raise UserError(f"onnxruntime cannot load {path.name}: {reason_of(error)}") from error

    def run(images: Tensor) -> Tensor:
        try:
            (features,) = session.run(["features"], {"images": images.contiguous().numpy()})
        except (errors.Fail, errors.InvalidArgument, errors.RuntimeException) as error:
            raise UserError(f"onnxruntime cannot run {path.name}: {reason_of(error)}") from error
        return torch.from_numpy(features)

    return run


def _onnx_int8(network: Network, fold_norm: bool, path: Path, images: Iterable[Tensor]) -> bytes:
    with in_one_sentence(network, "ONNX in int8"):
        return int8.quantise(path, images)


def _torch_export_content(network: Network, fold_norm: bool) -> bytes:
    example, free = _example(network)
    file = io.BytesIO()
    with in_one_sentence(network, "torch.export"):
        program = torch.export.export(
            graph_module(network, fold_norm), example, dynamic_shapes=free
        )
        said = json.dumps(graph_metadata(network, fold_norm))
        torch.export.save(program, file, extra_files={METADATA: said})
    return file.getvalue()


def _load_torch_export(path: Path) -> Runner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it reads weights from memory that cannot be written
        return torch.export.load(path).module()


FORMATS: dict[ExportFormat, Format] = {
    "timm": Format(".safetensors", _timm_content, _load_timm, is_graph=False),
    "onnx": Format(
        ".onnx",
        _onnx_content,
        _load_onnx,
        packages=("onnx", "onnxscript", "onnxruntime"),
        install="pip install 'sacl-fast[export]'",
        int8=_onnx_int8,
    ),
    "torch-export": Format(".pt2", _torch_export_content, _load_torch_export),
    "executorch": Format(
        ".pte",
        mobile.executorch_content,
        mobile.load_executorch,
        packages=("executorch",),
        install="pip install 'sacl-fast[executorch]'",
        int8=mobile.executorch_int8,
    ),
    "litert": Format(
        ".tflite",
        mobile.litert_content,
        mobile.load_litert,
        packages=("litert_torch", "ai_edge_litert", "ai_edge_quantizer"),
        install="pip install litert-torch, then pip install -U typing-extensions,",
        int8=mobile.litert_int8,
    ),
    "coreml": Format(
        ".mlpackage",
        mobile.coreml_content,
        mobile.load_coreml,
        packages=("coremltools",),
        install="pip install 'sacl-fast[coreml]'",
    ),
}
