"""What a newcomer types works: the Python blocks, commands, options, links and figures of README.md
and docs/, and the examples in docstrings.

Blocks run in a folder that has what they name: a run's encoders, photographs in the home folder.
Training is a real one of a few steps.
"""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import itertools
import json
import re
import shlex
import statistics
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import sacl_fast
from sacl_fast.cli import main, parse_config
from sacl_fast.config import Config, ProjectorConfig
from sacl_fast.config.cache import CacheConfig
from sacl_fast.config.export import ExportConfig
from sacl_fast.config.finetune import FinetuneConfig
from sacl_fast.config.looking import FeaturesConfig, ReportConfig
from sacl_fast.encoders import build_encoder
from sacl_fast.encoders.file import encoder_metadata, save_encoder
from sacl_fast.engine.trainer import RunResult, train
from sacl_fast.evaluation.command import METHODS
from sacl_fast.options import parse_options
from sacl_fast.slim import Slicer
from sacl_fast.transfer.finetune import Finetuned

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(page: Path, language: str) -> Iterator[tuple[int, str]]:
    """The line of a block's first line, and the block."""
    text = page.read_text()
    for found in re.finditer(rf"^```{language}\n(.*?)^```$", text, re.M | re.S):
        yield text[: found.start(1)].count("\n"), found[1]


# --- Python --------------------------------------------------------------------------------------


@pytest.fixture
def newcomer(tmp_path: Path, image_folder: Path, tiny: Config, monkeypatch: pytest.MonkeyPatch):
    """In a folder, with photographs at home and a training that is cut short."""

    def trained(config: Config, **images: Any) -> RunResult:
        photographs = config.data.source == "folder"
        return train(
            replace(
                config,
                **dict(epochs=1, batch_size=16, device="cpu", log=tiny.log),
                data=replace(config.data, workers=0, limit=32),
                encoder=replace(config.encoder, width=0.25),
                projector=ProjectorConfig(hidden=16, out=24),
                views=replace(config.views, size=32) if photographs else config.views,
                eval=replace(tiny.eval, k=5, bank=20, queries=10),
            ),
            **images,
        )

    (tmp_path / "photos").symlink_to(image_folder)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    finetune = sacl_fast.evaluate.finetune

    def finetuned(path: str, **settings: Any) -> Finetuned:
        short: dict[str, Any] = dict(
            steps=2, batch_size=8, size=32, out=str(tmp_path / "finetuned")
        )
        return finetune(path, **settings | short)

    monkeypatch.setattr(sacl_fast, "train", trained, raising=False)
    monkeypatch.setattr(sacl_fast.evaluate, "finetune", finetuned)


@pytest.fixture
def a_run_of_imagenet(newcomer: None, tmp_path: Path) -> None:
    """The encoders that training leaves, untrained."""
    folder = tmp_path / "runs/imagenet1k/..."
    folder.mkdir(parents=True)
    config = replace(Config(), encoder=replace(Config().encoder, name="mobilenetv3_large_100"))
    encoder = build_encoder("mobilenetv3_large_100", image_size=224).eval()
    slicer = Slicer(encoder)
    slicer.note_statistics()
    for width, state in (("", encoder.state_dict()), ("_slim", slicer.slim_state())):
        metadata = encoder_metadata(config, epochs=1, steps=1, images=1, knn={}, slim=bool(width))
        save_encoder(folder / f"encoder{width}.safetensors", state, metadata)


@EVERY_PAGE
def test_python_blocks_run(page: Path, a_run_of_imagenet: None, capsys):
    """One after the other, as they are read."""
    z = dict(zip(("z_a", "z_b", "z1", "z2", "z1_t", "z2_t"), torch.randn(6, 8, 16), strict=True))
    names: dict[str, Any] = {**z, "batches": torch.rand(2, 4, 3, 64, 64)}
    for line, block in blocks(page, "python"):
        exec(compile("\n" * line + block, str(page), "exec"), names)


