"""``sacl-fast report`` on run folders as they are, and as they may be."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image

from sacl_fast.cli import main
from sacl_fast.config import Config, to_dict
from sacl_fast.looking.report import (
    _PANELS,
    curves_png,
    figures_table,
    html_of,
    markdown_of,
    settings_table,
)
from sacl_fast.looking.runs import open_runs


def row(kind: str, step: float, **values: Any) -> str:
    return json.dumps({"kind": kind, "step": step, "epoch": step / 4, "time": 1e9 + step} | values)


def make_run(folder: Path, *lines: str, done: bool = True, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    config = to_dict(Config(**{"epochs": 5, **settings}))
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    (folder / "metrics.jsonl").write_text("".join(f"{line}\n" for line in lines))
    if done:
        (folder / "encoder.safetensors").touch()
    return folder


def curve(steps: int, knn: tuple[float, ...] = (), **values: float) -> list[str]:
    train = [
        row("train", s, loss=9 / s, embedding_std=0.9, images_per_second=100 + s, **values)
        for s in range(1, steps + 1)
    ]
    return train + [row("knn", 4 * i, knn_dense=v) for i, v in enumerate(knn)]


def table(rows: list[list[str]]) -> dict[str, list[str]]:
    return {title: cells for title, *cells in rows}


def test_a_run_without_labels_has_its_ranks(tmp_path):
    ranks = [
        row("label_free", 4 * i, rankme_dense=v, lidar_dense=v / 2) for i, v in enumerate((3, 8, 7))
    ]
    (run,) = open_runs([str(make_run(tmp_path / "a", *curve(8), *ranks))])
    figures = table(figures_table([run]))
    assert figures["RankMe dense, best"] == ["8.0 (epoch 1)"]
    assert figures["RankMe dense, last"] == ["7.0"]
    assert figures["LiDAR dense, last"] == ["3.5"]
    assert "kNN dense %, best" not in figures
    assert {f"{key}_{width}" for key in ("rankme", "lidar") for width in ("dense", "slim")} <= {
        *_PANELS
    }


def test_figures_and_settings_that_differ(tmp_path, capsys):
    a = make_run(tmp_path / "a", *curve(20, (20.0, 52.0, 49.5)), batch_size=64)
    b = make_run(tmp_path / "b", *curve(9), done=False, batch_size=32, out="elsewhere")
    runs = open_runs([str(a), str(b), f"{a}/"])
    assert [run.name for run in runs] == ["a", "b"]
    figures = table(figures_table(runs))
    assert figures["epochs"] == ["5", "2.25 of 5, unfinished"]
    assert figures["kNN dense %, best"] == ["52.0 (epoch 1)", ""]
    assert figures["kNN dense %, last"] == ["49.5", ""]
    assert figures["loss, last"] == ["0.45", "1"]
    assert figures["images/s (median)"] == ["110", "105"]
    assert figures["time"] == ["0:00:20", "0:00:08"]
    assert settings_table(runs) == [["setting", "a", "b"], ["batch_size", "64", "32"]]
    assert runs[0].notes == [f"given more than once ({a}/), and shown once"] and not runs[1].notes
    assert main(["report", str(a), str(b)]) == 0
    told = capsys.readouterr().out
    assert "52.0 (epoch 1)" in told and "batch_size" in told and "written" not in told


def test_one_run_as_markdown_and_as_a_page(tmp_path, capsys):
    run = make_run(tmp_path / "a|b", *curve(5, (20.0,)))
    for name, files in (("new/r.md", {"r.md", "r_curves.png"}), ("page/r.html", {"r.html"})):
        out = tmp_path / name
        assert main(["report", str(run), "--out", str(out)]) == 0
        assert {file.name for file in out.parent.iterdir()} == files
    text = (tmp_path / "new/r.md").read_text()
    assert "|  | a\\|b |" in text and "| kNN dense %, last | 20.0 |" in text
    assert "Settings that differ" not in text and "![Curves](r_curves.png)" in text
    assert Image.open(tmp_path / "new/r_curves.png").size[0] == 1210
    assert main(["report", str(run), "--out", str(tmp_path / "new/r.txt")]) == 2
    assert "a name in .html or .md works" in capsys.readouterr().err


def test_no_file_is_replaced(tmp_path, capsys):
    run = make_run(tmp_path / "a", *curve(5))
    (run / "curves.png").write_text("the run's own")
    assert main(["report", str(run), "--out", str(run / "curves.md")]) == 0
    assert (run / "curves.png").read_text() == "the run's own"
    capsys.readouterr()
    for there, out in (("n.md", "n.md"), ("m_curves.png", "m.md"), ("p.html", "p.html")):
        (tmp_path / there).write_text("mine")
        assert main(["report", str(run), "--out", str(tmp_path / out)]) == 2
        told = capsys.readouterr()
        assert f"{there} is there already; another --out works" in told.err and not told.out
        assert (tmp_path / there).read_text() == "mine"
    assert not (tmp_path / "m.md").exists() and not (tmp_path / "n_curves.png").exists()
    (tmp_path / "p_curves.png").write_text("")  # which a page does not need
    assert main(["report", str(run), "--out", str(tmp_path / "q.html")]) == 0


def test_a_resumed_run_of_damaged_lines_and_other_metrics(tmp_path):
    lines = [
        *curve(8),
        '{"half a line',
        "[1, 2]",
        row("train", 3, loss=None),
        row("train", 9, loss="high", rankme=12.5),
        row("train", 10, loss=True, rankme=[1], epoch="x"),
        '{"kind": "train", "step": 11, "epoch": 1e999, "loss": 1}',
        row("event", 11, message="went on"),
        row("train", 12, loss=float("nan"), time=1e9 + 7200),
        row("train", 8, loss=5.0),
    ]
    run = make_run(tmp_path / "a", *lines)
    (tmp_path / "a/metrics.jsonl").write_text("\n".join(lines) + '\n{"kind": "tr')
    (found,) = open_runs([str(run)])
    losses = {row["step"]: row.get("loss") for row in found.rows}
    assert losses[8] == 5.0 and losses[3] is None and losses[9] is None and losses[12] is None
    assert found.figures["loss, last"] == "5" and found.figures["time"] == "0:00:08"
    notes = " ".join(found.notes)
    assert "2 damaged lines of metrics.jsonl left out" in notes
    assert "2 of 15 readings cannot be used" in notes
    assert "1:59:51 without readings" in notes
    assert curves_png([found])


def test_runs_of_which_little_is_there(tmp_path, capsys):
    empty = make_run(tmp_path / "empty", done=False)
    bare = tmp_path / "bare"
    bare.mkdir()
    (bare / "metrics.jsonl").write_text("\n".join(curve(3)))
    broken = make_run(tmp_path / "broken", *curve(3))
    (broken / "config.yaml").write_text("a: [")
    evals = broken / "eval"
    evals.mkdir()
    (evals / "knn.json").write_text('{"encoders": 3}')
    figure = {"top-1": {"mean": 61.0, "margin": 1.5}}
    encoders = [{"name": "dense", "figures": figure}, {"name": "dense, untrained", "figures": 0}]
    (evals / "linear.json").write_text(json.dumps({"method": "linear", "encoders": encoders}))
    paths = [str(empty), str(bare), str(broken)]
    runs = open_runs(paths)
    assert [len(run.notes) for run in runs] == [1, 1, 2]
    figures = table(figures_table(runs))
    assert figures["eval linear, dense, top-1 %"] == ["", "", "61.0 ± 1.5"]
    assert settings_table(runs) == [["setting", *(run.name for run in runs)]]
    assert main(["report", *paths]) == 0
    told = capsys.readouterr().out
    assert "no readings yet" in told and "eval/knn.json cannot be understood" in told
    assert html_of(runs) and "no config.yaml" in markdown_of(runs, "x.png").replace("\\", "")


def test_a_fine_tuning_is_no_run(tmp_path, capsys):
    make_run(tmp_path / "a", *curve(2))
    (tmp_path / "a/config.yaml").unlink()
    (tmp_path / "a/finetune.json").write_text("{}")
    assert main(["report", str(tmp_path / "a")]) == 2
    assert "holds a fine-tuning, whose figures are in its finetune.md" in capsys.readouterr().err


def test_a_run_is_not_compared_with_itself(tmp_path, monkeypatch, capsys):
    (tmp_path / "link").symlink_to(make_run(tmp_path / "a", *curve(2)))
    make_run(tmp_path / "b", *curve(2))
    monkeypatch.chdir(tmp_path)
    for again in ("a", "./a", "link/", str(tmp_path / "a")):
        assert main(["report", "a", again, "b"]) == 0
        said = capsys.readouterr().out
        assert said.split("\n")[0].split() == ["a", "b"]
        assert f"a: given more than once ({again}), and shown once" in said


def test_runs_of_the_same_name_and_names_that_break_a_page(tmp_path):
    awkward = os.fsdecode(b"<b>$x$ \xff")
    paths = [make_run(tmp_path / part / awkward, *curve(3)) for part in ("one", "two")]
    runs = open_runs([str(path) for path in paths])
    assert [run.name for run in runs] == [f"{part}/<b>$x$ \\udcff" for part in ("one", "two")]
    assert b"<b>" not in html_of(runs) and b"&lt;b&gt;$x$" in html_of(runs)
    assert "None." in markdown_of(runs, "x.png")


def test_many_runs(tmp_path):
    paths = [str(make_run(tmp_path / f"{i}", *curve(2 + i))) for i in range(26)]
    for count in (9, 26):
        image = Image.open(io.BytesIO(curves_png(open_runs(paths[:count]))))
        assert image.size[0] == 1210


@pytest.mark.parametrize(
    ("args", "hint"),
    [
        (("--out", "r.md"), "report needs run folders"),
        (("none",), "none is no folder"),
        (("here",), "holds no run"),
        (("here", "--aut", "x"), "--aut"),
    ],
)
def test_mistakes_are_one_sentence(tmp_path, monkeypatch, capsys, args, hint):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    assert main(["report", *args]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert hint in line
