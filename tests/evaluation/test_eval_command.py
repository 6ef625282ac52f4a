"""``sacl-fast eval`` and ``sacl_fast.evaluate`` on what a tiny run leaves."""

from __future__ import annotations

import copy
import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import sacl_fast
from sacl_fast.cli import main
from sacl_fast.config import Config, DataConfig, EncoderConfig, EvalConfig
from sacl_fast.config.evaluation import LinearEvaluation
from sacl_fast.encoders import build_encoder, load_encoder
from sacl_fast.encoders.file import encoder_metadata, save_encoder
from sacl_fast.engine.trainer import RunResult, train
from sacl_fast.errors import UserError
from sacl_fast.evaluation.networks import supervised_encoder
from sacl_fast.presets import get_preset
from tests.commands import refused, said
from tests.tiny import tiny_run

SMALL = "--per-class 1 3 --percent 20 --draws 3"


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 training and 30 validation images of three classes that no encoder tells apart wholly."""
    root = tmp_path_factory.mktemp("images") / "noisy"
    rng = np.random.default_rng(0)
    for split, count in (("train", 20), ("val", 10)):
        for i, name in enumerate(("one", "three", "two")):
            folder = root / split / name
            folder.mkdir(parents=True)
            for nth in range(count):
                pixels = rng.normal(90 + 30 * i, 60, (20, 20, 3)).clip(0, 255).astype(np.uint8)
                Image.fromarray(pixels).resize((40, 40)).save(folder / f"{nth}.png")
    return root


def run_of(images: Path, out: Path) -> Config:
    return replace(tiny_run(images, out), epochs=1, seed=3)


@pytest.fixture(scope="module")
def trained(images: Path, tmp_path_factory: pytest.TempPathFactory) -> RunResult:
    return train(run_of(images, tmp_path_factory.mktemp("trained") / "run"))


@pytest.fixture
def folder(trained: RunResult, tmp_path: Path) -> Path:
    """A copy of the run's folder; its images are shared by all tests."""
    return Path(shutil.copytree(trained.folder, tmp_path / "run"))


@pytest.fixture
def noisy(images: Path, tmp_path: Path) -> Path:
    """A copy of the images."""
    return Path(shutil.copytree(images, tmp_path / "noisy"))


@pytest.fixture
def config(noisy: Path, tmp_path: Path) -> Config:
    """The same run, to be trained in other ways."""
    return run_of(noisy, tmp_path / "other")


def test_knn_is_what_the_run_printed_by_every_way_to_name_it(
    trained, folder, config, noisy, capsys
):
    """The run folder, its checkpoint, and its encoders' files alone, elsewhere."""
    said(capsys, "eval", "knn", folder)
    written = json.loads((folder / "eval/knn.json").read_text())
    rows = {row["name"]: row["figures"]["top-1"]["mean"] for row in written["encoders"]}
    assert list(rows) == ["dense", "slim", "dense, untrained", "slim, untrained"]
    for width in ("dense", "slim"):
        assert rows[width] == pytest.approx(trained.knn[f"knn_{width}"])
        assert rows[f"{width}, untrained"] == pytest.approx(trained.knn_before[f"knn_{width}"])
    (checkpoint,) = (folder / "checkpoints").glob("step_*.pt")
    again = sacl_fast.evaluate.knn(checkpoint, control=False)
    assert [s.figures["top-1"].mean for s in again.scores] == list(rows.values())[:2]
    alone = folder.parent / "alone"
    alone.mkdir()
    for width, name in (("dense", "encoder"), ("slim", "encoder_slim")):
        shutil.copy(folder / f"{name}.safetensors", alone)
        path = alone / f"{name}.safetensors"
        result = sacl_fast.evaluate.knn(path, data=DataConfig(root=str(noisy), workers=0))
        assert result.of(width).figures["top-1"].mean == pytest.approx(rows[width])
        module = sacl_fast.evaluate.knn(
            load_encoder(path), data=DataConfig(root=str(noisy), workers=0), views=config.views
        )
        assert module.scores[0].figures["top-1"].mean == pytest.approx(rows[width])
    assert len(list(alone.iterdir())) == 2  # from Python, nothing is written unasked


def test_a_checkpoint_in_the_midst_of_a_run(config):
    """Its statistics are estimated as the run does: the first one is the untrained encoder."""
    lasting = replace(config.checkpoint, every_steps=1, keep=9)
    folder = train(
        replace(config, checkpoint=lasting, optim=replace(config.optim, lr=1e-30))
    ).folder
    result = sacl_fast.evaluate.knn(folder / "checkpoints/step_00000001.pt")
    for width in ("dense", "slim"):
        same = result.gain(result.of(width))
        assert same is not None and same.mean == 0
    assert "makes no difference" in result.verdict


