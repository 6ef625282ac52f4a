"""The model card beside exported files: what they are, of what, and how they are loaded.

It holds no path and no name of the user's own data. Its Python blocks run in the export's folder.
"""

from __future__ import annotations

from collections.abc import Iterator

import timm

from sacl_fast import _version
from sacl_fast.checks import counted
from sacl_fast.config import Config
from sacl_fast.config.data import ViewConfig
from sacl_fast.deploy.result import Exported, ExportResult
from sacl_fast.encoders.file import read_encoder_metadata
from sacl_fast.evaluation.trained import Trained

_DATA = {
    "demo": "shapes that sacl-fast draws",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "voc2007": "PASCAL VOC 2007",
    "folder": "an image folder",
    "webdataset": "shards of images",
    "python": "images given from Python",
    "cache": "a cache of decoded images",
}
_CITATION = """\
@inproceedings{meng2023slimmed,
  title     = {Slimmed Asymmetrical Contrastive Learning and Cross Distillation for Lightweight Model Training},
  author    = {Meng, Jian and Yang, Li and Lee, Kyungmin and Shin, Jinwoo and Fan, Deliang and Seo, Jae-sun},
  booktitle = {Advances in Neural Information Processing Systems},
  year      = {2023}
}"""  # noqa: E501


def model_card(trained: Trained, result: ExportResult, *, fold_norm: bool) -> str:
    """The card of an export, as Markdown."""
    parts = [
        _front(),
        f"# {trained.config.encoder.name}, pre-trained without labels",
        "\n".join(f"- {line}" for line in _facts(trained)),
        "## Files",
        _table(result),
        result.caption,
        "## Input and output",
        _input(trained, fold_norm),
        "## Loading",
        *_loading(trained, result),
        "## Licence",
        "sacl-fast, which trained and exported these files, and timm, which has the architecture, "
        "are Apache-2.0. The weights belong to whoever trained them: how they may be used is to be "
        "said here, and the terms of the images that they were trained on may bear on it.",
        "## Citation",
        f"```bibtex\n{_CITATION}\n```",
    ]
    return "\n\n".join(parts) + "\n"


def _front() -> str:
    return (
        "---\nlibrary_name: timm\npipeline_tag: image-feature-extraction\n"
        "tags:\n- image-feature-extraction\n- self-supervised\n- sacl-fast\n---"
    )


def _facts(trained: Trained) -> Iterator[str]:
    config = trained.config
    encoder = config.encoder
    whole = trained.has_data  # an encoder's file does not say all
    distilled = config.loss.distillation != "none"
    if not whole:
        distilled = read_encoder_metadata(trained.path).get("method") != "barlow-twins"
    method = "SACL-XD" if distilled else "Barlow Twins"
    yield f"Method: {method}, by sacl-fast {_version.__version__}"
    stem = "" if encoder.stem == "imagenet" else f", stem {encoder.stem}"
    yield f"Encoder: {encoder.name}, width {encoder.width:g}{stem}"
    if "slim" in trained.widths:
        yield f"Slim encoder: {config.slim.ratio:g} of the filters of each convolution"
    images = f"{counted(trained.images, 'image')}" if trained.images else "number of images unknown"
    yield f"Data: {_DATA[config.data.source] if trained.has_data else 'unknown source'}, {images}"
    yield f"Trained: {counted(trained.epochs, 'epoch', 'g')}, {counted(trained.steps, 'step')}" + (
        f" of {config.batch_size} images" if whole else ""
    )
    if whole:
        yield f"Views: {config.views.size} px; {_views(config)}"
    for width in ("dense", "slim"):
        if (accuracy := trained.knn.get(f"knn_{width}")) is not None:
            before = trained.knn_before.get(f"knn_{width}")
            untrained = "" if before is None else f" (untrained {before:.2f} %)"
            yield f"kNN accuracy that the run measured, {width}: {accuracy:.2f} %{untrained}"


def _views(config: Config) -> str:
    a, b = _view(config.views.a), _view(config.views.b)
    return f"both {a}" if a == b else f"first {a}; second {b}"


def _view(view: ViewConfig) -> str:
    low, high = view.crop_scale
    parts = [f"crop {low:g} to {high:g} of the area"]
    for name in ("flip", "jitter", "grayscale", "blur", "solarize"):
        if probability := getattr(view, name):
            parts.append(f"{name} {probability:g}")
    return ", ".join(parts)


