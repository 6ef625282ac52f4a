"""A run as files: they give the encoder's features, say what they are, or are not there."""

from __future__ import annotations

import importlib.util
import json
import os
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import sacl_fast
from sacl_fast.cli import main
from sacl_fast.config import Config, DataConfig, EncoderConfig, ViewsConfig
from sacl_fast.deploy import check, formats
from sacl_fast.deploy.graph import in_one_sentence
from sacl_fast.deploy.network import Network
from sacl_fast.encoders import build_encoder, read_encoder_metadata
from sacl_fast.encoders.file import encoder_metadata, save_encoder
from sacl_fast.errors import UserError
from sacl_fast.evaluation.trained import open_trained

HAS_ONNX = all(importlib.util.find_spec(m) for m in ("onnx", "onnxscript", "onnxruntime"))
needs_onnx = pytest.mark.skipif(not HAS_ONNX, reason="needs the packages of sacl-fast[export]")


def run_onnx(path: Path, images: Tensor) -> Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(path)
    return torch.from_numpy(session.run(["features"], {"images": images.numpy()})[0])


def run_blocks_of_card(folder: Path, monkeypatch: pytest.MonkeyPatch) -> int:
    """Run the card's Python where the files lie, every line of a file's; the number of files."""
    monkeypatch.chdir(folder)
    blocks = re.findall(r"^```python\n(.*?)^```$", Path("MODEL_CARD.md").read_text(), re.M | re.S)
    loaded = []
    for block in blocks:
        names: dict = {}
        head, *files = block.split("\n\n")
        images, *files = files
        exec(f"{head}\n{images}", names)
        for code in files:
            names.pop("features", None)
            exec(code, names)
            assert len(names["features"]) == 1
            loaded += re.findall(r"encoder_[\w.]+", code)
    assert sorted(loaded) == sorted(p.name for p in folder.iterdir() if p.name != "MODEL_CARD.md")
    return len(loaded)


@torch.no_grad()
def test_weights_and_graphs_give_the_features_of_the_run(run: Path, tmp_path: Path, monkeypatch):
    out = tmp_path / "new" / "out"
    result = sacl_fast.export(
        run, out, ["dense", "slim", "0.25"], ["safetensors", "torch-export"],
        fold_norm=True, knn=True,
    )  # fmt: skip
    names = [f"encoder_{w}.{s}" for w in ("dense", "slim", "0.25") for s in ("safetensors", "pt2")]
    assert [path.name for path in result.files] == names
    assert {path.name for path in out.iterdir()} == {*names, "MODEL_CARD.md"}
    assert os.listdir(tmp_path / "new") == ["out"]

    mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.4, 0.5, 0.6), (0.229, 0.224, 0.225)))
    for width in ("dense", "slim"):
        encoder = sacl_fast.load_encoder(run, width=width)
        again = sacl_fast.load_encoder(out / f"encoder_{width}.safetensors", width=width)
        graph = torch.export.load(out / f"encoder_{width}.pt2").module()
        for batch in (1, 5):
            images = torch.rand(batch, 3, 16, 16)  # 0..1
            features = encoder((images - mean) / std)
            torch.testing.assert_close(again((images - mean) / std), features)
            torch.testing.assert_close(graph(images), features, rtol=1e-4, atol=1e-5)
    dense = build_encoder("resnet20", width=0.5)
    dense.load_state_dict(load_file(out / "encoder_dense.safetensors"))
    with pytest.raises(UserError) as told:
        sacl_fast.load_encoder(out)  # which of them?
    assert "holds exported files (encoder_" in str(told.value)
    assert all(row.name in str(told.value) for row in result.rows if row.is_file)
    assert ".safetensors file works, such as" in str(told.value)
    own, exported = run / "encoder.safetensors", out / "encoder_dense.safetensors"
    assert read_encoder_metadata(own) == read_encoder_metadata(exported)
    assert all(torch.equal(load_file(own)[k], v) for k, v in load_file(exported).items())

    rows = {row.name: row for row in result.rows}
    sizes = [rows[f"encoder_{width}.pt2"].parameters for width in ("dense", "slim", "0.25")]
    assert sizes == sorted(sizes, reverse=True) and len(set(sizes)) == 3
    for width in ("dense", "slim", "0.25"):
        knn = [row.knn for row in result.rows if row.width == width]
        assert None not in knn and len(set(knn)) == 1
    assert rows["encoder_dense.pt2"].knn == pytest.approx(open_trained(run).knn["knn_dense"])

    assert read_encoder_metadata(out / "encoder_0.25.safetensors")["slim_ratio"] == "0.25"
    said = {"sacl_fast.json": ""}
    torch.export.load(out / "encoder_slim.pt2", extra_files=said)
    said = json.loads(said["sacl_fast.json"])
    assert (said["input"], said["slim_ratio"], said["encoder"]) == ("0..1", "0.5", "resnet20")

    card = (out / "MODEL_CARD.md").read_text()
    assert "SACL-XD" in card and "48 images" in card and str(run.parent) not in card
    assert 'load_encoder("encoder_0.25.safetensors", width="slim")' in card
    assert "1 epoch, 3 steps of 16 images" in card and "# yours, scaled to 0..1" in card
    assert "`encoder_0.25`: 0.25 of the filters of each convolution, those of largest L1" in card
    assert run_blocks_of_card(out, monkeypatch) == 6


