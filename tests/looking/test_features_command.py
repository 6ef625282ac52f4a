"""``sacl-fast features`` and ``sacl_fast.evaluate.features`` on what a tiny run leaves."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import sacl_fast
from sacl_fast.cli import main
from sacl_fast.config import (
    Config,
    DataConfig,
    EncoderConfig,
    EvalConfig,
    LogConfig,
    ProjectorConfig,
    ViewsConfig,
)
from sacl_fast.data.loading.evaluation import EvalLoader
from sacl_fast.engine.trainer import train
from sacl_fast.errors import UserError
from sacl_fast.evaluation.trained import open_trained
from sacl_fast.looking.features import to_unit_length
from sacl_fast.looking.files import write_features
from sacl_fast.looking.run import write_whole
from sacl_fast.output import plain_text


@pytest.fixture(scope="module")
def image_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """40 training and 8 validation images in two classes."""
    rng = np.random.default_rng(0)
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 20), ("val", 4)):
        for name, base in (("bright", 170), ("dark", 60)):
            folder = root / split / name
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = rng.normal(base, 40, (20, 20, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).save(folder / f"{i:02}.png")
    return root


@pytest.fixture(scope="module")
def trained(image_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    config = Config(
        out=str(tmp_path_factory.mktemp("trained") / "run"),
        epochs=1,
        batch_size=16,
        device="cpu",
        data=DataConfig(root=str(image_folder), workers=0),
        views=ViewsConfig(size=16),
        encoder=EncoderConfig(name="resnet20", width=0.25),
        projector=ProjectorConfig(hidden=16, out=24),
        log=LogConfig(tensorboard=False),
        eval=EvalConfig(recalibrate_batches=2, batch_size=16),
    )
    return train(config).folder


@pytest.fixture
def run(trained: Path, tmp_path: Path) -> Path:
    """A copy of the run's folder."""
    return Path(shutil.copytree(trained, tmp_path / "run"))


def command(*args: object) -> int:
    return main(["features", *map(str, args)])


def test_features_are_the_encoders_of_every_image(run, image_folder, capsys):
    assert command(run, "--no-pages") == 0
    told = capsys.readouterr().out
    assert "48 images; 16 features each, as the encoder gives them" in told
    with np.load(run / "features.npz") as file:
        found = dict(file)
    assert sorted(found) == ["classes", "features", "labels", "metadata", "names", "split"]
    encoder = sacl_fast.load_encoder(run)
    trained = open_trained(run)
    source = sacl_fast.evaluate.features(run).sources[0]
    assert source is not None
    with torch.no_grad():
        loader = EvalLoader(source, np.arange(40), trained.config, torch.device("cpu"))
        expected = torch.cat([encoder(images) for images, _ in loader]).numpy()
    np.testing.assert_allclose(found["features"][:40], expected, rtol=1e-5, atol=1e-6)
    assert found["classes"].tolist() == ["bright", "dark"]
    paths = [Path(name) for name in found["names"]]
    assert len({*paths}) == 48 and all(path.is_file() for path in paths)
    assert [path.parent.name for path in paths] == found["classes"][found["labels"]].tolist()
    assert [path.parent.parent.name for path in paths] == found["split"].tolist()
    said = json.loads(str(found["metadata"]))
    assert (said["encoder"], said["width"], said["normalised"]) == ("resnet20", "dense", False)
    assert said["data"]["root"] == str(image_folder)


def test_options(run, capsys, tmp_path):
    dense, out = sacl_fast.evaluate.features(run), tmp_path / "new" / "some.npz"
    options = ("--width", "slim", "--normalise", "--images", 20, "--batch-size", 7, "--no-pages")
    assert command(run, "--out", out, *options) == 0
    with np.load(out) as file:
        features, names = file["features"], file["names"].tolist()
        assert json.loads(str(file["metadata"]))["width"] == "slim"
    assert features.shape == (20, 16)
    np.testing.assert_allclose(np.linalg.norm(features, axis=1), 1, rtol=1e-6)
    rows = [dense.names.index(name) for name in names]
    assert rows == sorted(rows)
    assert not np.allclose(features, to_unit_length(dense.features[rows]), atol=1e-3)
    slim = sacl_fast.evaluate.features(run / "encoder_slim.safetensors", width="slim",
        data=open_trained(run).config.data)  # fmt: skip
    np.testing.assert_allclose(features, to_unit_length(slim.features[rows]), rtol=1e-4, atol=1e-6)
    for split, count in (("train", 40), ("val", 8)):
        assert len(sacl_fast.evaluate.features(run, split=split)) == count


