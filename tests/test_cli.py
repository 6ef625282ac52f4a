"""The command line as a person meets it: layers, help without torch, one sentence per mistake."""

import io
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from PIL import Image

from sacl_fast.cli import main, parse_config
from sacl_fast.config import Config, to_dict
from sacl_fast.errors import UserError
from sacl_fast.presets import PRESETS, get_preset

# A run of one step, once it gets that far.
SMALL = (
    "--epochs 1 --batch-size 8 --device cpu --data.workers 0 --views.size 16 --slim.ratio 1 "
    "--encoder.name resnet20 --encoder.width 0.25 --projector.hidden 8 --projector.out 8 "
    "--log.no-tensorboard"
).split()


def answer(capsys: pytest.CaptureFixture[str], *args: str) -> str:
    """What a refused command prints: exit status 2 and one sentence, no traceback."""
    capsys.readouterr()
    assert main(args) == 2
    captured = capsys.readouterr()
    lines = [line for line in captured.err.splitlines() if line.startswith("sacl-fast:")]
    assert len(lines) == 1 and "Traceback" not in captured.err + captured.out
    return lines[0]


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_yaml(name, tmp_path):
    """A run's configuration is that run again, by itself or on top of any preset."""
    preset, file = get_preset(name), tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(preset), sort_keys=False))
    assert parse_config("train", ["--config", str(file)]) == preset
    again = parse_config("train", ["imagenet1k", "--config", str(file)])
    assert again == replace(preset, preset="imagenet1k")


def test_layers_preset_then_file_then_options(tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("epochs: 7\noptim: {lr: 0.9, clip: false}\nloss: {lambda_: 0.01}\n")
    config = parse_config("train", ["cifar10", "--config", str(file), "--optim.lr", "0.4"])
    assert (config.epochs, config.optim.lr, config.optim.clip) == (7, 0.4, False)
    assert config.loss.lambda_ == 0.01 and config.views == get_preset("cifar10").views
    assert parse_config("train", []).preset == "demo"


@pytest.mark.parametrize("args", ["--help", "train --help", "train --optim.lrr 3", "train cifr10"])
def test_help_and_mistakes_do_not_import_torch(args):
    code = (
        "import sys; from sacl_fast.cli import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, *args.split()], capture_output=True)
    assert result.returncode == 0


def test_every_command_has_help(capsys):
    assert main(["--help"]) == 0
    commands = set(re.findall(r"^  (\w+) ", capsys.readouterr().out, re.MULTILINE))
    assert len(commands) == 11
    for command in commands:
        for option in ("--help", "-h"):
            assert main([command, option]) == 0
            assert f"usage: sacl-fast {command}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ("train cifr10", "did you mean cifar10?"),
        ("trian", "did you mean train?"),
        ("doctor --all", "after --measure only"),
        ("train demo --encoder.name mobilnetv1_100", "did you mean mobilenetv1_100"),
        ("train --data.source folder", "data.root"),
        ("train --data.source folder --data.root {tmp}/nowhere", "nowhere"),
        ("train --data.source folder --data.root {tmp}/empty", "empty"),
        ("train --config {tmp}/none.yaml", "cannot read configuration"),
        ("train --config {tmp}/list.yaml", "no configuration"),
        ("train demo --backend triton", "what can: torch"),
        ("train demo --precision fp16 --device cpu", "fp32"),
        ("train demo --resume {tmp}/none.pt", "where there is nothing"),
        ("train demo --batch-size 9999", "9999, but there are only 4,000"),
        ("train demo --out {tmp}/list.yaml/run", "--out names another"),
        ("views demo --out {tmp}/x.notapicture", "cannot write"),
    ],
)
def test_mistakes_get_one_sentence(capsys, tmp_path, args, hint):
    (tmp_path / "empty").mkdir()
    (tmp_path / "list.yaml").write_text("[1, 2]")
    given = args.format(tmp=tmp_path).split()
    options = SMALL if given[0] == "train" and "--batch-size" not in given else []
    if "--config" in given or "--encoder.name" in given or "cifr10" in given:
        options = []
    assert hint in answer(capsys, *given, *options)


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        ("train --optim.lrr 3", "did you mean --optim.lr?"),
        ("train --batch-size 1", "batch_size is 1; 2 or more works, because the loss standardises"),
        (
            "train --slim.ratio 0",
            "sacl-fast: slim.ratio is 0.0; a value above 0 and at most 1 works",
        ),
        ("train --encoder.stem cifra", "Expected one of ('imagenet', 'stride1', 'cifar')"),
        ("train --epochs many", "--epochs: invalid literal for int() with base 10: 'many'"),
        ("views --views.a.blur", "--views.a.blur"),
    ],
)
def test_options_that_do_not_parse(capsys, monkeypatch, args, hint):
    for columns in ("200", "60"):  # the sentence must not depend on the terminal
        monkeypatch.setenv("COLUMNS", columns)
        assert hint in answer(capsys, *args.split())