def _table(result: ExportResult) -> str:
    head, rows = result.table()
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _input(trained: Trained, fold_norm: bool) -> str:
    views = trained.config.views
    mean, std = (", ".join(f"{v:g}" for v in values) for values in (views.mean, views.std))
    normalised = f"RGB scaled to 0..1, minus mean ({mean}), over std ({std})"
    text = f"Images (N, 3, {views.size}, {views.size}), float32, any N: {normalised}."
    if fold_norm:
        text += (
            " The graphs normalise by themselves and take RGB scaled to 0..1; "
            "weights (.safetensors) do not."
        )
    return text + (
        " For the figures here images were resized to that side where it is up to 64 px; above, "
        "the shorter side to 256/224 of it, and the central square was cropped. The output is "
        "features (N, F), float32: divide them by their length for kNN, or train a layer on them."
    )


def _loading(trained: Trained, result: ExportResult) -> Iterator[str]:
    """How a file is loaded, once for the files that are loaded alike."""
    seen: set[str] = set()
    for row in result.rows:
        if not row.is_file:
            continue
        imports, code = _CODE[row.format.split()[0]](trained, row)
        if (alike := code.replace(row.name, "")) not in seen:
            seen.add(alike)
            images = f"images = torch.rand(1, 3, {trained.size}, {trained.size})  # yours"
            lines = "\n".join(("import torch", *imports, "", images, *code.splitlines()))
            yield f"`{row.name}`:\n\n```python\n{lines}\n```"


def _timm_code(trained: Trained, row: Exported) -> tuple[list[str], str]:
    """Imports, and the lines after them."""
    width = "" if row.width in ("dense", "1") else ', width="slim"'
    if width or not is_plain_timm(trained):
        load = f'encoder = sacl_fast.load_encoder("{row.name}"{width})'
        return ["import sacl_fast"], f"{load}\nfeatures = encoder(images)"
    name = trained.config.encoder.name
    made_for = timm.get_pretrained_cfg(name)
    fixed = made_for is not None and made_for.fixed_input_size
    size = f", img_size={trained.size}" if fixed else ""
    return ["import timm", "from safetensors.torch import load_file"], (
        f'encoder = timm.create_model("{name}", num_classes=0{size}).eval()\n'
        f'encoder.load_state_dict(load_file("{row.name}"))\nfeatures = encoder(images)'
    )


def is_plain_timm(trained: Trained) -> bool:
    """Whether timm's factory alone makes the encoder: no width or stem that sacl-fast adds."""
    encoder = trained.config.encoder
    return (encoder.width, encoder.stem) == (1.0, "imagenet") and encoder.name != "resnet20"


def _onnx_code(trained: Trained, row: Exported) -> tuple[list[str], str]:
    return ["import onnxruntime"], (
        f'session = onnxruntime.InferenceSession("{row.name}")\n'
        '(features,) = session.run(["features"], {"images": images.numpy()})'
    )


def _torch_export_code(trained: Trained, row: Exported) -> tuple[list[str], str]:
    load = f'encoder = torch.export.load("{row.name}").module()'
    return [], f"{load}\nfeatures = encoder(images)"


def _executorch_code(trained: Trained, row: Exported) -> tuple[list[str], str]:
    return ["from executorch.runtime import Runtime"], (
        f'method = Runtime.get().load_program("{row.name}").load_method("forward")\n'
        "(features,) = method.execute([images])"
    )


def _litert_code(trained: Trained, row: Exported) -> tuple[list[str], str]:
    return ["from ai_edge_litert.interpreter import Interpreter"], (
        f'run = Interpreter("{row.name}").get_signature_runner()\n'
        'features = run(images=images.numpy())["features"]'
    )


def _coreml_code(trained: Trained, row: Exported) -> tuple[list[str], str]:
    return ["import coremltools"], (
        f'model = coremltools.models.MLModel("{row.name}")  # on macOS\n'
        'features = model.predict({"images": images.numpy()})["features"]'
    )


_CODE = {
    "timm": _timm_code,
    "onnx": _onnx_code,
    "torch-export": _torch_export_code,
    "executorch": _executorch_code,
    "litert": _litert_code,
    "coreml": _coreml_code,
}
