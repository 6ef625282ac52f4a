"""What is found of operators on this machine, and how long it is remembered.

What is checked does not matter here, so a script stands for the process that checks.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from sacl_fast.errors import UserError
from sacl_fast.ops import compiled, self_check, self_check_process
from sacl_fast.ops.backend import resolve
from sacl_fast.ops.self_check import VARIABLE, Outcome, outcome_of
from sacl_fast.verification.child import MARK
from tests.checking import Children, forget

CPU = torch.device("cpu")
NAMES = ["one cpu", "two cpu", "three cpu"]


def found() -> dict[str, Outcome]:
    outcomes = (outcome_of(name.split()[0], "cpu", CPU, lambda: NAMES) for name in NAMES)
    return dict(zip(NAMES, outcomes, strict=True))


def states() -> list[str]:
    return [outcome.state for outcome in found().values()]


def remembered(tmp_path: Path) -> list[Path]:
    return sorted((tmp_path / "cache/sacl-fast/self-checks").glob("*.json"))


# --- by one process, or several -------------------------------------------------------------------


def test_all_are_checked_by_one_process_when_one_is_asked_for(children):
    assert outcome_of("two", "cpu", CPU, lambda: NAMES).state == "passed"
    assert children.asked == ["two cpu one cpu three cpu"]
    assert states() == ["passed"] * 3
    assert len(children.asked) == 1


def test_modules_of_the_current_folder_are_not_its(children, tmp_path, monkeypatch):
    for name in ("json", "signal", "torch"):
        (tmp_path / f"{name}.py").write_text("raise SystemExit('not meant')")
    monkeypatch.chdir(tmp_path)
    assert states() == ["passed"] * 3


@pytest.mark.parametrize(
    ("deed", "why"),
    [
        ("kill(signal.SIGSEGV)", "its process ended by SIGSEGV"),
        ("kill(signal.SIGILL)", "its process ended by SIGILL"),
        ("os._exit(3)", "its process ended with exit status 3"),
        ("raise SystemExit", "its process ended with exit status 0"),
        ("kill(signal.SIGALRM)", "it did not end within 60 s"),
    ],
)
def test_an_operator_that_ends_the_process_fails_and_the_others_are_checked(
    deed: str, why: str, children: Children, tmp_path: Path
) -> None:
    children.do(two=deed)
    assert states() == ["passed", "failed", "passed"]
    assert why in (found()["two cpu"].obstacle or "")
    assert children.asked == [" ".join(NAMES), "three cpu"]
    (file,) = remembered(tmp_path)
    assert set(json.loads(file.read_bytes())["found"]) == set(NAMES)


def test_a_process_that_lost_its_gpu_is_followed_by_another(children):
    lost = "error = 'CUDA error: an illegal memory access'"
    children.do(one=lost, **{"after an error": "os._exit(0)"})
    assert states() == ["failed", "passed", "passed"]
    assert children.asked == [" ".join(NAMES), "two cpu three cpu"]


@pytest.mark.parametrize(
    ("deeds", "why"),
    [
        ({"start": "sys.exit('no GPU is free')"}, "exit status 1: no GPU is free"),
        ({"start": "kill(signal.SIGKILL)"}, "SIGKILL: it said nothing"),
        ({"one": "passing = 'OutOfMemoryError'"}, "OutOfMemoryError"),
        ({"one": "kill(signal.SIGTERM)"}, "SIGTERM"),
    ],
)
def test_what_is_of_the_moment_is_not_remembered(
    deeds: dict[str, str], why: str, children: Children, monkeypatch: pytest.MonkeyPatch
) -> None:
    children.do(**deeds)
    outcome = found()["one cpu"]
    assert outcome.state == "not checked" and why in outcome.why
    assert "self-check could not be done" in (outcome.obstacle or "")
    children.do()
    forget(monkeypatch)
    assert states() == ["passed"] * 3


def test_where_no_process_can_be_started(children, monkeypatch):
    monkeypatch.setattr(self_check_process.sys, "executable", "/no/such/python")
    assert {outcome.why for outcome in found().values()} == {
        "no process can be started: No such file or directory"
    }
    forget(monkeypatch)
    monkeypatch.setattr(self_check_process.sys, "executable", "")
    assert states() == ["not checked"] * 3


def test_what_was_not_heard_to_its_end_is_not_heard():
    said = f"{MARK}{json.dumps({'begins': 'one cpu'})}\n{MARK}{{'name"
    assert self_check_process._heard(said) == ({}, "one cpu")


# --- remembering ----------------------------------------------------------------------------------


def test_another_process_remembers(children, monkeypatch):
    children.do(two="error = 'Wrong: y'")
    first = found()
    forget(monkeypatch)
    assert found() == first
    assert len(children.asked) == 1
    assert outcome_of("four", "cpu", CPU, list).state == "passed"  # and what it lacks is added
    assert children.asked[1:] == ["four cpu"]


@pytest.mark.parametrize(
    "change",
    [
        lambda m: m.setattr(self_check, "_code", lambda: "another build"),
        lambda m: m.setattr(torch, "__version__", "9.9"),
        lambda m: m.setattr(self_check, "_version", lambda name: f"another {name}"),
        lambda m: m.setattr(self_check, "_hardware", lambda _: "another instruction set"),
        lambda m: m.setattr(self_check, "__version__", "9.9"),
        lambda m: m.setenv("TRITON_INTERPRET", "1"),
    ],
)
def test_another_build_or_machine_is_checked_anew(
    change: Callable[[pytest.MonkeyPatch], None],
    children: Children,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    found()
    forget(monkeypatch)
    change(monkeypatch)
    found()
    assert len(children.asked) == 2
    assert len(remembered(tmp_path)) == 2


def test_the_code_is_the_module_and_the_sources_around_it(tmp_path, monkeypatch):
    before = self_check._code()
    folder = tmp_path / "package"
    (folder / "ops").mkdir(parents=True)
    monkeypatch.setattr(self_check, "__file__", str(folder / "ops/self_check.py"))
    digests = {before}
    for name in ("ops/a.py", "_C.cpython-311.so"):
        for content in ("x", "y"):
            (folder / name).write_text(content)
            self_check._code.cache_clear()
            digests.add(self_check._code())
    self_check._code.cache_clear()
    assert len(digests) == 5


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "[" * 100_000,
        '{"found": 3}',
        '{"found": {"one cpu": "passed"}}',
        '{"found": {"one cpu": {"state": "passed"}}}',
        '{"found": {"one cpu": {"state": "passed", "why": "", "when": 1e300}}}',
        '{"found": {"one cpu": {"state": "passed", "why": "", "when": NaN}}}',
        '{"found": {"one cpu": {"state": "perhaps", "why": "", "when": 1.0}}}',
        '{"found": {"one cpu": {"state": ["passed"], "why": [], "when": 1.0}}}',
        '{"found": {"one cpu": {"state": "passed", "why": "", "when": 1.0, "how": 2}}}',
    ],
)
def test_a_damaged_file_is_none_and_is_mended(content, children, tmp_path, monkeypatch):
    found()
    (file,) = remembered(tmp_path)
    file.write_text(content)
    forget(monkeypatch)
    assert states() == ["passed"] * 3
    assert "one cpu" in children.asked[1]
    assert set(json.loads(file.read_bytes())["found"]) == set(NAMES)


@pytest.mark.parametrize("kind", ["a file in its place", "a folder in the file's", "no home"])
def test_where_nothing_can_be_written(kind, children, tmp_path, monkeypatch, caplog):
    if kind == "no home":
        monkeypatch.delenv("XDG_CACHE_HOME")
        monkeypatch.setattr(self_check, "user_cache", lambda: None)
    elif kind == "a file in its place":
        (tmp_path / "cache").write_text("")
    else:
        found()
        (file,) = remembered(tmp_path)
        file.unlink()
        file.mkdir()
        forget(monkeypatch)
    with caplog.at_level(logging.WARNING):
        assert states() == ["passed"] * 3
    assert not caplog.messages


def test_old_files_are_removed(children, tmp_path, monkeypatch):
    monkeypatch.setattr(self_check, "_KEPT", 3)
    for build in range(5):
        monkeypatch.setattr(self_check, "_code", lambda build=build: str(build))
        forget(monkeypatch)
        found()
        for age, file in enumerate(remembered(tmp_path)):
            if file.stat().st_mtime > 1e9:
                os.utime(file, (build, build + age / 10))
    assert len(remembered(tmp_path)) == 3
    assert len(list((tmp_path / "cache/sacl-fast/self-checks").iterdir())) == 6  # and their locks


def test_of_processes_at_once_one_checks(children):
    """Threads here, each with a lock of the file as a process has it."""
    children.do(one="import time; time.sleep(0.3)")
    results: list[dict[str, Outcome]] = []

    def ask() -> None:
        results.append(self_check._remembered_or_checked(NAMES, CPU))

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(children.asked) == 1
    assert len(results) == 4 and all(result == results[0] for result in results)


def test_a_lock_that_is_never_given_back_is_not_waited_for(children, tmp_path, monkeypatch):
    found()
    (file,) = remembered(tmp_path)
    monkeypatch.setattr(self_check, "ALL", 0.1)
    forget(monkeypatch)
    with self_check._alone(file):
        assert states() == ["passed"] * 3


# --- the variable ---------------------------------------------------------------------------------


def test_again_checks_once_more_and_once_only(children, monkeypatch):
    found()
    monkeypatch.setenv(VARIABLE, "again")
    monkeypatch.setattr(self_check, "_STARTED", time.time())
    for _ in range(2):  # as ranks that start together
        forget(monkeypatch)
        found()
    assert len(children.asked) == 2


@pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))
def test_off_takes_operators_unchecked(children, monkeypatch):
    monkeypatch.setenv(VARIABLE, "off")
    assert resolve("auto", "slim_add", CPU).backend == "cpu"
    assert str(found()["one cpu"]) == f"self-check not done ({VARIABLE} is off)"
    assert not children.asked


def test_another_value_is_an_error(children, monkeypatch):
    monkeypatch.setenv(VARIABLE, "never")
    with pytest.raises(UserError, match="is 'never'; again, off, or not set works"):
        found()
