"""Graphs for devices: ExecuTorch, LiteRT and Core ML. Each takes one image (1, 3, S, S).

These runtimes plan their memory for a fixed batch, and ExecuTorch refuses a larger one. Their
packages are made for one version of torch each, or hold other packages at versions that contradict
ours, so they are imported in functions and by their own formats alone.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import io
import itertools
import json
import logging
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sacl_fast.deploy.graph import (
    REFUSALS,
    NotRunHere,
    Runner,
    graph_metadata,
    graph_module,
    in_one_sentence,
)
from sacl_fast.deploy.network import Network
from sacl_fast.errors import UserError, reason_of

_CALIBRATION = 256  # images: these runtimes calibrate one by one, and ranges settle early


def _one_by_one(
    run: Callable[[Tensor], Tensor], runtime: str, path: Path, hint: str = ""
) -> Runner:
    """A runner of (N, 3, S, S) by one of (1, 3, S, S)."""

    def of_many(images: Tensor) -> Tensor:
        try:
            return torch.cat([run(image.contiguous()) for image in images.split(1)])
        except REFUSALS as error:
            raise UserError(
                f"{runtime} cannot run {path.name}: {reason_of(error)}{hint}"
            ) from error

    return of_many


def _each(images: Iterable[Tensor]) -> Iterator[Tensor]:
    """Images (1, 3, S, S) to calibrate on."""
    single = (image for batch in images for image in batch.contiguous().split(1))
    return itertools.islice(single, _CALIBRATION)


def _image(network: Network) -> Tensor:
    return torch.zeros(1, 3, network.size, network.size)


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what converters print and log of their progress."""
    disabled = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with (
            contextlib.redirect_stdout(io.StringIO()),
            contextlib.redirect_stderr(io.StringIO()),
            warnings.catch_warnings(),
        ):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)


# ExecuTorch: on the CPU by XNNPACK, whose operators take what they can of the graph.


def executorch_content(network: Network, fold_norm: bool) -> bytes:
    with in_one_sentence(network, "ExecuTorch"), _quiet():
        program = torch.export.export(graph_module(network, fold_norm), (_image(network),))
        return _lowered(program)


def _lowered(program: torch.export.ExportedProgram) -> bytes:
    from executorch.backends.xnnpack.partition.xnnpack_partitioner import XnnpackPartitioner
    from executorch.exir import to_edge_transform_and_lower

    lowered = to_edge_transform_and_lower(program, partitioner=[XnnpackPartitioner()])
    return lowered.to_executorch().buffer


def executorch_int8(
    network: Network, fold_norm: bool, path: Path, images: Iterable[Tensor]
) -> bytes:
    from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
        XNNPACKQuantizer,
        get_symmetric_quantization_config,
    )
    from torchao.quantization.pt2e.quantize_pt2e import convert_pt2e, prepare_pt2e

    example = (_image(network),)
    with in_one_sentence(network, "ExecuTorch in int8"), _quiet(), torch.no_grad():
        quantizer = XNNPACKQuantizer()
        quantizer.set_global(get_symmetric_quantization_config(is_per_channel=True))
        graph = torch.export.export(graph_module(network, fold_norm), example).module()
        prepared = prepare_pt2e(graph, quantizer)
        for image in _each(images):
            prepared(image)
        return _lowered(torch.export.export(convert_pt2e(prepared), example))


def load_executorch(path: Path) -> Runner:
    from executorch.runtime import Runtime

    try:
        method = Runtime.get().load_program(path).load_method("forward")
    except REFUSALS as error:
        raise UserError(f"executorch cannot load {path.name}: {reason_of(error)}") from error
    # Its outputs lie in memory of the method, which the next run writes.
    hint = (
        f" (executorch {importlib.metadata.version('executorch')}, torch {torch.__version__}; each "
        "of its releases is made for one of torch: 1.5 for 2.14, 1.2 for 2.11)"
    )
    return _one_by_one(lambda image: method.execute([image])[0].clone(), "executorch", path, hint)


