"""metrics.jsonl: what is in it, what a resumed run does to it, and what goes wrong."""

from __future__ import annotations

import json
import math
import os
import resource
import signal
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest

from sacl_fast.config import LogConfig
from sacl_fast.engine.metrics import MetricWriter, read_metrics, rewind_metrics
from sacl_fast.errors import UserError

PLAIN = LogConfig(tensorboard=False)


def writer(folder: Path, resume_step: int | None = None, log: LogConfig = PLAIN) -> MetricWriter:
    step = -1 if resume_step is None else resume_step
    rewind_metrics(folder / "metrics.jsonl", step, folder / "aside" / "metrics.jsonl")
    return MetricWriter(folder, log, {"seed": 0}, resume_step)


def write_steps(w: MetricWriter, steps: range) -> None:
    for step in steps:
        w.write("train", step, step / 10, {"loss": 1.0 / step, "lr": 0.1})


def test_lines_are_on_disk_as_they_happen(tmp_path: Path):
    with writer(tmp_path) as w:
        w.write("train", 10, 0.25, {"loss": 1.5, "lr": 0.01})
        w.write("knn", 40, 1.0, {"knn_dense": 31.5})
        w.write("event", 40, 1.0, {"message": 'a "quoted"\nmessage, naïve'})
        lines = (tmp_path / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in lines]
    assert rows == read_metrics(tmp_path / "metrics.jsonl")
    assert [row["kind"] for row in rows] == ["train", "knn", "event"]
    assert rows[0] | {"time": 0} == dict(
        kind="train", step=10, epoch=0.25, time=0, loss=1.5, lr=0.01
    )
    assert rows[2]["message"] == 'a "quoted"\nmessage, naïve'
    assert all(abs(row["time"] - rows[0]["time"]) < 60 for row in rows)


def test_values_that_are_not_finite_are_null(tmp_path: Path):
    with writer(tmp_path) as w:
        w.write("train", 1, 0.1, {"loss": math.nan, "lr": math.inf, "std": -math.inf, "n": None})
    line = (tmp_path / "metrics.jsonl").read_text()
    row = json.loads(line, parse_constant=lambda name: pytest.fail(name))
    assert [row[key] for key in ("loss", "lr", "std", "n")] == [None] * 4


def test_resuming_sets_later_steps_aside_and_goes_on(tmp_path: Path):
    with writer(tmp_path) as w:
        write_steps(w, range(1, 8))
    with writer(tmp_path, resume_step=4) as w:
        assert [row["step"] for row in read_metrics(w.path)] == [1, 2, 3, 4]
        write_steps(w, range(5, 10))
    assert [row["step"] for row in read_metrics(w.path)] == list(range(1, 10))
    assert [row["step"] for row in read_metrics(tmp_path / "aside" / "metrics.jsonl")] == [5, 6, 7]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["aside", "metrics.jsonl"]


def test_resuming_keeps_the_old_lines_as_they_were(tmp_path: Path):
    with writer(tmp_path) as w:
        write_steps(w, range(1, 4))
    before = w.path.read_bytes()
    writer(tmp_path, resume_step=3).close()
    assert w.path.read_bytes() == before


def test_a_half_written_last_line_is_dropped(tmp_path: Path):
    with writer(tmp_path) as w:
        write_steps(w, range(1, 4))
    for tail in (b'{"kind": "tra', b'{"kind": "train", "step": 4', b"\0\0\0\0", b"\xc3"):
        with open(w.path, "ab") as file:
            file.write(tail)
        assert [row["step"] for row in read_metrics(w.path)] == [1, 2, 3]
        writer(tmp_path, resume_step=100).close()
        assert w.path.read_bytes().endswith(b"}\n")
        assert len(read_metrics(w.path)) == 3


def test_a_new_run_starts_a_new_file(tmp_path: Path):
    with writer(tmp_path) as w:
        write_steps(w, range(1, 4))
    before = w.path.read_bytes()
    writer(tmp_path).close()
    assert read_metrics(tmp_path / "metrics.jsonl") == []
    assert (tmp_path / "aside" / "metrics.jsonl").read_bytes() == before


def test_resuming_without_a_file(tmp_path: Path):
    with writer(tmp_path, resume_step=5) as w:
        write_steps(w, range(6, 8))
    assert len(read_metrics(w.path)) == 2


@pytest.mark.parametrize(
    "damage",
    [b'{"st', b"", b"[1]", b"null", b"\xff\xfe", b"\0" * 9, b"[" * 5000, b'{"step": "x"}',
     b'{"step": NaN}', b'{"a": 1' + b"0" * 5000 + b"}", b'{"step": 1}{"step": 1}'],
)  # fmt: skip
def test_broken_lines_in_the_middle_end_nothing(tmp_path: Path, damage: bytes, caplog):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b'{"step": 1}\n' + damage + b'\n{"step": 3}\n')
    assert [row["step"] for row in read_metrics(path)] == [1, 3]
    assert "1 of 3 lines are damaged and left out, line 2 first" in caplog.text
    writer(tmp_path, resume_step=3).close()
    assert path.read_bytes() == b'{"step": 1}\n{"step": 3}\n'
    assert (tmp_path / "aside" / "metrics.jsonl").read_bytes() == damage + b"\n"


