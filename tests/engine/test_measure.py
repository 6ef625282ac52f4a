"""``doctor --measure``: figures of a step, and sentences that rest on them."""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from sacl_fast.cli import main
from sacl_fast.engine import measure as module
from sacl_fast.engine.ceilings import launch_cost, product_rate, time_ms
from sacl_fast.engine.measure import Data, Measured, Rates, measure
from sacl_fast.engine.regions import REGIONS
from sacl_fast.engine.trace import Dear, Figures
from sacl_fast.engine.verdict import limits, screen, verdict
from sacl_fast.errors import UserError
from sacl_fast.presets import get_preset


@pytest.fixture
def tiny(tiny):
    """As quick as can be."""
    return replace(
        tiny,
        data=replace(tiny.data, loader="torchvision"),
        slim=replace(tiny.slim, mode="mask"),
    )


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """Rates of the machine take a second each, and nothing here needs settled steps."""
    monkeypatch.setattr(module, "_WARM_UP", 1)
    monkeypatch.setattr(module, "copy_bandwidth", lambda *_, **__: 1e10)
    monkeypatch.setattr(module, "product_rate", lambda *_, **__: 5e10)


def test_a_measured_step(tiny):
    found = measure(replace(tiny, batch_size=8), seconds=0.2)
    assert found.asked == found.config.batch_size == 8
    assert found.plan == "eager" and found.dtype == "float32"
    assert set(found.figures.regions) == {*REGIONS} - {"data wait", "reading", "replay"}
    assert found.figures.steps == 3 and not found.figures.on_gpu
    assert min(found.step, found.few, found.bytes, found.flops, found.launches) > 0
    assert found.data.images == "48 images of folder"
    assert found.data.alone > 0 and found.data.training > 0 and 0 <= found.data.wait <= 1
    text = "\n".join(screen(found))
    assert text.isascii() and max(map(len, text.splitlines())) <= 100
    assert len(text.splitlines()) <= 40
    assert not Path(tiny.out or ".").exists()


def test_a_slow_step_is_measured_on_fewer_images(tiny, monkeypatch):
    monkeypatch.setattr(module, "_STEP", 0.0)
    found = measure(tiny, seconds=0.0)
    assert (found.asked, found.config.batch_size) == (16, 4)
    assert "(one of 16, as asked for" in "\n".join(screen(found))


def test_a_step_of_parts(tiny, monkeypatch):
    monkeypatch.setattr(module, "_STEP", 0.0)
    parts = replace(tiny, batch_size=12, engine=replace(tiny.engine, accumulate=3))
    found = measure(parts, seconds=0.0)
    assert (found.config.batch_size, found.few_images) == (12, 6)  # parts of 4, and of 2


def test_memory_that_is_too_small(tiny, monkeypatch):
    steps = module._steps

    def small(step, config, images, **options):
        if images > limit:
            raise torch.OutOfMemoryError
        return steps(step, config, images, **options)

    monkeypatch.setattr(module, "_steps", small)
    limit = 8
    assert measure(tiny, seconds=0.0).config.batch_size == 8
    limit = 1
    with pytest.raises(UserError, match="a step of 2 images does not fit"):
        measure(tiny, seconds=0.0)


def test_without_the_images(tiny):
    gone = replace(tiny, data=replace(tiny.data, root="/no/such/folder"))
    found = measure(gone, seconds=0.0)
    assert found.data.images.startswith("images of the demo, 32 px and in memory, since")
    assert "/no/such/folder" in found.data.images


def test_what_cannot_be_is_one_sentence(capsys):
    assert main(["doctor", "--measure", "dmo"]) == 2
    assert "did you mean demo" in capsys.readouterr().err
    assert main(["doctor", "demo"]) == 2
    assert "after --measure only" in capsys.readouterr().err


# --- sentences ------------------------------------------------------------------------------------