@needs_onnx
@torch.no_grad()
def test_onnx_and_int8(run: Path, tmp_path: Path, monkeypatch):
    import onnx

    out = tmp_path / "out"
    result = sacl_fast.export(run, out, ["slim"], ["onnx"], int8=True)
    whole, small = out / "encoder_slim.onnx", out / "encoder_slim_int8.onnx"
    assert result.files == (whole, small)
    encoder = sacl_fast.load_encoder(run, width="slim")
    for batch in (1, 5):
        images = torch.randn(batch, 3, 16, 16)
        features = encoder(images)
        torch.testing.assert_close(run_onnx(whole, images), features, rtol=1e-4, atol=1e-5)
        cosines = torch.cosine_similarity(run_onnx(small, images), features)
        assert cosines.mean() > 0.9
    head, rows = result.table()
    shown = {row[0]: float(row[head.index("mean cosine")]) for row in rows[1:]}
    assert shown[whole.name] > 0.9999 > shown[small.name] > 0.9
    assert "in int8 are kept by the mean cosine" in (out / "MODEL_CARD.md").read_text()
    for path in (whole, small):
        model = onnx.load(path)
        onnx.checker.check_model(model)
        said = {entry.key: entry.value for entry in model.metadata_props}
        assert said["input"] == "normalised" and said["slim_ratio"] == "0.5"
    weights = [w for w in model.graph.initializer if w.data_type == onnx.TensorProto.INT8]
    assert any(len(w.dims) == 4 for w in weights)
    scales = {w.name: list(w.dims) for w in model.graph.initializer if w.name.endswith("_scale")}
    assert any(dims and dims[0] > 1 for dims in scales.values())  # one for each channel
    assert run_blocks_of_card(out, monkeypatch) == 2
    assert "`int8`: weights with a scale" in Path("MODEL_CARD.md").read_text()


def test_the_card_of_an_encoder_that_timm_makes(tmp_path: Path, monkeypatch):
    """Its weights are loaded by timm alone, at the images' size."""
    config = Config(encoder=EncoderConfig(name="test_vit"), views=ViewsConfig(size=32))
    path = tmp_path / "encoder.safetensors"
    said = encoder_metadata(config, epochs=0.5, steps=1, images=1, knn={})
    save_encoder(path, build_encoder("test_vit", image_size=32).state_dict(), said)
    sacl_fast.export(path, tmp_path / "out", formats=["timm", "torch-export"])
    card = (tmp_path / "out/MODEL_CARD.md").read_text()
    assert 'timm.create_model("test_vit", num_classes=0, img_size=32)' in card
    assert "0.5 epochs, 1 step\n" in card and "unknown source, 1 image\n" in card
    assert run_blocks_of_card(tmp_path / "out", monkeypatch) == 2


def test_a_file_that_does_not_hold_is_not_kept(run: Path, tmp_path: Path, monkeypatch):
    of = formats.FORMATS["torch-export"]

    def load(path: Path) -> formats.Runner:
        graph = of.load(path)
        return lambda images: graph(images) * 1.01

    monkeypatch.setitem(formats.FORMATS, "torch-export", replace(of, load=load))
    said = r"encoder_dense.pt2, whose features differ .* largest difference of 1\.0e-02"
    with pytest.raises(UserError, match=rf"^nothing was exported: {said}"):
        sacl_fast.export(run, tmp_path / "out", ["dense"], ["torch-export"])
    assert not os.listdir(tmp_path)
    with pytest.raises(UserError, match=rf"^not kept: {said}.*The other files are in .*out$"):
        sacl_fast.export(run, tmp_path / "out", ["dense"], ["torch-export", "timm"])
    assert sorted(os.listdir(tmp_path / "out")) == ["MODEL_CARD.md", "encoder_dense.safetensors"]
    assert "pt2" not in (tmp_path / "out/MODEL_CARD.md").read_text().partition("## Files")[2][:600]