def test_examples_in_docstrings_run(a_run_of_imagenet: None):
    torch.manual_seed(0)
    tried = []
    for file in sorted((ROOT / "sacl_fast").rglob("*.py")):
        if ">>>" not in file.read_text():
            continue
        parts = file.relative_to(ROOT).with_suffix("").parts
        module = importlib.import_module(".".join(parts).removesuffix(".__init__"))
        result = doctest.testmod(module, optionflags=doctest.ELLIPSIS)
        assert not result.failed, file
        tried.append((file.name, result.attempted))
    assert len(tried) >= 4 and all(attempted for _, attempted in tried), tried


# --- commands and options ------------------------------------------------------------------------


def commands(page: Path) -> Iterator[list[str]]:
    """The arguments of each ``sacl-fast`` in the blocks of a shell."""
    for _, block in blocks(page, "sh"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["sacl-fast"]:
                yield words[1:]
            elif "sacl_fast" in words:  # torchrun -m sacl_fast
                yield words[words.index("sacl_fast") + 1 :]


def test_commands_are_understood(capsys: pytest.CaptureFixture[str]):
    found = [command for page in PAGES for command in commands(page)]
    assert len(found) >= 6
    main(["--help"])
    usage = capsys.readouterr().out
    for command, *arguments in found:
        assert f"\n  {command} " in usage
        if command in ("train", "views", "bench"):
            parse_config(command, [a for a in arguments if a not in ("--dry-run", "--profile")])
        elif command == "eval":
            method, _, *options = arguments
            parse_options("eval", METHODS[method](), options)
        elif command == "export":
            parse_options("export", ExportConfig(), arguments[2:])
        elif command == "finetune":
            parse_options("finetune", FinetuneConfig(), arguments[1:])
        elif command == "features":
            parse_options("features", FeaturesConfig(), arguments[1:])
        elif command == "report":
            options = itertools.dropwhile(lambda a: not a.startswith("-"), arguments)
            parse_options("report", ReportConfig(), list(options))


def options_of(settings: type, prefix: str = "--") -> Iterator[str]:
    for field in dataclasses.fields(settings):
        name = prefix + field.name.rstrip("_").replace("_", "-")
        if dataclasses.is_dataclass(kind := field.default_factory):
            yield f"{name}.*"
            yield from options_of(kind, f"{name}.")
        else:
            yield name


@EVERY_PAGE
def test_options_exist(page: Path):
    known = {*options_of(Config), "--config", "--dry-run", "--profile", "--measure", "--help"}
    known |= {"--no-build-isolation", "--no-control"}
    settings = (
        *(CacheConfig, ExportConfig, FinetuneConfig, FeaturesConfig, ReportConfig),
        *METHODS.values(),
    )
    known.update(*map(options_of, settings))
    prose = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.M | re.S)
    code = " ".join(re.findall(r"`[^`]+`", prose))
    named = set(re.findall(r"--[a-z][\w.*-]*", code))
    assert not named - known


# --- links and figures ---------------------------------------------------------------------------


@EVERY_PAGE
def test_links_lead_somewhere(page: Path):
    links = re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text())
    gone = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not gone


def results(name: str) -> dict[str, Any]:
    return json.loads((ROOT / f"benchmarks/results/{name}.json").read_text())


def test_figures_of_the_loss_are_those_measured():
    page = (ROOT / "docs/loss.md").read_text()
    rows = results("xcorr_loss_cpu")["rows"]
    for d in (2048, 4096, 8192):
        of = {row["method"]: row for row in rows if row["d"] == d}
        times = [
            f"{row['ms']['p50']:,.0f} ms ({row['ours_is_times_faster']:.0f}x)"
            for row in (of["eager"], of["compiled"], of["lightly"])
        ]
        memory = [f"{of[name]['peak_bytes'] / 2**20:,.0f}" for name in ("ours", "eager")]
        ours = f"{of['ours']['ms']['p50']:.0f} ms"
        cells = (str(d), ours, *times, f"{memory[0]} / {memory[1]} MiB")
        assert f"| {' | '.join(cells)} |" in page
        headline = f"{ours}, {memory[0]} MiB | {times[0].partition(' (')[0]}, {memory[1]} MiB"
    assert headline in (ROOT / "README.md").read_text()