def test_linear_and_few_shot_write_what_they_print(folder, tmp_path, capsys):
    out = tmp_path / "results"
    options = ("--fast", "--weight-decays", "1", "0.01")
    told = said(capsys, "eval", "linear", folder, "--out", out, *options)
    assert "weight decay" in told and "(linear-fast, 30 images;" in told
    assert sorted(p.name for p in out.iterdir()) == [
        "linear-fast.json", "linear-fast.md", "linear-fast_confusion.png",
    ]  # fmt: skip
    written = json.loads((out / "linear-fast.json").read_text())
    assert written["method"] == "linear-fast"
    assert np.sum(written["encoders"][0]["confusion"]) == written["test_images"] == 30
    assert written["train_images"] == 60 and not written["held_out"]
    page = (out / "linear-fast.md").read_text()
    assert page.startswith("# linear-fast: ") and "Logistic regression" in page
    assert written["verdict"] in told and written["verdict"] in page and "| three | 10 |" in page
    assert Image.open(out / "linear-fast_confusion.png").size[0] > 400
    told = said(capsys, "eval", "few-shot", folder, "--out", out, *SMALL.split())
    assert "(few-shot, 3 per class, 30 images; 95 % interval over draws " in told
    figures = json.loads((out / "few-shot.json").read_text())["encoders"][0]["figures"]
    assert list(figures) == ["1 per class", "3 per class", "20 %"]


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ("--fast --lr 0.2", "lr is of the protocol; without --fast it works"),
        ("--fast --epochs 2", "epochs is of the protocol; without --fast it works"),
        ("--batch-size 8 --fast", "batch_size is of the protocol"),
        ("--fast --schedule cosine", "schedule is of the protocol"),
        ("--fast --weight-decay 0", "weight_decay is of the protocol"),
        ("--weight-decays 0.1", "weight_decays is of --fast; with --fast it works"),
    ],
)
def test_options_of_the_other_linear_evaluation_are_refused(capsys, options, hint):
    assert hint in refused(capsys, "eval", "linear", "nowhere", *options.split())
    with pytest.raises(UserError, match=r"epochs is of the protocol"):
        LinearEvaluation(fast=True, epochs=2)


def test_a_folder_of_something_else_is_not_written_into(config, noisy, tmp_path, capsys):
    folder = train(config).folder
    shutil.copytree(noisy, tmp_path / "photos")
    before = sorted((tmp_path / "photos").rglob("*"))
    told = refused(capsys, "eval", "knn", folder, "--out", tmp_path / "photos")
    assert "holds neither results nor a run; --out names another folder" in told
    assert sorted((tmp_path / "photos").rglob("*")) == before
    for out in (tmp_path / "results", tmp_path / "results", folder):
        said(capsys, "eval", "knn", folder, "--no-control", "--out", out)

    # Nor is a new folder made among the images that a command reads, by whichever path.
    (tmp_path / "link").symlink_to(noisy / "train")
    before = sorted(noisy.rglob("*"))
    of_images = ["--data.root", noisy]
    for command, out in (
        (["eval", "knn", folder], [noisy / "train/new"]),
        (["finetune", folder], [tmp_path / "link" / "new"]),
        (["features", folder], [noisy / "new_val/x.npz"]),
        (["export", folder], [noisy / "train/one/new"]),
        (["train", "demo", "--data.source", "folder", *of_images], [noisy / "train"]),
        (["views", "demo", "--data.source", "folder", *of_images], [noisy / "new.png"]),
        (["cache", noisy / "train"], [noisy / "train/new.png"]),
    ):
        option = [] if command[0] in ("export", "cache") else ["--out"]
        told = refused(capsys, *command, *option, *out)
        assert f"is within the images of data.root ({noisy}" in told, command
    assert sorted(noisy.rglob("*")) == before


def test_the_slim_encoder_alone_without_a_control(folder, capsys):
    told = said(capsys, "eval", "knn", folder, "--no-control", "--eval.encoders", "slim")
    assert "top-1 is" in told and "slim encoder" in told and "untrained" not in told


def test_without_validation_images_a_tenth_is_held_out(tiny, capsys):
    folder = train(replace(tiny, epochs=1)).folder
    result = sacl_fast.evaluate.linear(folder, control=False, fast=True)
    assert (result.train_images, result.test_images, result.held_out) == (44, 4, True)
    assert result.folder is None and not (folder / "eval").exists()


