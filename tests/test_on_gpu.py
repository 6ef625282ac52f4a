"""The one call that measures a GPU, tried on the CPU: tasks run, and none ends another."""

import json
import sys
import time
from argparse import Namespace
from pathlib import Path

import on_gpu
import pytest
from on_gpu import Outcome, Task, run, tasks, train

ROOT = Path(__file__).resolve().parent.parent


def python(code: str, **more) -> Task:
    return Task("A", "task", [sys.executable, "-c", code], more.pop("limit", 60), **more)


def given(tmp_path: Path, device: str = "cpu", photos: Path | None = None) -> Namespace:
    return Namespace(device=device, out=tmp_path, cifar=None, photos=photos)


def test_a_task_writes_a_log_and_its_last_line_is_the_headline(tmp_path):
    outcome = run(python("print('one'); print('two')"), tmp_path, 60)
    assert (outcome.status, outcome.headline) == ("ok", "two")
    assert (tmp_path / "task.log").read_text() == "one\ntwo\n"


def test_a_headline_is_of_the_figures_also_where_the_task_then_failed(tmp_path):
    code = f"open({str(tmp_path / 'task.json')!r}, 'w').write('{{\"ms\": 3}}'); raise SystemExit(4)"
    outcome = run(python(code, headline=lambda result: f"{result['ms']} ms"), tmp_path, 60)
    assert (outcome.status, outcome.headline) == ("failed (4)", "3 ms")


@pytest.mark.parametrize("figures", ["", "[1, 2", "[1, 2]", "{}"])
def test_figures_that_cannot_be_read_end_nothing(tmp_path, figures):
    (tmp_path / "task.json").write_text(figures)
    outcome = run(python("print('said')", headline=lambda r: r["ms"]), tmp_path, 60)
    assert outcome.status == "ok" and outcome.headline


def test_a_task_over_its_limit_is_ended_with_its_children(tmp_path):
    started = tmp_path / "started"
    child = f"import time; open({str(started)!r}, 'w'); time.sleep(600)"
    code = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])"
    outcome = run(python(code, limit=5), tmp_path, 60)
    assert outcome.status.startswith("over its limit")
    deadline = time.monotonic() + 30  # a killed process is there until the kernel has cleared it
    while left := [p for p in Path("/proc").glob("[0-9]*/cmdline") if str(started) in _read(p)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.1)


def _read(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""


def test_what_is_missing_and_what_there_is_no_time_for_is_left_out(tmp_path):
    missing = run(python("raise SystemExit(1)", needs="a CUDA device"), tmp_path, 60)
    late = run(python("raise SystemExit(1)"), tmp_path, 1)
    assert (missing.status, missing.headline) == ("left out", "needs a CUDA device")
    assert (late.status, late.headline) == ("left out", "no time is left")


def test_all_programs_are_there(tmp_path):
    for device in ("cpu", "cuda"):
        for task in tasks(given(tmp_path, device)):
            for word in task.command:
                if word.startswith(("benchmarks/", "tests/")):
                    assert (ROOT / word).exists(), f"{task.name}: {word}"


def test_the_summary_is_whole_after_each_task(tmp_path):
    outcomes = [Outcome("A", "one", 1.0, "ok", "x"), Outcome("B", "two", 2.0, "left out", "y")]
    for n in (1, 2):
        on_gpu.write_summary(tmp_path, outcomes[:n])
        assert json.loads((tmp_path / "summary.json").read_text()) == [
            vars(outcome) for outcome in outcomes[:n]
        ]


@pytest.mark.parametrize("name", ["ceilings", "slim_pointwise", "step_mobilenetv1_100_224"])
def test_tasks_run_on_the_cpu(tmp_path, name):
    assert figures_of(name, given(tmp_path))


def test_data_paths_are_measured_on_the_cpu(tmp_path, image_folder):
    result = figures_of("data_photos", given(tmp_path, photos=image_folder))
    measured = {row["name"] for row in result["rows"]}
    assert result["baseline"] in measured
    assert not measured & set(result["missing"])
    for row in result["rows"]:
        assert row["images_per_second"] > 0 and row["ratio"] > 0 and row["core_ms_per_image"] >= 0


def test_methods_are_compared_on_the_cpu(tmp_path, image_folder):
    options = given(tmp_path)
    options.cifar = image_folder
    outcome = train(options, 200)
    assert outcome.status == "ok", (tmp_path / "learning.log").read_text()
    assert outcome.headline.startswith("kNN top-1 after 3 steps, %: XD ")
    rows = json.loads((tmp_path / "learning.json").read_text())["rows"]
    assert [row["case"] for row in rows[:3]] == list(on_gpu.METHODS)
    for row in rows:
        for evaluation in ("knn", "linear-fast"):
            assert {"dense", "dense, untrained"} <= row[evaluation].keys()


def figures_of(name, options):
    """What a task writes; it runs to its end, and has a headline."""
    (task,) = (task for task in tasks(options) if task.name == name)
    outcome = run(task, options.out, 300)
    assert outcome.status == "ok", (options.out / f"{name}.log").read_text()
    assert outcome.headline and "cannot be read" not in outcome.headline
    return json.loads((options.out / f"{name}.json").read_text())