def test_figures_of_the_slim_encoder_are_those_measured():
    rows = {(row["encoder"], row["ratio"]): row["of_dense"] for row in results("slim_cpu")["rows"]}
    page = (ROOT / "docs/slim.md").read_text()
    for title, encoder in (
        ("MobileNet-V1", "mobilenetv1_100"),
        ("MobileNet-V3-Large", "mobilenetv3_large_100"),
        ("EfficientNet-B0", "efficientnet_b0"),
        ("ResNet-50", "resnet50"),
    ):
        cells = [
            f"{rows[encoder, s][how]:.2f}" for s in (0.5, 0.25) for how in ("recorded", "skip")
        ]
        assert f"| {' | '.join((title, *cells))} |" in page
    masks = [of_dense["mask"] for of_dense in rows.values()]
    assert f"({min(masks):.2f} to {max(masks):.2f})" in page
    half = rows["mobilenetv1_100", 0.5]
    headline = f"{half['recorded']:.2f} of the dense one's | {half['mask']:.2f}: masks"
    assert headline in (ROOT / "README.md").read_text()


def test_figures_of_a_short_run_are_those_measured():
    page = (ROOT / "docs/training.md").read_text()
    rows = results("ranking_cifar10_cpu")["rows"]
    columns = (("knn", "top-1"), ("linear-fast", "top-1"), ("few-shot", "5 per class"))
    for encoder in ("dense, untrained", "dense", "slim, untrained", "slim"):
        of_seeds = [[row[method][encoder][name] for row in rows] for method, name in columns]
        cells = [f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in of_seeds]
        assert f"| {' | '.join((encoder, *cells))} |" in page
    added = [
        figure - row[method][f"{width}, untrained"][name]
        for row in rows
        for method in dict(columns)
        for width in ("dense", "slim")
        for name, figure in row[method][width].items()
        if name != "top-5"
    ]
    assert f"by {min(added):.1f} to {max(added):.1f} points" in page


def test_figures_of_fine_tuning_are_those_measured():
    page = (ROOT / "docs/evaluation.md").read_text()
    rows = results("finetune_cifar10_cpu")["rows"]
    for title, options in (("1 % (500 images)", "--percent 1"), ("10 per class", "--per-class 10")):
        found = [row[f"finetune {options} --steps 300 --size 32"] for row in rows]
        pairs = [(f["dense"]["top-1"], f["dense, from scratch"]["top-1"]) for f in found]
        columns = (*zip(*pairs, strict=True), [trained - scratch for trained, scratch in pairs])
        cells = [f"{statistics.mean(v):.1f} ± {statistics.stdev(v):.1f}" for v in columns]
        assert f"| {' | '.join((title, *cells))} |" in page


def test_figures_of_the_data_paths_are_those_measured():
    page = (ROOT / "docs/data.md").read_text()
    both, alone = (results(f"data_imagenet{name}_cpu") for name in ("", "_dali_alone"))
    dali = "DALI CPU, 2 threads"
    for title, result, loader in (
        ("torchvision, 2 workers", both, "torchvision, 2 workers"),
        ("DALI and the compiled operator", both, dali),
        ("DALI alone (`--backend torch`)", alone, dali),
    ):
        cells = [f"{speed:,.0f}" for speed in result["images_per_second"][loader].values()]
        if loader == dali:
            cells[-1] += f" ({result['ratio_to_torchvision'][dali]['all']:.1f}x)"
        assert f"| {' | '.join((title, *cells))} |" in page
    speeds = [of["all"] for of in both["images_per_second"].values()]
    headline = f"{speeds[1]:,.0f} images/s | {speeds[0]:,.0f} images/s"
    assert headline in (ROOT / "README.md").read_text()