def test_unreadable_images_are_skipped(config, noisy, capsys):
    folder = train(config).folder
    (noisy / "val/one/0.png").write_text("none")
    result = sacl_fast.evaluate.knn(folder, control=False)
    assert result.test_images == 29


def test_mistakes_are_one_sentence_and_leave_nothing(folder, noisy, tmp_path, capsys):
    encoder = folder / "encoder.safetensors"
    unlabelled, one = tmp_path / "unlabelled", tmp_path / "one"
    shutil.copytree(noisy / "train/one", unlabelled)
    shutil.copytree(noisy / "train/one", one / "only")
    lacking = tmp_path / "lacking"
    shutil.copytree(noisy, lacking)
    shutil.rmtree(lacking / "train/two")
    (tmp_path / "file").write_text("")
    for args, hint in {
        ("knn", folder, "--data.root", unlabelled): "no labels",
        ("linear", folder, "--data.root", one): "no labels",
        ("knn", folder, "--data.root", lacking): "none of the class folders",
        ("knn", folder, "--data.root", tmp_path / "no"): "does not exist",
        ("knn", folder, "--data.limit", "1"): "none of class",
        ("knn", folder, "--eval.k", "61"): "eval.k is 61, but there are only 60 training images",
        ("few-shot", folder): "",
        (
            "few-shot",
            folder,
            "--per-class",
            "1",
            "21",
        ): "per_class is 21, but class one has only 20",
        ("few-shot", folder, "--draws", "1"): "draws is 1; a value from 3",
        ("knn", folder, "--out", tmp_path / "file/x"): "--out names another folder",
        ("knn", encoder.rename(tmp_path / "e.safetensors")): "does not say on which images",
        ("knn", tmp_path / "file"): "neither a checkpoint nor an encoder",
        ("knn",): "needs what to evaluate",
        ("knn", folder, "--eval.kk", "3"): "--eval.kk",
        ("knn", folder, "--supervised", "timm"): "timm has no supervised weights of resnet20",
        ("knn", folder, "--supervised", tmp_path / "no"): "where there is no file",
        ("knnn", folder): "did you mean knn?",
    }.items():
        if hint:
            out = () if "--out" in args else ("--out", tmp_path / "out")
            more = out if len(args) > 1 and args[0] != "knnn" else ()
            assert hint in refused(capsys, "eval", *args, *more), args
    assert not (tmp_path / "out").exists() and not (tmp_path / "eval").exists()


def test_a_folder_is_opened_as_what_it_is(folder, noisy, tmp_path, capsys):
    """Whatever the run was trained on: a root without a source is not looked for as CIFAR-10."""
    settings = (folder / "config.yaml").read_text()
    shutil.rmtree(folder / "checkpoints")
    (folder / "config.yaml").write_text(settings.replace("source: folder", "source: cifar10"))
    nowhere = tmp_path / "nowhere"
    assert "does not exist" in refused(capsys, "eval", "knn", folder, "--data.root", nowhere)
    assert not nowhere.exists()
    told = said(capsys, "eval", "knn", folder, "--data.root", noisy, "--eval.k", "5")
    assert "(kNN, 30 images" in told
    told = said(capsys, "export", folder, tmp_path / "out", "--data.root", noisy)
    assert "on 16 of the images given" in told
    # Images that were given from Python are in no file.
    (folder / "config.yaml").write_text(settings.replace("source: folder", "source: arrays"))
    told = refused(capsys, "eval", "knn", folder)
    assert "its own were arrays" in told and "--data.root" in told and "--data.source" in told
    said(capsys, "eval", "knn", folder, "--data.root", noisy, "--eval.k", "5")


def test_an_interrupted_evaluation_leaves_nothing(folder, monkeypatch, capsys):
    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("sacl_fast.evaluation.report._confusion_png", interrupt)
    assert main(["eval", "knn", str(folder)]) == 130
    assert not (folder / "eval").exists()


def test_help_needs_no_encoder(capsys):
    assert "few-shot" in said(capsys, "eval")
    for method, option in (
        ("knn", "--eval.k"),
        ("linear", "--weight-decays"),
        ("few-shot", "--draws"),
    ):
        assert option in said(capsys, "eval", method, "--help")


def test_from_python_mistakes_are_said(config):
    encoder = build_encoder("resnet20", width=0.25, image_size=16)
    with pytest.raises(UserError, match="does not say on which images"):
        sacl_fast.evaluate.knn(encoder)
    with pytest.raises(UserError, match="unknown setting drawz; did you mean draws"):
        sacl_fast.evaluate.few_shot("x", drawz=3)
    with pytest.raises(UserError, match="views are those of the run"):
        sacl_fast.evaluate.knn("x", views=config.views)