# LiteRT


class _Named(nn.Module):
    """With the output's name, which LiteRT takes from a dictionary."""

    def __init__(self, encoder: nn.Module) -> None:
        super().__init__()
        self.encoder = encoder

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        return {"features": self.encoder(images)}


def litert_content(network: Network, fold_norm: bool) -> bytes:
    import litert_torch

    module = _Named(graph_module(network, fold_norm)).eval()
    with in_one_sentence(network, "LiteRT"), _quiet(), tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "encoder.tflite"
        litert_torch.convert(module, sample_kwargs={"images": _image(network)}).export(str(path))
        return path.read_bytes()


def litert_int8(network: Network, fold_norm: bool, path: Path, images: Iterable[Tensor]) -> bytes:
    from ai_edge_quantizer import algorithm_manager, qtyping, quantizer, recipe

    calibration = [{"images": image.numpy()} for image in _each(images)]  # read more than once
    with in_one_sentence(network, "LiteRT in int8"), _quiet():
        work = quantizer.Quantizer(str(path), recipe.static_wi8_ai8())
        for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
            work.update_quantization_recipe(  # images and features stay float32
                ".*", end, algorithm_key=algorithm_manager.AlgorithmName.NO_QUANTIZE
            )
        statistics = work.calibrate({"serving_default": calibration})
        content = work.quantize(statistics).quantized_model
        if content is None:
            raise RuntimeError("nothing in it can be quantised")
        return bytes(content)


def load_litert(path: Path) -> Runner:
    from ai_edge_litert.interpreter import Interpreter

    try:
        interpreter = Interpreter(model_path=str(path), num_threads=torch.get_num_threads())
        run = interpreter.get_signature_runner()
    except REFUSALS as error:
        raise UserError(f"LiteRT cannot load {path.name}: {reason_of(error)}") from error

    def of_one(image: Tensor) -> Tensor:
        return torch.from_numpy(run(images=image.numpy())["features"].copy())

    return _one_by_one(of_one, "LiteRT", path)


# Core ML. Models are converted anywhere, and run on macOS alone.


def coreml_content(network: Network, fold_norm: bool) -> dict[str, bytes]:
    with in_one_sentence(network, "Core ML"), _quiet():
        import coremltools as ct

        image = _image(network)
        program = torch.export.export(graph_module(network, fold_norm), (image,))
        # In float32: the default of 16 bits would be checked by nobody who converts on Linux.
        model: Any = ct.convert(
            program.run_decompositions({}),
            inputs=[ct.TensorType(name="images", shape=tuple(image.shape))],
            outputs=[ct.TensorType(name="features")],
            minimum_deployment_target=ct.target.iOS16,
            compute_precision=ct.precision.FLOAT32,
            skip_model_load=True,
        )
        model.user_defined_metadata.update(graph_metadata(network, fold_norm))
        with tempfile.TemporaryDirectory() as folder:
            package = Path(folder) / "encoder.mlpackage"
            model.save(str(package))
            files = [package / "Manifest.json", *(package / "Data").rglob("*")]
            return {
                str(file.relative_to(package)): file.read_bytes()
                for file in files
                if file.is_file()
            }


def load_coreml(path: Path) -> Runner:
    with _quiet():
        import coremltools as ct

        on_mac = sys.platform == "darwin"
        model = ct.models.MLModel(str(path), skip_model_load=not on_mac)
    described = model.get_spec().description
    names = [feature.name for feature in (*described.input, *described.output)]
    if names != ["images", "features"]:
        raise UserError(f"Core ML reads {path.name} with inputs and outputs {json.dumps(names)}")
    if not on_mac:
        raise NotRunHere("macOS")

    def of_one(image: Tensor) -> Tensor:
        return torch.from_numpy(model.predict({"images": image.numpy()})["features"])

    return _one_by_one(of_one, "Core ML", path)
