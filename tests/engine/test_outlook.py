"""What a run says of its time and memory before and after the first steps."""

from __future__ import annotations

from dataclasses import replace

import pytest

from sacl_fast.config import Config
from sacl_fast.engine import dry_run
from sacl_fast.engine.dry_run import print_dry_run
from sacl_fast.engine.measure import time_step
from sacl_fast.engine.outlook import outlook, spoken
from sacl_fast.engine.trainer import train
from sacl_fast.errors import UserError


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (0.2, "less than 1 s"),
        (59, "59 s"),
        (60, "1 min"),
        (312, "5 min 12 s"),
        (629, "10 min"),
        (3599, "1 h"),
        (12_000, "3 h 20 min"),
        (86_400 * 2 + 3600 * 5 + 120, "2 d 5 h"),
        (86_399, "1 d"),
    ],
)
def test_a_length_of_time(seconds, said):
    assert spoken(seconds) == said


def test_the_line_after_the_first_steps():
    told = {"images_per_second": 412.0, "peak": 9.1e9, "memory": 80e9}
    config = Config(epochs=100, batch_size=256)
    said = outlook(config, steps_per_epoch=193, steps_done=20, **told)
    assert said == "about 3 h 20 min for 100 epochs (412 images/s), peak memory 9.1 of 80 GB"
    short = Config(epochs=1, batch_size=32)  # of which 40 steps are most
    said = outlook(short, steps_per_epoch=50, steps_done=40, **(told | {"images_per_second": 400}))
    assert said.startswith("about 4 s for 1 epoch (400 images/s)")
    said = outlook(config, steps_per_epoch=193, steps_done=193 * 60, **told)
    assert said.startswith("about 1 h 20 min for 40 more epochs (")
    said = outlook(
        config,
        steps_per_epoch=193,
        steps_done=193 * 100 - 1,
        **(told | {"images_per_second": 4120.0}),
    )
    assert said.startswith("less than 1 s for ")


def test_a_run_says_it_once(tiny, capsys):
    train(tiny)
    said = [line for line in capsys.readouterr().out.splitlines() if "peak memory" in line]
    assert len(said) == 1 and "for 2 epochs (" in said[0]


@pytest.mark.parametrize(("images", "parts"), [(2, 1), (9, 1), (12, 3)])
def test_a_step_is_timed_on_what_there_is_time_for(tiny, images, parts):
    config = replace(tiny, batch_size=images, engine=replace(tiny.engine, accumulate=parts))
    seconds, timed = time_step(config, images, seconds=0.3)
    assert seconds > 0 and min(8 * parts, images) <= timed <= images and timed % parts == 0


def test_a_dry_run_says_how_long(tiny, monkeypatch, capsys):
    def step(config, images, *, seconds, per_epoch):
        assert (images, seconds, per_epoch) == (16, dry_run._TIMED, 3)
        return 20.0, 8

    monkeypatch.setattr(dry_run, "time_step", step)
    print_dry_run(tiny)
    said = capsys.readouterr().out
    assert (
        "time        20 s a step, 1 images/s, timed on 8 random images, the rest estimated" in said
    )
    assert "time        about 2 min for 2 epochs, where images" in said

    def none(config, images, *, seconds, per_epoch):
        raise UserError("a step of 16 images does not fit into the GPU's memory")

    monkeypatch.setattr(dry_run, "time_step", none)
    print_dry_run(tiny)
    assert "time        not measured: a step of 16 images does not fit" in capsys.readouterr().out