def test_a_file_that_cannot_be_made_or_run_is_not_there(run: Path, tmp_path: Path, monkeypatch):
    """The others are."""
    of = formats.FORMATS["torch-export"]

    def untraceable(network: Network, fold_norm: bool) -> formats.Content:
        with in_one_sentence(network, "torch.export"):
            raise LookupError("no such operator\nand more")

    def of_two_alone(path: Path) -> formats.Runner:
        graph = of.load(path)
        return lambda images: graph(images.view(2, 3, 16, 16))

    formats_and_reasons = {
        "resnet20, width dense, cannot be exported by torch.export: no such operator": replace(
            of, content=untraceable
        ),
        "it cannot be run: shape ": replace(of, load=of_two_alone),
    }
    for number, (reason, broken) in enumerate(formats_and_reasons.items()):
        monkeypatch.setitem(formats.FORMATS, "torch-export", broken)
        out = tmp_path / str(number)
        with pytest.raises(UserError, match=f"^not kept: encoder_dense.pt2: .*{reason}"):
            sacl_fast.export(run, out, ["dense"], ["torch-export", "timm"])
        assert sorted(os.listdir(out)) == ["MODEL_CARD.md", "encoder_dense.safetensors"]


@pytest.mark.parametrize(
    ("features", "holds", "int8"),
    [
        (torch.eye(3), True, False),
        (torch.eye(3) * 1.0001, True, False),
        (torch.eye(3) * 1.1, False, False),
        (torch.eye(3) * torch.nan, False, False),
        (torch.eye(3) * torch.nan, False, True),
        (torch.eye(3) + 0.1, True, True),
        (torch.eye(3) + 0.1, False, False),
        (torch.eye(3).flip(0), False, True),
    ],
)
def test_what_holds(features: Tensor, holds: bool, int8: bool):
    given = iter((features[:1], features[1:]))
    found = check.parity(lambda images: next(given), torch.zeros(3, 3, 2, 2), torch.eye(3))
    assert (found.obstacle(int8=int8) is None) == holds


class Unsteady(torch.nn.Module):
    """Of images near a constant, which it takes away, and multiplies what is left."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.factor = factor

    def forward(self, images: Tensor) -> Tensor:
        return (images.mean((2, 3)) / 3 - 1 / 3) * self.factor + torch.arange(3.0)


@torch.no_grad()
@pytest.mark.parametrize(("factor", "holds"), [(1, True), (1e5, True), (1e7, False)])
def test_what_rounding_does_to_the_encoder_is_allowed_to_files(factor: float, holds: bool):
    """Its features in another order of summation, as a file's are."""
    noise = torch.rand(64, 3, 7, 7, generator=torch.Generator().manual_seed(0))
    encoder, images = Unsteady(factor), 1 + 1e-6 * noise
    features = encoder(images)
    found = check.parity(lambda part: encoder(part.flip(2, 3) * (1 + 2**-23)), images, features)
    assert (found.obstacle() is None) == (factor == 1)
    rounding = check.rounding_of(encoder, images, features)
    assert rounding is not None
    assert (found.obstacle(rounding=rounding) is None) == holds
    wrong = check.parity(lambda part: encoder(part) + 0.1 * torch.eye(3)[0], images, features)
    obstacle = wrong.obstacle(rounding=rounding)
    assert obstacle is not None and "rounding in float32 alone changes the encoder's by" in obstacle


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"widths": ["half"]}, "width is 'half'; dense, slim or a number above 0 and at most 1"),
        ({"widths": [1.5]}, r"width is 1\.5; a value above 0 and at most 1 works"),
        ({"widths": []}, "no width is given"),
        (
            {"formats": ["tflite"]},
            "format is 'tflite'; one of timm, onnx, torch-export, executorch, litert, coreml",
        ),
        ({"formats": []}, "no format is given"),
        ({"fold_norm": True}, "--fold-norm is of graphs"),
        ({"int8": True}, "--int8 is of the formats onnx, executorch, litert, and not of timm"),
        ({"knn": 1}, "knn is 1; True or False works"),
    ],
)
def test_settings_that_cannot_be(run: Path, tmp_path: Path, settings: dict, said: str):
    with pytest.raises(UserError, match=said):
        sacl_fast.export(run, tmp_path / "out", **settings)
    assert not os.listdir(tmp_path)