def test_a_mistake_in_the_file_names_the_file(capsys, tmp_path):
    (tmp_path / "run.yaml").write_text("optim: {lrr: 3}")
    said = answer(capsys, "train", "--config", str(tmp_path / "run.yaml"))
    assert (
        "unknown setting optim.lrr; did you mean optim.lr or" in said
        and " (in " in said
        and said.endswith("run.yaml)")
    )


def odd_images(folder: Path) -> None:
    """Images of every unusual kind that must be read like any other."""
    Image.new("L", (20, 20), 90).save(folder / "gray.png")
    Image.new("CMYK", (20, 20), (9, 80, 20, 0)).save(folder / "cmyk.jpg")
    Image.new("P", (20, 20), 3).save(folder / "palette.png", transparency=3)
    Image.new("RGBA", (20, 20), (1, 200, 3, 40)).save(folder / "alpha.png")
    Image.new("RGB", (1, 30), (200, 100, 50)).save(folder / "thin.png")
    (folder / "notes.txt").write_text("not an image, and not taken for one")


def truncated_jpeg() -> bytes:
    buffer = io.BytesIO()
    Image.effect_noise((64, 64), 80).convert("RGB").save(buffer, "JPEG")
    return buffer.getvalue()[: len(buffer.getvalue()) // 2]


def test_odd_images_are_read_and_bad_ones_skipped_and_named(capfd, image_folder, tmp_path):
    odd_images(image_folder / "dark")
    (image_folder / "dark" / "truncated.jpg").write_bytes(truncated_jpeg())
    (image_folder / "dark" / "text.jpg").write_text("hello")
    out = tmp_path / "run"
    args = ["train", "--data.source", "folder", "--data.root", str(image_folder), *SMALL]
    assert main([*args, "--out", str(out), "--batch-size", "55", "--epochs", "2"]) == 0
    said = "".join(capfd.readouterr())
    assert "55 images" in said  # 48, five odd, two bad; the text file is not one
    for name in ("truncated.jpg", "text.jpg"):
        assert f"{name}: " in said and "skipped unreadable image" in said
    shutil.rmtree(out)
    assert main([*args, "--out", str(out), "--data.max-bad-share", "0.02"]) == 2
    said = "".join(capfd.readouterr())
    assert "too many" in said and "max_bad_share is 0.02" in said


def test_resuming_with_another_encoder_and_a_folder_in_use(capsys, tmp_path):
    out = str(tmp_path / "run")
    (tmp_path / "images").mkdir()
    for i in range(9):
        Image.new("RGB", (16, 16), (20 * i, 100, 50)).save(tmp_path / "images" / f"{i}.png")
    args = ["train", "--data.source", "folder", "--data.root", str(tmp_path / "images"), *SMALL]
    assert main([*args, "--out", out]) == 0
    assert "already holds a run" in answer(capsys, *args, "--out", out)
    said = answer(capsys, *args, "--out", out, "--resume", "auto", "--encoder.width", "0.5")
    assert "encoder.width is 0.5 here and 0.25 there" in said


def test_dry_run_prints_costs(capsys, tmp_path, monkeypatch):
    monkeypatch.setattr("sacl_fast.engine.dry_run._TIMED", 0.1)
    assert main(["train", "cifar10", "--dry-run", "--data.root", str(tmp_path / "nowhere")]) == 0
    said = capsys.readouterr().out
    assert "3.21 M parameters" in said and "GFLOP" in said and "estimated" in said
    assert "name: mobilenetv1_100" in said and "data        not available" in said
    assert "s a step, " in said and "random images" in said
    assert not list(tmp_path.iterdir())


def test_views_and_doctor(capsys, tmp_path):
    assert main(["views", "demo", "--out", str(tmp_path / "sheet.png")]) == 0
    assert Image.open(tmp_path / "sheet.png").width > 500
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    assert "torch" in said and "xcorr_loss" in said


def test_a_gpu_that_is_not_there(capsys):
    import torch

    if torch.cuda.is_available():
        pytest.skip("this machine has a GPU")
    assert "--device cpu works" in answer(capsys, "train", "demo", *SMALL, "--device", "cuda")


def test_version(capsys):
    assert main(["--version"]) == 0 and "sacl-fast 0.1.0" in capsys.readouterr().out


def test_configurations_check_themselves():
    with pytest.raises(UserError, match="2 or more"):
        Config(batch_size=1)
