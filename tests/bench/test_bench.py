"""``sacl-fast bench``: the baseline computes what we do, and what is printed was measured."""

from __future__ import annotations

import json
import re
from dataclasses import fields, replace
from typing import get_args

import pytest
import torch

from sacl_fast.bench import waterfall
from sacl_fast.bench.command import conclusion
from sacl_fast.bench.pseudocode import pseudocode_step
from sacl_fast.bench.waterfall import prepared, variants
from sacl_fast.cli import main, parse_config
from sacl_fast.config import Config
from sacl_fast.config.choices import BenchVariant
from sacl_fast.engine.determinism import deterministic

SMALL = (
    "cifar10 --encoder.name resnet20 --encoder.width 0.25 --views.size 16 --batch-size 8 "
    "--projector.hidden 16 --projector.out 16 --device cpu --precision fp32"
).split()


@pytest.mark.parametrize("more", [[], ["--loss.distillation", "none"]])
def test_the_pseudocode_computes_what_we_do(more):
    given = [*SMALL, *more, "--loss.variance", "unbiased"]
    config = replace(parse_config("bench", given), backend="torch")
    ours, view_a, view_b = prepared(config)
    baseline = pseudocode_step(ours.method, config, None)
    for p in baseline.parameters:
        p.grad = None
    baseline.update = lambda step: None
    expected = baseline(view_a, view_b, 0)
    theirs = [p.grad.clone() for p in baseline.parameters]
    for p in baseline.parameters:
        p.grad = None
    loss, _ = ours.criterion(*ours.four_passes(view_a, view_b))
    ours.backward(loss)
    torch.testing.assert_close(loss.detach(), expected, rtol=1e-4, atol=0)
    scale = max(g.abs().max() for g in theirs)
    for p, gradient in zip(baseline.parameters, theirs, strict=True):
        torch.testing.assert_close(p.grad, gradient, rtol=0, atol=1e-3 * scale.item())


@pytest.mark.parametrize("name", ["lars", "adamw"])
def test_the_pseudocode_moves_the_weights(name):
    config = replace(parse_config("bench", [*SMALL, "--optim.name", name]), backend="torch")
    ours, view_a, view_b = prepared(config)
    baseline = pseudocode_step(ours.method, config, None)
    before = [p.detach().clone() for p in baseline.parameters]
    baseline(view_a, view_b, 5)
    for p, was in zip(baseline.parameters, before, strict=True):
        assert p.isfinite().all()
        if p.grad.abs().max() > 1e-5:  # others are biases before a batch norm
            assert not torch.equal(p, was)


def test_the_command(tmp_path, capsys):
    out = tmp_path / "figures"
    given = ["--steps", "1", "--variants", "run,pseudocode", "--out", str(out)]
    assert main(["bench", *SMALL, *given]) == 0
    printed = capsys.readouterr().out
    assert (out / "bench.png").stat().st_size > 5000
    result = json.loads((out / "bench.json").read_text())
    assert [row["name"] for row in result["rows"]] == ["pseudocode", "run"]
    assert result["encoder"] == "resnet20" and result["environment"]["torch"]
    for row in result["rows"]:
        assert f"{row['name']} " in printed and f"{row['images_per_second']:,.1f}" in printed
    assert conclusion(result) in printed
    assert re.search(r"^\(about [1-9]\d* s\)$", printed, re.M)
    first, last = result["rows"]
    assert "of_first" not in first and last["of_first"]["p50"] > 0
    assert (last["plan"], last["slim_mode"]) == ("eager", "skip")
    assert "(plan eager, slim.mode skip)" in printed


def test_variants_are_of_the_device_and_the_backend():
    found = list(variants(parse_config("bench", SMALL)))
    elsewhere = {"trial", "graph", "fused"} - set(found)  # fused: with Triton alone
    assert found == [name for name in get_args(BenchVariant) if name not in elsewhere]
    assert {"trial", "graph"} <= elsewhere
    plain = list(variants(parse_config("bench", [*SMALL, "--backend", "torch"])))
    assert plain == ["pseudocode", "plain", "run", "compiled"]