def test_what_is_missing_or_in_the_way(run: Path, tmp_path: Path, monkeypatch):
    def refused(said: str, *arguments, **settings) -> None:
        before = sorted(tmp_path.rglob("*"))
        with pytest.raises(UserError, match=said):
            sacl_fast.export(*arguments, **settings)
        assert sorted(tmp_path.rglob("*")) == before

    out, dense, slim = (
        tmp_path / "out",
        run / "encoder.safetensors",
        run / "encoder_slim.safetensors",
    )
    refused("nothing at", tmp_path / "none", out)
    refused("neither a checkpoint nor an encoder", run / "metrics.jsonl", out)
    refused(r"exists; the name of a new folder works", run, run)
    refused("holds the dense encoder only", dense, out, ["slim"])
    refused("holds the slim encoder only, in which", slim, out, [0.25], data=_demo())
    refused("does not say where those are", dense, out, [0.25])
    vit, nothing = (
        tmp_path / "vit.safetensors",
        "vit_tiny.* has no convolution to slim; width dense",
    )
    config = Config(encoder=EncoderConfig(name="vit_tiny_patch16_224"), views=ViewsConfig(size=32))
    state = build_encoder(config.encoder.name, image_size=32).state_dict()
    save_encoder(vit, state, encoder_metadata(config, epochs=1, steps=1, images=8, knn={}))
    refused(nothing, vit, out, [0.25])  # before images are asked for
    refused("--knn needs images", dense, out, knn=True)
    gone = DataConfig(source="folder", root=str(tmp_path / "gone"))
    refused("statistics needs the run's images, and .*gone", run, out, [0.25], data=gone)

    find = importlib.util.find_spec
    monkeypatch.setattr(
        formats.importlib.util, "find_spec", lambda name: None if name == "onnx" else find(name)
    )
    refused(r"needs onnx.*pip install 'sacl-fast\[export\]'", run, out, formats=["onnx"])


def test_without_the_images_it_is_compared_on_random_ones(run: Path, tmp_path: Path):
    result = sacl_fast.export(run / "encoder_slim.safetensors", tmp_path / "out", "slim", "timm")
    assert result.compared_with == "8 random images"
    card = (tmp_path / "out/MODEL_CARD.md").read_text()
    assert "unknown source, 48 images" in card


def test_a_checkpoint_in_the_midst_of_a_run(run: Path, tmp_path: Path):
    """Its statistics are estimated; an encoder's file with the data that is named likewise."""
    trained = open_trained(run)
    trained.states.clear()
    result = sacl_fast.export(trained, tmp_path / "a", ["dense"])
    assert result.compared_with == "16 of the run's images"
    other = sacl_fast.export(run / "encoder.safetensors", tmp_path / "b", [0.3], data=_demo())
    assert re.fullmatch(r"\d+ of the images given", other.compared_with)
    assert (tmp_path / "b/encoder_0.3.safetensors").exists()


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    out = str(tmp_path / "out")
    command = ["export", str(run), out, "--width", "slim,1", "--format", "timm"]
    assert main(command) == 0
    said = capsys.readouterr().out
    assert "slim" in said and "encoder_1.safetensors" in said and "folder: " in said
    assert main(command) == 2  # now it exists
    assert "exists" in capsys.readouterr().err
    assert main(["export", "--help"]) == 0
    assert "--fold-norm" in capsys.readouterr().out
    for wrong, sentence in (
        (["export", str(run)], "export needs first what to export"),
        (["export", "--width", "slim"], "export needs first what to export"),
        (["export", str(run), out + "2", "--widht", "slim"], "--width"),
        (["export", str(run), out + "2", "--width", "slimm"], "width is 'slimm'"),
    ):
        assert main(wrong) == 2
        assert sentence in capsys.readouterr().err
    assert not Path(out + "2").exists()


def _demo() -> DataConfig:
    return DataConfig(source="demo", limit=48, workers=0)


def test_features_of_any_size_are_compared():
    small = torch.eye(3) * 1e-20
    found = check.parity(lambda images: small[: len(images)], torch.zeros(1, 3, 2, 2), small[:1])
    assert found.obstacle() is None
