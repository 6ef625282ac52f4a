"""What ``benchmarks/bench_learning.py`` says of its rows."""

import json
import shlex
import sys

import pytest
from bench_learning import course, folder_name, main, table


def row(case, seed, dense, untrained):
    return {
        "case": case,
        "seed": seed,
        "knn": {"dense": {"top-1": dense}, "dense, untrained": {"top-1": untrained}},
    }


def test_a_table_has_means_and_deviations_over_seeds():
    rows = [row("XD", 0, 40.0, 30.0), row("XD", 1, 42.0, 30.0), row("BT", 0, 35.0, 30.0)]
    rows[2]["knn"]["slim"] = {"top-1": 20.0}
    assert table(rows, ["knn"]).splitlines() == [
        "| case | encoder | knn, top-1 |",
        "|---|---|---|",
        "| XD | dense | 41.0 ± 1.4 |",
        "| XD | dense, untrained | 30.0 ± 0.0 |",
        "| XD | dense, gain | 11.0 ± 1.4 |",
        "| BT | dense | 35.0 |",
        "| BT | dense, untrained | 30.0 |",
        "| BT | slim | 20.0 |",
        "| BT | dense, gain | 5.0 |",
    ]


def test_the_course_of_a_run_has_an_entry_for_each_evaluation(tmp_path):
    readings = [
        {"kind": "knn", "step": 0, "epoch": 0, "time": 1.0, "knn_dense": 10.004},
        {"kind": "label_free", "step": 0, "epoch": 0, "time": 1.0, "rankme_slim": 3.5},
        {"kind": "train", "step": 5, "epoch": 0.5, "loss": 3.0},
        {"kind": "knn", "step": 10, "epoch": 1, "time": 2.0, "knn_dense": 20.0},
    ]
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(reading) + "\n" for reading in readings))
    assert course(path) == [
        {"epoch": 0, "knn_dense": 10.0, "rankme_slim": 3.5},
        {"epoch": 1, "knn_dense": 20.0},
    ]


def test_runs_of_other_options_have_other_folders():
    one, other = (folder_name("a/b c", 0, f"sacl-fast train {name}") for name in ("demo", "photos"))
    assert one != other and "/" not in one and one.startswith("a_b_c-0-")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("--case a demo --case a photos", "two cases have the same name"),
        ("--case a demo --nonsense 3", "Unrecognized options: --nonsense"),
        ("--case a demo --json FILE", "is there, and no file of this program"),
        ("--case a demo --evaluate nkn", "'nkn' is none of knn, linear-fast"),
        ("--case a demo --evaluate 'finetune --percent 0'", "percent is 0"),
    ],
)
def test_what_cannot_be_run_is_said_before_any_run(tmp_path, monkeypatch, capsys, given, said):
    (tmp_path / "file.json").write_text("{}")
    given = given.replace("FILE", str(tmp_path / "file.json"))
    monkeypatch.setattr(sys, "argv", ["bench_learning.py", *shlex.split(given)])
    with pytest.raises(SystemExit) as stopped:
        main()
    assert stopped.value.code == 2 and said in capsys.readouterr().err