@pytest.mark.parametrize("on", [False, True])
def test_cudnn_chooses_as_in_a_run(monkeypatch, on):
    """By trial, but in a run that is to be deterministic."""
    asked = ["--deterministic"] if on else ["--no-deterministic"]
    config = parse_config("bench", [*SMALL, "--backend", "torch", *asked])
    monkeypatch.setattr(waterfall, "pick_device", lambda device: torch.device("cuda"))
    monkeypatch.setattr(waterfall, "plan_obstacle", lambda plan, config, device: None)
    monkeypatch.setattr(waterfall, "prepared", lambda config, chosen=False: ())
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", on)
    with deterministic(config.deterministic):
        variants(config)["run"]()
        assert torch.backends.cudnn.benchmark is not on
        others = variants(replace(config, backend="auto"))
        assert ("trial" in others) is not on and "graph" in others


def test_help_says_what_is_ignored(capsys):
    """Every setting that is no part of a step. Of the views their size is one."""
    assert main(["bench", "--help"]) == 0
    text = " ".join(capsys.readouterr().out.split())
    ignored = re.search(r"Ignored, since they change no step: (.*?) all but views.size", text)[1]
    named = {name.replace("-", "_") for name in re.split(r"\W*(?:,| and | of )\W*", ignored)}
    of_a_step = {"seed", "batch_size", "device", "precision", "channels_last", "backend"}
    of_a_step |= {"deterministic", "encoder", "projector", "loss", "slim", "engine", "optim"}
    rest = {field.name for field in fields(Config)} - of_a_step - {"out", "preset", "views"}
    assert rest <= named


def row(name: str, ms: float, **more: object) -> dict[str, object]:
    return {"name": name, "step_ms": {"p50": ms}, "peak_memory_bytes": 100, **more}


@pytest.mark.parametrize(
    ("rows", "said"),
    [
        ([], ""),
        ([row("pseudocode", 100)], ""),
        ([row("plain", 100), row("run", 50)], ""),
        ([row("pseudocode", 100), {"name": "run", "error": "it failed"}], ""),
        (
            [row("pseudocode", 100), row("run", 50, peak_memory_bytes=60), row("compiled", 10)],
            "run is the fastest: 2.00 times as fast as the pseudocode, in 0.60 of its memory.",
        ),
        (
            [row("pseudocode", 100), row("dense", 40), row("run", 50)],
            "dense is the fastest: 2.50 times as fast as the pseudocode, in 1.00 of its memory; a "
            "run with these settings is 2.00 times as fast.",
        ),
        (
            [row("pseudocode", 100), row("run", 50, of_first={"p50": 1.5})],
            "run is the fastest: 1.50 times as fast as the pseudocode, in 1.00 of its memory.",
        ),
        (
            [row("pseudocode", 100), row("run", 125)],
            "run is the fastest of ours: 0.80 times as fast as the pseudocode, in 1.00 of its "
            "memory.",
        ),
    ],
)
def test_the_sentence_is_of_the_figures(rows, said):
    assert conclusion({"rows": rows}) == said


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["--steps", "0"], "--steps is '0'; a number from 1 to 10000 works"),
        (["--steps", "many"], "--steps is 'many'"),
        (["--steps"], "--steps needs a number"),
        (["--variants", "plain,skp"], "compiled works (did you mean skip?)"),
        (["--variants", "graph"], "the variant graph does not run here"),
        (["--out", "{file}"], "--out names another folder"),
        (["--out", "/proc"], "cannot write into /proc"),
        (["--data.workers", "many"], "--data.workers"),
    ],
)
def test_mistakes_get_one_sentence(tmp_path, capsys, given, said):
    (tmp_path / "file").write_text("")
    args = [arg.format(file=tmp_path / "file") for arg in given]
    assert main(["bench", *SMALL, *args]) == 2
    captured = capsys.readouterr()
    assert said in captured.err and captured.err.count("\n") == 1 and not captured.out