def measured(**changes) -> Measured:
    """A step of 100 ms on a GPU that nothing bounds."""
    figures = Figures(
        steps=3,
        step=110.0,
        regions={"z1 dense a": 40.0, "backward": 50.0},
        rest=5.0,
        busy=0.9,
        launches=1000,
        kernels=990,
        dearest=[Dear("conv", 33.0, 120)],
        on_gpu=True,
    )
    base = Measured(
        config=replace(get_preset("cifar10"), batch_size=256),
        asked=256,
        device="GPU",
        dtype="float32",
        plan="eager",
        step=100.0,
        few=20.0,
        few_images=2,
        figures=figures,
        bytes=40_000_000_000,
        flops=10_000_000_000_000,
        launches=1000,
        captured=False,
        rates=Rates(2e12, 5e14, 5e-6),
        plans={},
        data=Data(10_000, 2500, 0.01, "pillow", "images", 4, "data.workers", "DALI is missing"),
    )
    return replace(base, **changes)


def said(m: Measured) -> str:
    return " ".join(verdict(m))


def test_limits_are_needs_over_rates():
    found = {limit.name: limit.milliseconds for limit in limits(measured())}
    assert found == pytest.approx(
        {"bytes": 20.0, "products": 20.0, "launches": 5.0, "fixed": 20.0, "data": 25.6}
    )
    launches = limits(measured(captured=True))[2]
    assert launches.need == "1,000 in 1 graph" and launches.milliseconds == pytest.approx(0.005)


def test_nothing_bounds_it():
    assert said(measured()).startswith(
        "No limit explains the step: bytes are 20% of it, products 20%, what needs no images 20%. "
        "The dearest is conv (30%, 120 calls). No plan was tried:"
    )


def test_data_bounds_it():
    data = Data(900, 880, 0.63, "pillow", "images", 4, "data.workers", "DALI is missing")
    assert said(measured(data=data)) == (
        "Data bounds training: 63% of the time the step waits for a batch. The loader makes 900 "
        "images/s alone and the step takes 2,560: more --data.workers (now 4), or a faster loader: "
        "DALI is missing."
    )
    dali = replace(data, loader="dali", setting="data.dali.threads", workers=-1, faster="")
    assert said(measured(data=dali)).endswith("more --data.dali.threads (now -1, as many as the "
                                              "cores suit).")  # fmt: skip


@pytest.mark.parametrize(
    ("change", "sentence", "remedy"),
    [
        ({"few": 57.0}, "What needs no images bounds the step, 57% of it", "larger --batch-size"),
        ({"bytes": 150_000_000_000}, "Memory bounds the step: its bytes alone take 75%", "bf16"),
        ({"flops": 40_000_000_000_000}, "Arithmetic bounds the step", "--views.size"),
    ],
)
def test_a_limit_bounds_it(change, sentence, remedy):
    assert sentence in said(measured(**change)) and remedy in said(measured(**change))
    faster = said(measured(**change, plans={"fused": 60.0, "dense+mask": 99.0}))
    assert faster.endswith("--engine.plan fused took 60.0 ms in place of 100.0.")
    slower = said(measured(**change, plans={"fused": 98.0}))
    assert "No other plan was faster (1 tried)" in slower and remedy in slower


def test_a_larger_batch_that_was_asked_for_shares_what_is_fixed():
    smaller = measured(few=60.0, asked=1024)
    assert smaller.step_as_asked == pytest.approx(100 + 40 / 254 * 768)
    assert said(smaller).startswith("No limit explains the step")


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({}, ""),
        ({"load": 1e4}, "Other work ran beside it (a load of 10000.0 on "),
        (
            {"step": 9.0, "asked": 1024},
            "A step on 2 images took longer than one on 256, so the machine was not steady",
        ),
    ],
)
def test_figures_of_a_machine_that_was_not_quiet(change, sentence):
    found = measured(**change)
    assert found.step_as_asked >= found.step
    lines = " ".join(screen(found))
    assert sentence in lines and ("measure again" in lines) == bool(sentence)


def test_a_figure_that_changes_changes_what_is_said():
    """No sentence is there whatever was measured."""
    texts = [said(measured(few=f, step=s)) for f, s in ((57.0, 100.0), (30.0, 50.0))]
    assert all(re.search(r"\d", text) for text in texts) and texts[0] != texts[1]


def test_rates_of_this_machine():
    cpu = torch.device("cpu")
    assert 1e8 < product_rate(cpu, torch.float32, seconds=0) < 1e13
    assert 1e-8 < launch_cost(cpu) < 1e-2
    times = time_ms(lambda: None, cpu, seconds=0)
    assert 0 <= times["p20"] <= times["p50"] <= times["p80"]
