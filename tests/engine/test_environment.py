"""What is recorded of a machine, and what the doctor says of it."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
import torch

from sacl_fast._version import __version__
from sacl_fast.engine import environment as module
from sacl_fast.engine.environment import Finding, doctor, environment, git_state, print_doctor
from sacl_fast.ops import compiled, self_check
from sacl_fast.ops.backend import OPERATORS, resolve
from sacl_fast.ops.self_check import Outcome


def git(folder: Path, *arguments: str) -> None:
    who = ["-c", "user.name=x", "-c", "user.email=x@example.org"]
    subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    """A repository with a committed package in it; the package's folder is returned."""
    package = tmp_path / "repository" / "package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("")
    git(package.parent, "init", "-q")
    git(package.parent, "add", ".")
    git(package.parent, "commit", "-q", "-m", "first")
    return package


def finding(name: str) -> Finding:
    return next(f for f in doctor() if f.name == name)


def test_environment_is_plain_and_complete():
    found = environment()
    assert json.loads(json.dumps(found)) == found
    assert found["torch"].startswith(torch.__version__.split("+")[0])
    assert found["sacl_fast"] == __version__
    assert found["python"] == sys.version.split()[0]
    for key in ("platform", "cpu_count", "torchvision", "timm", "command"):
        assert found[key], key
    for key in ("triton", "cuda", "cudnn", "gpus", "git_commit", "git_dirty"):
        assert key in found


def test_commit_and_changes(checkout: Path):
    commit, dirty = git_state(checkout)
    assert commit is not None
    assert len(commit) == 40
    assert dirty is False
    (checkout / "untracked.txt").write_text("")
    assert git_state(checkout) == (commit, False)
    (checkout / "__init__.py").write_text("changed = True\n")
    assert git_state(checkout) == (commit, True)


def test_no_checkout(tmp_path: Path):
    assert git_state(tmp_path) == (None, None)
    assert git_state(tmp_path / "missing") == (None, None)


def test_a_folder_that_lies_in_somebody_elses_repository(checkout: Path):
    installed = checkout.parent / ".venv" / "sacl_fast"
    installed.mkdir(parents=True)
    (installed / "__init__.py").write_text("")
    assert git_state(installed) == (None, None)


