"""The formats that an encoder is exported in: what each needs, how it is written and run again.

A file is run on images (N, 3, S, S), float32, on the CPU, for any N, and gives features (N, F). The
graphs (``onnx``, ``torch-export``) have one input, ``images``, and one output, ``features``; images
are normalised or, with ``fold_norm``, scaled to 0..1.
"""

from __future__ import annotations

import importlib.util
import io
import json
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from sacl_fast.config.choices import ExportFormat
from sacl_fast.deploy.network import Network
from sacl_fast.encoders.file import encode_encoder, load_encoder
from sacl_fast.errors import UserError, reason_of
from sacl_fast.slim.export import load_compact

Runner = Callable[[Tensor], Tensor]
"""Images (N, 3, S, S) -> features (N, F)."""

# What torch's exporters raise of a model that they cannot follow or translate.
_REFUSALS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError, AssertionError)
_METADATA = "sacl_fast.json"


@dataclass(frozen=True)
class Format:
    """How files of a format are written and run."""

    suffix: str
    is_graph: bool
    """Whether the file holds the computation, not the weights alone."""
    packages: tuple[str, ...]
    """Modules of the extra ``export`` that it takes to write and check a file."""
    content: Callable[[Network, bool], bytes]
    """Of a network's file, with the images' normalisation folded in or not."""
    load: Callable[[Path], Runner]


def check_packages(formats: Iterable[ExportFormat]) -> None:
    """Raise UserError where a package is missing that one of the formats needs."""
    for name in formats:
        missing = [m for m in FORMATS[name].packages if importlib.util.find_spec(m) is None]
        if missing:
            verb = "is" if len(missing) == 1 else "are"
            raise UserError(
                f"format {name} needs {' and '.join(missing)}, which {verb} not installed; "
                "pip install 'sacl-fast[export]' brings what is missing"
            )


class FromUnitRange(nn.Module):
    """An encoder of normalised images as one of images scaled to 0..1."""

    scale: Tensor
    shift: Tensor

    def __init__(self, encoder: nn.Module, mean: tuple[float, ...], std: tuple[float, ...]) -> None:
        super().__init__()
        self.encoder = encoder
        # Apart from the first convolution: its padding is of zeros after normalisation.
        self.register_buffer("scale", 1 / torch.tensor(std).view(3, 1, 1))
        self.register_buffer("shift", -torch.tensor(mean).view(3, 1, 1) * self.scale)

    def forward(self, images: Tensor) -> Tensor:  # (N, 3, S, S) -> (N, F)
        return self.encoder(images * self.scale + self.shift)


def _graph(network: Network, fold_norm: bool) -> tuple[nn.Module, tuple[Tensor], tuple]:
    """What the exporters take: module, example, and which sizes are free."""
    module = network.module.eval()
    if fold_norm:
        module = FromUnitRange(module, network.mean, network.std).eval()
    images = torch.zeros(2, 3, network.size, network.size)
    return module, (images,), ({0: torch.export.Dim("N", min=1)},)


def _timm_content(network: Network, fold_norm: bool) -> bytes:
    return encode_encoder(network.state, network.metadata)


def _load_timm(path: Path) -> Runner:
    encoder = load_encoder(path)
    compact = load_compact(path)
    smaller = sum(p.numel() for p in compact.parameters()) < sum(
        p.numel() for p in encoder.parameters()
    )
    return compact if smaller else encoder


def _onnx_content(network: Network, fold_norm: bool) -> bytes:
    module, example, free = _graph(network, fold_norm)
    with _in_one_sentence(network, "ONNX"):
        program = torch.onnx.export(
            module,
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
        (features,) = session.run(["features"], {"images": images.contiguous().numpy()})
        return torch.from_numpy(features)

    return run


def _torch_export_content(network: Network, fold_norm: bool) -> bytes:
    module, example, free = _graph(network, fold_norm)
    file = io.BytesIO()
    with _in_one_sentence(network, "torch.export"):
        program = torch.export.export(module, example, dynamic_shapes=free)
        said = json.dumps(graph_metadata(network, fold_norm))
        torch.export.save(program, file, extra_files={_METADATA: said})
    return file.getvalue()


def _load_torch_export(path: Path) -> Runner:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it reads weights from memory that cannot be written
        return torch.export.load(path).module()


def graph_metadata(network: Network, fold_norm: bool) -> dict[str, str]:
    """What a graph says of itself: as the encoder's file, and ``input``: ``0..1`` or
    ``normalised`` images."""
    said = {key: value for key, value in network.metadata.items() if key != "format"}
    return said | {"input": "0..1" if fold_norm else "normalised"}


@contextmanager
def _in_one_sentence(network: Network, to: str) -> Iterator[None]:
    """Without the exporters' warnings, and with a sentence for what they refuse."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except _REFUSALS as error:
        raise UserError(
            f"encoder {network.metadata['encoder']}, width {network.width}, cannot be exported by "
            f"{to}: {reason_of(error)}"
        ) from error


FORMATS: dict[ExportFormat, Format] = {
    "timm": Format(".safetensors", False, (), _timm_content, _load_timm),
    "onnx": Format(".onnx", True, ("onnx", "onnxscript", "onnxruntime"), _onnx_content, _load_onnx),
    "torch-export": Format(".pt2", True, (), _torch_export_content, _load_torch_export),
}