def test_a_file_that_is_none_is_said(tmp_path: Path):
    with pytest.raises(UserError, match=r"cannot read .*No such file"):
        read_metrics(tmp_path / "other.jsonl")
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match=r"is no file"):
        writer(tmp_path)


def test_a_file_that_is_removed_goes_on_in_a_new_one(tmp_path: Path, caplog):
    with writer(tmp_path) as w:
        write_steps(w, range(1, 4))
        w.path.unlink()
        write_steps(w, range(4, 6))
    assert [row["step"] for row in read_metrics(w.path)] == [4, 5]
    assert caplog.text.count("was removed") == 1


FULL_DISK = """
import resource, sys
from sacl_fast.config import LogConfig
from sacl_fast.engine.metrics import MetricWriter
from sacl_fast.errors import UserError
w = MetricWriter(sys.argv[1], LogConfig(tensorboard=False), {}, None)
resource.setrlimit(resource.RLIMIT_FSIZE, (1000, 1000))
try:
    for step in range(100):
        w.write("train", step, 0.0, {"loss": 1.0})
except UserError as error:
    w.close()
    sys.exit(f"said at step {step}: {error}")
"""


def test_a_full_disk_is_said_and_leaves_a_readable_file(tmp_path: Path):
    """A limit on the file's size stands for it: write() fails likewise, after part of a line."""
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
    )
    said = done.stderr.splitlines()[-1]
    path = tmp_path / "metrics.jsonl"
    assert path.stat().st_size == 1000
    assert not path.read_text().endswith("\n")
    steps = [row["step"] for row in read_metrics(path)]
    assert steps == list(range(len(steps)))
    assert len(steps) > 5
    assert said.startswith(f"said at step {len(steps)}: cannot write {path}: File too"), done.stderr
    with writer(tmp_path, resume_step=steps[-1]) as w:
        write_steps(w, range(steps[-1] + 1, 20))
    assert [row["step"] for row in read_metrics(path)] == list(range(20))


def test_a_failed_rewrite_leaves_the_old_file(tmp_path: Path):
    with writer(tmp_path) as w:
        write_steps(w, range(1, 8))
    before = w.path.read_bytes()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))
    try:
        with pytest.raises(UserError, match=r"cannot write .*metrics.jsonl"):
            writer(tmp_path, resume_step=4)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert w.path.read_bytes() == before


def test_a_folder_that_is_none_is_said(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=r"cannot write .*Not a directory"):
        writer(tmp_path / "file")


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard")).Reload()
    return [(event.step, event.value) for event in events.Scalars(tag)]


def test_tensorboard_follows_and_hides_steps_taken_again(tmp_path: Path):
    pytest.importorskip("tensorboard")
    log = LogConfig(tensorboard=True)
    with writer(tmp_path, log=log) as w:
        write_steps(w, range(1, 8))
        w.write("event", 7, 0.7, {"message": "text"})
    with writer(tmp_path, resume_step=4, log=log) as w:
        w.write("train", 5, 0.5, {"loss": 9.0})
    expected = [(step, pytest.approx(1 / step)) for step in range(1, 5)]
    assert scalars(tmp_path, "train/loss") == [*expected, (5, 9.0)]


def test_without_tensorboard_one_line_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
):
    monkeypatch.delitem(sys.modules, "torch.utils.tensorboard", raising=False)
    monkeypatch.setitem(sys.modules, "tensorboard", None)
    with caplog.at_level("INFO"), writer(tmp_path, log=LogConfig(tensorboard=True)) as w:
        write_steps(w, range(1, 3))
    assert len(read_metrics(w.path)) == 2
    assert [record.levelname for record in caplog.records] == ["INFO"]
    assert "TensorBoard is not installed" in caplog.text
    assert not (tmp_path / "tensorboard").exists()


def test_without_wandb_the_command_that_installs_it_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match=r"pip install 'sacl-fast\[log\]'"):
        writer(tmp_path, log=LogConfig(tensorboard=False, wandb="project"))


class FakeRun:
    def __init__(self, options: dict[str, Any]) -> None:
        self.id = options["id"] or "abc123"
        self.options = options
        self.logged: list[dict[str, Any]] = []
        self.finished = False

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: dict[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished = True


def test_wandb_gets_the_values_and_is_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    runs: list[FakeRun] = []

    def init(**options: Any) -> FakeRun:
        runs.append(FakeRun(options))
        return runs[-1]

    fake: Any = types.ModuleType("wandb")
    fake.init = init
    monkeypatch.setitem(sys.modules, "wandb", fake)
    log = LogConfig(tensorboard=False, wandb="project")
    with writer(tmp_path, log=log) as w:
        w.write("train", 1, 0.1, {"loss": 2.0})
    writer(tmp_path, resume_step=1, log=log).close()
    first, second = runs
    assert first.options["project"] == "project"
    assert first.options["config"] == {"seed": 0}
    assert first.options["id"] is None
    assert first.logged == [{"step": 1, "epoch": 0.1, "train/loss": 2.0}]
    assert first.finished
    assert second.options["id"] == "abc123"
