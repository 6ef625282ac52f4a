"""What is no trained encoder, images that do not serve, a full disk: every command that takes a
trained encoder says one clear sentence, ends with status 2 and leaves everything as it was."""

from __future__ import annotations

import os
import resource
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

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
from sacl_fast.encoders import read_encoder_metadata
from sacl_fast.engine.checkpoint import load_checkpoint, save_checkpoint
from sacl_fast.engine.trainer import train

COMMANDS = {
    "export": "export {trained} {out} --format timm,torch-export",
    "knn": "eval knn {trained} --out {out} --no-control",
    "linear": "eval linear {trained} --out {out} --fast --weight-decays 1 --no-control",
    "protocol": "eval linear {trained} --out {out} --epochs 1 --batch-size 8 --no-control",
    "few-shot": "eval few-shot {trained} --out {out} --per-class 1 --draws 3 --no-control",
    "finetune": "finetune {trained} --out {out} --steps 1 --batch-size 8",
    "features": "features {trained} --out {out}/f.npz",
}
NEED_LABELS = [name for name in COMMANDS if name not in ("export", "features")]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of one step, in a folder with what the tests break."""
    place = tmp_path_factory.mktemp("place")
    write_images(place / "labelled", "train/one", "train/two", "val/one", "val/two")
    write_images(place / "one-class", "train/one", "val/one")
    write_images(place / "unlabelled", ".")
    write_images(place / "new-class", "train/one", "train/two", "val/one", "val/three")
    (place / "empty").mkdir()
    train(
        Config(
            out=str(place / "run"),
            epochs=1,
            batch_size=16,
            device="cpu",
            data=DataConfig(root=str(place / "labelled"), workers=0),
            views=ViewsConfig(size=16),
            encoder=EncoderConfig(name="resnet20", width=0.25),
            projector=ProjectorConfig(hidden=8, out=8),
            log=LogConfig(tensorboard=False),
            eval=EvalConfig(k=3, recalibrate_batches=1, batch_size=16),
        )
    )
    return place


def write_images(root: Path, *folders: str) -> None:
    rng = np.random.default_rng(0)
    for folder in folders:
        (root / folder).mkdir(parents=True, exist_ok=True)
        for i in range(8):
            pixels = rng.integers(0, 255, (20, 20, 3)).astype(np.uint8)
            Image.fromarray(pixels).save(root / folder / f"{i}.png")


def refused(place: Path, capsys: pytest.CaptureFixture[str], command: str, *more: object) -> str:
    """What a command says that leaves all of the place as it was."""
    before = contents(place)
    capsys.readouterr()
    assert main([*command.split(), *(str(arg) for arg in more)]) == 2
    lines = capsys.readouterr().err.splitlines()
    (sentence,) = [line for line in lines if line.startswith("sacl-fast:")]
    assert not any("Traceback" in line for line in lines)
    assert contents(place) == before
    return sentence


def contents(place: Path) -> dict[Path, bytes | None]:
    return {path: path.read_bytes() if path.is_file() else None for path in place.rglob("*")}


def in_words(name: str, trained: Path, out: Path) -> str:
    return COMMANDS[name].format(trained=trained, out=out)


# --- what is given as a trained encoder -----------------------------------------------------------


def another_architecture(run: Path, path: Path) -> None:
    encoder = timm.create_model("test_resnet", num_classes=0)
    save_file(encoder.state_dict(), path, {"format": "pt"})


def no_metadata(run: Path, path: Path) -> None:
    save_file(load_file(run / "encoder.safetensors"), path)


def names_another(run: Path, path: Path) -> None:
    said = read_encoder_metadata(run / "encoder.safetensors")
    save_file(load_file(run / "encoder.safetensors"), path, {**said, "encoder": "mobilenetv1_100"})


def names_another_width(run: Path, path: Path) -> None:
    said = read_encoder_metadata(run / "encoder.safetensors")
    save_file(load_file(run / "encoder.safetensors"), path, {**said, "width": "0.5"})


def more_than_it_names(run: Path, path: Path) -> None:
    own = run / "encoder.safetensors"
    save_file({**load_file(own), "fc.weight": torch.zeros(2)}, path, read_encoder_metadata(own))


def checkpoint_of_another(run: Path, path: Path) -> None:
    (newest,) = (run / "checkpoints").glob("step_*.pt")
    state = load_checkpoint(newest)
    del state["format"]
    state["config"]["encoder"]["name"] = "mobilenetv1_100"
    save_checkpoint(path, state, keep=1)


def another_program(run: Path, path: Path) -> None:
    torch.save({"state_dict": timm.create_model("test_resnet").state_dict(), "epoch": 3}, path)


def random_bytes(run: Path, path: Path) -> None:
    path.write_bytes(np.random.default_rng(0).bytes(5000))


def cut(run: Path, path: Path) -> None:
    name = (
        "encoder.safetensors" if path.suffix == ".safetensors" else "checkpoints/step_00000001.pt"
    )
    whole = (run / name).read_bytes()
    path.write_bytes(whole[: len(whole) // 2])


def empty(run: Path, path: Path) -> None:
    path.touch()


@pytest.mark.parametrize(
    ("suffix", "write", "said"),
    [
        (".safetensors", another_architecture, "does not say which encoder it holds (no encoder"),
        (".safetensors", no_metadata, "; an encoder.safetensors that a run wrote works"),
        (".safetensors", names_another, "conv_stem.weight (and "),
        (".safetensors", names_another_width, "conv1.weight is (4, 3, 3, 3), the encoder's (8, 3,"),
        (".safetensors", more_than_it_names, "the encoder has no fc.weight, which is in it"),
        (".safetensors", random_bytes, "is no safetensors file"),
        (".safetensors", cut, "is no safetensors file"),
        (".safetensors", empty, "is no safetensors file"),
        (".pt", checkpoint_of_another, "of the encoder is not in it"),
        (".pt", another_program, "is not a checkpoint of sacl-fast"),
        (".pt", random_bytes, "damaged or not a checkpoint"),
        (".pt", cut, "damaged or not a checkpoint"),
        (".pt", empty, "damaged or not a checkpoint"),
        (".pth", another_program, "neither a checkpoint nor an encoder"),
    ],
)
def test_what_is_no_trained_encoder(
    place: Path,
    tmp_path: Path,
    capsys,
    suffix: str,
    write: Callable[[Path, Path], None],
    said: str,
):
    path = tmp_path / f"given{suffix}"
    write(place / "run", path)
    for name in COMMANDS:
        command = in_words(name, path, tmp_path / "out")
        sentence = refused(tmp_path, capsys, command, "--data.root", place / "labelled")
        assert said in sentence and str(path) in sentence, name


# --- images ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NEED_LABELS)
@pytest.mark.parametrize(
    ("images", "said"),
    [
        ("one-class", "no labels or one class only"),
        ("unlabelled", "no labels or one class only"),
        ("new-class", "holds the folder three, which is none of the class folders"),
    ],
)
def test_labels_that_do_not_serve(place: Path, tmp_path: Path, capsys, name, images, said):
    command = in_words(name, place / "run", tmp_path / "out")
    assert said in refused(tmp_path, capsys, command, "--data.root", place / images)


@pytest.mark.parametrize("name", COMMANDS)
def test_images_that_are_not_there(place: Path, tmp_path: Path, capsys, name: str):
    command = in_words(name, place / "run", tmp_path / "out")
    assert "no images in" in refused(tmp_path, capsys, command, "--data.root", place / "empty")
    told = refused(tmp_path, capsys, command, "--data.root", place / "nowhere")
    assert "nowhere, which does not exist" in told


def test_knn_of_an_export_needs_labels(place: Path, tmp_path: Path, capsys):
    command = in_words("export", place / "run", tmp_path / "out") + " --knn"
    for images in ("one-class", "unlabelled"):
        told = refused(tmp_path, capsys, command, "--data.root", place / images)
        assert "--knn needs images of two classes or more" in told


# --- a full disk ----------------------------------------------------------------------------------


@contextmanager
def files_of_at_most(size: int) -> Iterator[None]:
    """What a full disk is to a program: a write fails (Python ignores the signal)."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("export", (30_000, 120_000)),  # in the first file, in a later one
        ("knn", (0, 3000)),
        ("linear", (3000,)),
        ("few-shot", (0, 300)),
        ("finetune", (0,)),
        ("features", (0, 2000)),
    ],
)
def test_a_full_disk(place: Path, tmp_path: Path, capsys, name: str, sizes: tuple[int, ...]):
    for size in sizes:
        with files_of_at_most(size):
            told = refused(tmp_path, capsys, in_words(name, place / "run", tmp_path / "out"))
        assert "cannot write" in told and os.strerror(27) in told, size


def test_results_that_were_there_stay_where_new_ones_do_not_fit(place, tmp_path, capsys):
    shutil.copytree(place / "run", tmp_path / "run")
    knn = f"eval knn {tmp_path / 'run'} --no-control"
    assert main(knn.split()) == 0
    with files_of_at_most(3000):  # the picture is larger
        assert "knn_confusion.png: File too large" in refused(tmp_path, capsys, f"{knn} --eval.k 1")
