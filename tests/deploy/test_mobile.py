"""Files for devices, where their packages are installed: they give the run's features."""

from __future__ import annotations

import importlib.util
import re
import sys
from pathlib import Path

import pytest
import torch

import sacl_fast
from sacl_fast.deploy import formats
from sacl_fast.errors import UserError

LITERT = formats.FORMATS["litert"].packages


@torch.no_grad()
def images_and_features(run: Path, width) -> tuple[torch.Tensor, torch.Tensor]:
    images = torch.randn(4, 3, 16, 16)
    return images, sacl_fast.load_encoder(run, width=width)(images)


def run_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    blocks = re.findall(r"^```python\n(.*?)^```$", Path("MODEL_CARD.md").read_text(), re.M | re.S)
    assert blocks
    for block in blocks:
        names: dict = {}
        exec(block, names)
        assert len(names["features"]) == 1


def test_executorch(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("executorch")
    from executorch.runtime import Runtime

    out = tmp_path / "out"
    result = sacl_fast.export(run, out, ["dense", "slim"], ["executorch"], int8=True, knn=True)
    names = [f"encoder_{w}{s}.pte" for w in ("dense", "slim") for s in ("", "_int8")]
    assert [path.name for path in result.files] == names
    images, features = images_and_features(run, "slim")
    for name, lowest in (("encoder_slim.pte", 0.99999), ("encoder_slim_int8.pte", 0.9)):
        method = Runtime.get().load_program(out / name).load_method("forward")
        ours = torch.cat([method.execute([image])[0].clone() for image in images.split(1)])
        assert torch.cosine_similarity(ours, features).mean() > lowest
    assert result.rows[2].size < result.rows[1].size
    run_card(out, monkeypatch)


def test_litert(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for package in LITERT:
        pytest.importorskip(package)
    from ai_edge_litert.interpreter import Interpreter

    out = tmp_path / "out"
    result = sacl_fast.export(run, out, ["slim"], ["litert"], int8=True, fold_norm=True, knn=True)
    assert [path.name for path in result.files] == [
        "encoder_slim.tflite",
        "encoder_slim_int8.tflite",
    ]
    images, features = images_and_features(run, "slim")
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.229, 0.224, 0.225)))
    for path, lowest in zip(result.files, (0.99999, 0.9), strict=True):
        runner = Interpreter(str(path)).get_signature_runner()
        ours = [
            torch.from_numpy(runner(images=image.numpy())["features"].copy())
            for image in (images * std + mean).split(1)
        ]
        assert torch.cosine_similarity(torch.cat(ours), features).mean() > lowest
    run_card(out, monkeypatch)


def test_coreml(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    coremltools = pytest.importorskip("coremltools")
    out = tmp_path / "out"
    result = sacl_fast.export(run, out, ["dense", "slim"], ["coreml"], fold_norm=True)
    assert [path.name for path in result.files] == [
        "encoder_dense.mlpackage",
        "encoder_slim.mlpackage",
    ]
    dense, slim = result.rows[1:]
    assert slim.size < dense.size < 4 * dense.parameters + 200_000
    model = coremltools.models.MLModel(str(out / slim.name), skip_model_load=True)
    said = model.user_defined_metadata
    assert (said["input"], said["slim_ratio"], said["encoder"]) == ("0..1", "0.5", "resnet20")
    if sys.platform == "darwin":
        run_card(out, monkeypatch)
        assert dense.parity and slim.parity
        return
    assert (dense.not_run, dense.parity, dense.milliseconds) == ("macOS", None, None)
    said = "encoder_slim.mlpackage was not run, which needs macOS, and not compared."
    assert said in result.caption and said in (out / "MODEL_CARD.md").read_text()
    assert result.table()[1][1][5] == "not run"


@pytest.mark.parametrize(
    ("name", "package", "said"),
    [
        ("executorch", "executorch", r"pip install 'sacl-fast\[executorch\]'"),
        (
            "litert",
            "litert_torch",
            "pip install litert-torch, then pip install -U typing-extensions,",
        ),
        ("coreml", "coremltools", r"pip install 'sacl-fast\[coreml\]'"),
    ],
)
def test_a_missing_package(run: Path, tmp_path: Path, monkeypatch, name: str, package: str, said):
    find = importlib.util.find_spec
    there = object()
    monkeypatch.setattr(
        formats.importlib.util,
        "find_spec",
        lambda m: (
            None if m == package else there if m in formats.FORMATS[name].packages else find(m)
        ),
    )
    with pytest.raises(
        UserError, match=f"format {name} needs {package}, which is not installed; {said}"
    ):
        sacl_fast.export(run, tmp_path / "out", formats=[name])
    with pytest.raises(UserError, match=r"--int8 is of the formats .*not of timm"):
        sacl_fast.export(run, tmp_path / "out", formats=["timm"], int8=True)
    assert not list(tmp_path.iterdir())