def test_a_module_is_evaluated_as_it_is(config):
    encoder = build_encoder("resnet20", width=0.25, image_size=16).train()
    encoder.bn1.eval()  # type: ignore[union-attr]
    flags = [m.training for m in encoder.modules()]
    before = {k: v.clone() for k, v in encoder.state_dict().items()}
    rng = torch.get_rng_state()
    result = sacl_fast.evaluate.knn(
        encoder, data=config.data, views=config.views, eval=EvalConfig(k=3)
    )
    assert result.folder is None and [s.name for s in result.scores] == ["dense"]
    assert [m.training for m in encoder.modules()] == flags
    assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    assert torch.equal(torch.get_rng_state(), rng)


def test_any_module_gives_features(config):
    given: dict[str, Any] = {"data": config.data, "views": config.views}
    pixels = sacl_fast.evaluate.features(torch.nn.Flatten(), **given)
    assert pixels.features.shape[1] == 3 * config.views.size**2
    assert len(sacl_fast.evaluate.knn(torch.nn.Flatten(), **given, eval=EvalConfig(k=3)).scores)
    torch.manual_seed(0)
    wide = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(pixels.features.shape[1], 4))
    expected = sacl_fast.evaluate.features(wide, **given).features
    for type in (torch.float64, torch.bfloat16):
        found = sacl_fast.evaluate.features(copy.deepcopy(wide).to(type), **given).features
        np.testing.assert_allclose(found, expected, rtol=0, atol=5e-2)


@pytest.mark.parametrize(
    ("given", "found"), [(lambda x: (x.flatten(1), x), "tuple"), (lambda x: x, r"\(\d+, 3, ")]
)
def test_a_module_of_something_else_is_refused(config, given, found):
    class Other(torch.nn.Module):
        def forward(self, x):
            return given(x)

    images: dict[str, Any] = {"data": config.data, "views": config.views}
    evaluations = (
        lambda: sacl_fast.evaluate.knn(Other(), **images),
        lambda: sacl_fast.evaluate.linear(Other(), **images, batch_size=10, epochs=1),
        lambda: sacl_fast.evaluate.features(Other(), **images),
    )
    for evaluate in evaluations:
        with pytest.raises(UserError, match=rf"gives {found}.*features \(N, F\) work"):
            evaluate()


def test_a_file_says_how_its_images_are_normalised(tmp_path):
    """An encoder of timm's name, whose file says another mean than timm's."""
    run = get_preset("demo")
    encoder = EncoderConfig(name="test_efficientnet")
    run = replace(run, encoder=encoder, views=replace(run.views, mean=(0.1, 0.2, 0.3)))
    said = encoder_metadata(run, epochs=1, steps=1, images=1, knn={})
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, build_encoder(encoder.name, image_size=32).state_dict(), said)
    _, views = supervised_encoder(replace(Config(), encoder=encoder), str(path))
    assert views.mean == (0.1, 0.2, 0.3) and views.std == run.views.std
    save_encoder(path, load_file(path), {**said, "std": "[1, 2]"})
    with pytest.raises(UserError, match=r"says of itself cannot be understood: views.std is"):
        supervised_encoder(replace(Config(), encoder=encoder), str(path))


def test_supervised_weights_from_a_file(tmp_path):
    """The classifier in the file is passed over; images are normalised as timm says."""
    import timm

    config = replace(Config(), encoder=EncoderConfig(name="mobilenetv3_small_050"))
    weights = timm.create_model("mobilenetv3_small_050").state_dict()
    save_file(weights, tmp_path / "weights.safetensors")
    encoder, views = supervised_encoder(config, str(tmp_path / "weights.safetensors"))
    assert not encoder.training
    assert torch.equal(encoder.state_dict()["conv_stem.weight"], weights["conv_stem.weight"])
    assert views.size == 224 and len(views.mean) == 3
    del weights["conv_stem.weight"]
    save_file(weights, tmp_path / "less.safetensors")
    with pytest.raises(UserError, match=r"1 tensors are missing, conv_stem.weight first"):
        supervised_encoder(config, str(tmp_path / "less.safetensors"))
    wide = replace(config, encoder=replace(config.encoder, width=2.0))
    with pytest.raises(UserError, match="do not fit mobilenetv3_small_050 with width 2"):
        supervised_encoder(wide, str(tmp_path / "weights.safetensors"))
    (tmp_path / "text.pth").write_text("hello")
    with pytest.raises(UserError, match="no weights can be read from"):
        supervised_encoder(config, str(tmp_path / "text.pth"))