def test_no_git(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("PATH", "")
    assert git_state(checkout) == (None, None)
    assert environment()["git_commit"] is None


def test_a_git_hooks_variables_do_not_mislead(checkout: Path, monkeypatch: pytest.MonkeyPatch):
    expected = git_state(checkout)
    monkeypatch.setenv("GIT_DIR", "/nonexistent")
    assert git_state(checkout) == expected


def test_doctor_covers_packages_devices_and_every_operator():
    findings = doctor()
    names = {f.name for f in findings if f.section == "packages"}
    assert names == {
        "torch",
        "torchvision",
        "timm",
        "Triton",
        "sacl_fast._C",
        "NVIDIA DALI",
        "NVIDIA apex",
        "ONNX",
        "ONNX Runtime",
        "TensorBoard",
        "torchmetrics",
        "Weights & Biases",
    }
    assert torch.__version__.split("+")[0] in finding("torch").detail
    assert all(f.remedy for f in findings if f.section == "packages" and f.state != "ok")
    assert not any(f.remedy for f in findings if f.state == "ok")
    devices = [f for f in findings if f.section == "devices"]
    assert ("no GPU" in devices[0].detail) == (not torch.cuda.is_available())
    for operator in OPERATORS:
        backend, reason = resolve("auto", operator, torch.device("cpu"))
        found = next(f for f in findings if f.name == f"{operator} on cpu")
        assert found.detail.startswith(f"{backend}: {reason}")
        assert (backend != "torch") == ("self-check passed 20" in found.detail)


@pytest.mark.skipif(compiled.obstacle() is not None, reason=str(compiled.obstacle()))
def test_an_operator_that_failed_its_self_check_stands_out(monkeypatch: pytest.MonkeyPatch):
    passed = {f"{op} cpu": Outcome("passed", when=1e9) for op in OPERATORS}
    failed = Outcome("failed", "its process ended by SIGILL", 1e9)
    monkeypatch.setattr(self_check, "_found", {"cpu": {**passed, "slim_add cpu": failed}})
    found = {f.name: f for f in doctor()}
    assert found["slim_gate on cpu"].state == "ok"
    wrong = found["slim_add on cpu"]
    assert wrong.state == "broken" and "SACL_FAST_SELF_CHECK=again" in wrong.remedy
    assert wrong.detail.startswith("torch: ")
    assert "self-check failed 2001-09-0" in wrong.detail and "SIGILL" in wrong.detail


@pytest.mark.parametrize(
    ("name", "hidden", "command"),
    [
        ("NVIDIA DALI", "nvidia.dali", "pip install 'sacl-fast[dali]'"),
        ("ONNX Runtime", "onnxruntime", "pip install 'sacl-fast[export]'"),
        ("TensorBoard", "tensorboard", "pip install 'sacl-fast[log]'"),
        ("Weights & Biases", "wandb", "pip install 'sacl-fast[log]'"),
        ("sacl_fast._C", "sacl_fast._C", "SACL_FAST_BUILD_EXT=1"),
    ],
)
def test_what_is_missing_comes_with_its_remedy(
    name: str, hidden: str, command: str, monkeypatch: pytest.MonkeyPatch
):
    findable = module._findable
    monkeypatch.setattr(module, "_findable", lambda m: m != hidden and findable(m))
    found = finding(name)
    assert found.state == "missing"
    assert command in found.remedy


def test_what_is_broken_says_why(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "wandb.py").write_text("raise OSError('libx.so:\\n  not found')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    found = finding("Weights & Biases")
    assert found.state == "broken"
    assert found.detail == "does not import: OSError: libx.so: not found"


def test_compiled_module_shows_its_build(monkeypatch: pytest.MonkeyPatch):
    fake: Any = types.ModuleType("sacl_fast._C")
    fake.build_info = lambda: dict(
        version="0.1.0", cxx="gcc 12.2.0", cuda="13.0", architectures=["sm_80", "sm_90a"]
    )
    monkeypatch.setitem(sys.modules, "sacl_fast._C", fake)
    monkeypatch.setattr(module, "_findable", lambda m: True)
    assert module._compiled_module().detail == "0.1.0, gcc 12.2.0, CUDA 13.0 for sm_80, sm_90a"


def make_apex(folder: Path, *, nvidia: bool, extensions: bool) -> None:
    (folder / "apex").mkdir()
    # The unrelated one may do anything when it is imported, so it must not be.
    start = "" if nvidia else "raise SystemExit('imported')"
    (folder / "apex" / "__init__.py").write_text(start)
    if nvidia:
        (folder / "apex" / "optimizers").mkdir()
        (folder / "apex" / "optimizers" / "__init__.py").write_text("")
    if extensions:
        (folder / "amp_C.py").write_text("")


@pytest.mark.parametrize(
    ("nvidia", "extensions", "state", "detail"),
    [
        (False, False, "missing", "unrelated package"),
        (True, False, "missing", "no amp_C"),
        (True, True, "ok", ""),
    ],
)
def test_apex_is_known_by_its_submodules(
    nvidia: bool,
    extensions: bool,
    state: str,
    detail: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    make_apex(tmp_path, nvidia=nvidia, extensions=extensions)
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)
    try:
        found = module._apex()
    finally:
        for name in set(sys.modules) - before:
            del sys.modules[name]
    assert found.state == state
    assert detail in found.detail
    assert ("NVIDIA's" in found.remedy) == (state != "ok")


def test_printed_at_80_columns_without_control_codes(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("COLUMNS", "80")
    stream = io.StringIO()
    print_doctor(stream)
    text = stream.getvalue()
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 80
    for part in ("Packages", "Devices", "Backends", "NVIDIA apex", f"sacl-fast {__version__}"):
        assert part in text
    for operator in OPERATORS:
        assert f"{operator} on cpu" in text