def test_only_its_own_files_at_the_default_place_are_replaced(run, tmp_path, capsys):
    few = ("--images", 20, "--queries", 2, "--shown", 5)
    assert command(run, *few) == 0 and command(run, *few, "--out", run / "features.npz") == 0
    names = ("features.npz", "features_pca.png", "features_neighbours.png", "features.html")
    made = {name: (run / name).read_bytes() for name in names}
    np.savez(tmp_path / "other.npz", metadata=np.array("{}"))
    Image.new("RGB", (4, 4)).save(tmp_path / "other.png")
    others = {"npz": (tmp_path / "other.npz").read_bytes(), "html": b"<html>sacl-fast</html>"}
    others["png"] = (tmp_path / "other.png").read_bytes()
    for name in names:
        for content in (others[name.partition(".")[2]], b"", made[name][:40]):
            (run / name).write_bytes(content)
            capsys.readouterr()
            assert command(run, *few) == 2
            (line,) = capsys.readouterr().err.splitlines()
            assert f"{name} is there already, and not from 'sacl-fast features'" in line
            assert (run / name).read_bytes() == content
        (run / name).write_bytes(made[name])
    for there in ("mine.npz", "mine.html", "mine_pca.png"):
        (tmp_path / there).write_bytes(made["features.npz"])
        assert command(run, *few, "--out", tmp_path / "mine.npz") == 2
        assert f"{there} is there already; another --out works" in capsys.readouterr().err
        (tmp_path / there).unlink()
    (tmp_path / "mine.npz").symlink_to("nowhere")
    with pytest.raises(UserError, match="is there already; another --out works"):
        sacl_fast.evaluate.features(run, out=tmp_path / "mine.npz")


def test_parquet_holds_the_same(run, tmp_path, monkeypatch):
    parquet = pytest.importorskip("pyarrow.parquet")
    monkeypatch.setattr("sacl_fast.looking.files._ROWS", 13)
    path = tmp_path / "f.parquet"
    found = sacl_fast.evaluate.features(run, out=path)
    table = parquet.read_table(path)
    assert str(table.schema.field("feature").type) == "fixed_size_list<element: float>[16]"
    rows = table.to_pydict()
    np.testing.assert_array_equal(np.array(rows["feature"], np.float32), found.features)
    assert rows["name"] == found.names and rows["label"] == found.labels.tolist()
    assert rows["class"] == [found.classes[label] for label in found.labels]
    assert rows["split"] == ["train"] * 40 + ["val"] * 8
    assert json.loads(table.schema.metadata[b"sacl_fast"])["encoder"] == "resnet20"


def test_parquet_without_pyarrow_says_what_to_install(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    assert command(run, "--out", tmp_path / "f.parquet") == 2
    assert "pip install 'sacl-fast[features]'" in capsys.readouterr().err
    assert not (tmp_path / "f.parquet").exists()


def test_awkward_names_are_written(run, awkward, tmp_path, capsys):
    parquet = pytest.importorskip("pyarrow.parquet")
    data = DataConfig(root=str(awkward), workers=0, max_bad_share=0.2)
    found = sacl_fast.evaluate.features(run, data=data, out=tmp_path / "f.npz")
    assert len(found) == 14 and len(found.bad) == 2 and found.settings["left_out"] == 2
    with np.load(tmp_path / "f.npz") as file:
        names = file["names"].tolist()
    assert names == found.names and all(os.path.exists(name) for name in names)
    write_features(found, tmp_path / "f.parquet")
    rows = parquet.read_table(tmp_path / "f.parquet").to_pydict()
    assert rows["name"] == [plain_text(name) for name in names]
    assert any(name.endswith("\\udcff\\udcfe.png") for name in rows["name"])


def test_unlabelled_images_and_pictures(run, image_folder, tmp_path, capsys):
    flat = tmp_path / "flat"
    flat.mkdir()
    for path in image_folder.rglob("*.png"):
        shutil.copy(path, flat / f"{path.parent.name}{path.name}")
    out = tmp_path / "out/f.npz"
    shown = ("--clusters", 3, "--queries", 4, "--neighbours", 2, "--shown", 10)
    assert command(run, "--data.root", flat, "--out", out, *shown) == 0
    told = capsys.readouterr().out
    assert "class" not in told
    with np.load(out) as file:
        assert not len(file["classes"]) and (file["labels"] == -1).all()
    assert sorted(p.name for p in out.parent.iterdir()) == [
        "f.html", "f.npz", "f_neighbours.png", "f_pca.png",
    ]  # fmt: skip
    assert b"cluster 1" in (out.parent / "f.html").read_bytes()
    assert Image.open(out.parent / "f_pca.png").size > (800, 500)
    assert Image.open(out.parent / "f_neighbours.png").size[0] > 3 * 72


def test_a_module(run, image_folder):
    views = open_trained(run).config.views
    data = DataConfig(root=str(image_folder), workers=0)
    encoder = sacl_fast.load_encoder(run).train()
    found = sacl_fast.evaluate.features(encoder, data=data, views=views)
    assert encoder.training
    np.testing.assert_allclose(
        found.features, sacl_fast.evaluate.features(run).features, rtol=1e-5, atol=1e-6
    )
    with pytest.raises(UserError, match="features \\(N, F\\) work"):
        sacl_fast.evaluate.features(torch.nn.Conv2d(3, 4, 3), data=data, views=views)
    with pytest.raises(UserError, match="on which images"):
        sacl_fast.evaluate.features(encoder, data=data)


def test_mistakes_are_one_sentence_and_leave_nothing(run, image_folder, tmp_path, capsys):
    before = sorted(run.iterdir())
    encoder = run / "encoder.safetensors"
    flat = image_folder / "train/dark"
    for args, hint in {
        (): "features needs the encoder",
        ("--width", "slim"): "features needs the encoder",
        (tmp_path / "none",): "nothing at",
        (encoder,): "--data.root",
        (encoder, "--width", "slim", "--data.root", image_folder): "holds the dense encoder only",
        (run, "--out", tmp_path / "f.csv"): "a name in .npz or .parquet works",
        (run, "--data.root", flat, "--split", "val"): "no validation images",
        (run, "--out", encoder / "f.npz"): "cannot make folder",
        (run, "--images", "-1"): "images is -1",
        (run, "--project", "tsne"): "pca",
    }.items():
        capsys.readouterr()
        status = main(["features", *map(str, args)] if args else ["features", "--normalise"])
        assert status == 2, args
        (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("sacl-fast:")]
        assert hint in line, (args, line)
    assert sorted(run.iterdir()) == before
    with pytest.raises(UserError, match="unknown setting widht; did you mean width"):
        sacl_fast.evaluate.features(run, widht="slim")


def test_a_full_disk_leaves_what_was_there(run, tmp_path, monkeypatch):
    path = tmp_path / "f.npz"
    found = sacl_fast.evaluate.features(run, out=path)
    before = path.read_bytes()

    def full(*_: object, **__: object) -> bytes:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sacl_fast.files._Writer.write", full)
    for write in (lambda: write_features(found, path), lambda: write_whole(path, b"x")):
        with pytest.raises(UserError, match=r"cannot write .*No space left on device"):
            write()
    assert path.read_bytes() == before and [*tmp_path.glob(".*")] == []


def test_features_that_are_not_finite_are_refused(run, tmp_path):
    encoder = sacl_fast.load_encoder(run)
    next(encoder.parameters()).data.fill_(torch.nan)
    config = open_trained(run).config
    with pytest.raises(UserError, match="not finite"):
        sacl_fast.evaluate.features(
            encoder, data=config.data, views=config.views, out=tmp_path / "f.npz"
        )
    assert not (tmp_path / "f.npz").exists()


def test_a_named_root_is_opened_as_what_it_is(
    run: Path, image_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A cache for a run on a folder, whose source would not open it."""
    monkeypatch.chdir(tmp_path)
    assert main(["cache", str(image_folder), "images.pixels", "--data.workers", "0"]) == 0
    names = ["--data.root", "images.pixels", "--data.workers", "0", "--out", "of_cache.npz"]
    assert main(["features", str(run), *names, "--no-pages"]) == 0
    assert main(["features", str(run), "--out", "of_run.npz", "--no-pages"]) == 0
    with np.load("of_cache.npz") as cache, np.load("of_run.npz") as folder:
        assert np.array_equal(cache["features"], folder["features"])
