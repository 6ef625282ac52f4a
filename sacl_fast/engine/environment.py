"""What a run was made with (``environment``), and what this machine can do (``doctor``).

The first is saved with every run, so that a result can be traced to versions and a commit. The
second answers, before a run, what is installed, what is missing and how to get it, and which
backend every operator would take and why.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.machinery import PathFinder
from pathlib import Path
from typing import Any, Literal, TextIO

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text

from sacl_fast._version import __version__
from sacl_fast.checks import counted
from sacl_fast.config.choices import Backend
from sacl_fast.machine import usable_cores
from sacl_fast.ops.backend import (
    FUSED_OPERATORS,
    OPERATORS,
    Check,
    outcome_of_self_check,
    resolve,
)
from sacl_fast.ops.self_check import Outcome, is_off

# A git hook sets these, and they would point git at the hook's repository.
_GIT_VARIABLES = ("GIT_DIR", "GIT_WORK_TREE", "GIT_INDEX_FILE", "GIT_PREFIX")


def environment() -> dict[str, Any]:
    """Versions, hardware, commit and command line, as plain values; None for what is not there."""
    commit, dirty = git_state(Path(__file__).resolve().parent.parent)
    return {
        "sacl_fast": __version__,
        "git_commit": commit,
        "git_dirty": dirty,
        "command": shlex.join(sys.argv),
        "python": platform.python_version(),
        "platform": platform.platform(),
        "cpu_count": os.cpu_count(),
        "cpu_usable": usable_cores(),
        **{name: _version(name) for name in ("torch", "torchvision", "timm", "triton", "numpy")},
        "dali": _version("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version(),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
    }


def git_state(folder: Path) -> tuple[str | None, bool | None]:
    """Commit of the checkout that ``folder`` is part of, and whether tracked files differ from it.

    Both None where there is no git or no checkout, or where the folder merely lies inside one
    (a virtual environment in somebody's repository).
    """
    tracked = _git(folder, "ls-files", "--error-unmatch", "__init__.py")
    commit = _git(folder, "rev-parse", "HEAD")
    if not tracked or not commit:
        return None, None
    changes = _git(folder, "status", "--porcelain", "--untracked-files=no")
    return commit, None if changes is None else bool(changes)


def _git(folder: Path, *arguments: str) -> str | None:
    variables = {k: v for k, v in os.environ.items() if k not in _GIT_VARIABLES}
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *arguments],
            capture_output=True,
            text=True,
            timeout=20,
            env=variables,
        )
    except (OSError, subprocess.TimeoutExpired):  # no git; a checkout on a dead network disk
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def _version(*distributions: str) -> str | None:
    """The version of the first of these that is installed."""
    for name in distributions:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return None


State = Literal["ok", "missing", "broken"]


@dataclass(frozen=True, kw_only=True)
class Finding:
    """One line of the doctor's report."""

    section: Literal["packages", "devices", "backends"]
    name: str
    state: State
    detail: str
    """Version, or what is wrong."""
    purpose: str = ""
    remedy: str = ""
    """What to do about it, where there is something to do."""


def doctor() -> list[Finding]:
    """What is installed and what for, the devices, and the backend of every operator."""
    return [*_packages(), *_devices(), *_backends()]


def print_doctor(stream: TextIO | None = None) -> None:
    """Print the doctor's findings as tables, in colour where the stream is a terminal."""
    console = Console(file=stream or sys.stdout, highlight=False)
    findings = doctor()
    console.print(
        f"sacl-fast {__version__}, Python {platform.python_version()}, {platform.system()} "
        f"{platform.machine()}, {counted(usable_cores(), 'CPU core')}"
    )
    for section in ("packages", "devices", "backends"):
        console.print(f"\n[bold]{section.capitalize()}[/bold]")
        console.print(_table([f for f in findings if f.section == section]))


_MARKS: dict[State, tuple[str, str]] = {
    "ok": ("ok", "green"),
    "missing": ("-", "yellow"),
    "broken": ("!", "bold red"),
}


def _table(findings: list[Finding]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(min_width=2)
    table.add_column(no_wrap=True)
    table.add_column()
    for finding in findings:
        mark, style = _MARKS[finding.state]
        text = Text(finding.detail, style="" if finding.state == "ok" else style)
        if finding.purpose:
            text.append(f"  {finding.purpose}", style="not bold default dim")
        if finding.remedy:
            text.append(f"\nto have it: {finding.remedy}", style="not bold cyan")
        table.add_row(Text(mark, style=style), Text(finding.name, style="bold"), text)
    return table


@dataclass(frozen=True)
class _Package:
    name: str
    module: str
    distributions: tuple[str, ...]
    purpose: str
    remedy: str


_OPTIONAL = "pip install 'sacl-fast[{}]'"
_REINSTALL = "pip install --force-reinstall sacl-fast"
_PACKAGES = (
    _Package("torch", "torch", ("torch",), "", _REINSTALL),
    _Package("torchvision", "torchvision", ("torchvision",), "image data", _REINSTALL),
    _Package("timm", "timm", ("timm",), "the encoders", _REINSTALL),
    _Package(
        "Triton",
        "triton",
        ("triton", "pytorch-triton"),
        "GPU operators (backend triton)",
        "pip install triton (Linux; comes with torch's CUDA builds)",
    ),
    _Package(
        "NVIDIA DALI",
        "nvidia.dali",
        ("nvidia-dali-cuda130", "nvidia-dali-cuda120"),
        "fast decoding and augmentation, on the GPU and the CPU",
        _OPTIONAL.format("dali") + ", or nvidia-dali-cuda120 for CUDA 12",
    ),
    _Package("ONNX", "onnxscript", ("onnx",), "sacl-fast export", _OPTIONAL.format("export")),
    _Package(
        "ONNX Runtime",
        "onnxruntime",
        ("onnxruntime",),
        "sacl-fast export",
        _OPTIONAL.format("export"),
    ),
    _Package(
        "torchmetrics",
        "torchmetrics",
        ("torchmetrics",),
        "sacl-fast finetune on VOC 2007",
        _OPTIONAL.format("eval"),
    ),
    _Package(
        "TensorBoard",
        "tensorboard",
        ("tensorboard",),
        "curves in the browser (log.tensorboard)",
        _OPTIONAL.format("log"),
    ),
    _Package(
        "Weights & Biases",
        "wandb",
        ("wandb",),
        "curves on a server (log.wandb)",
        _OPTIONAL.format("log"),
    ),
)


def _packages() -> Iterator[Finding]:
    for package in _PACKAGES:
        yield _package(package)
    yield _compiled_module()
    yield _apex()


def _package(package: _Package) -> Finding:
    def finding(state: State, detail: str) -> Finding:
        return Finding(
            section="packages",
            name=package.name,
            state=state,
            detail=detail,
            purpose=package.purpose,
            remedy="" if state == "ok" else package.remedy,
        )

    if not _findable(package.module):
        return finding("missing", "not installed")
    if (obstacle := _import_obstacle(package.module)) is not None:
        return finding("broken", f"does not import: {obstacle}")
    version = _version(*package.distributions) or "version unknown"
    if package.module == "torch":
        version += f" (CUDA {torch.version.cuda})" if torch.version.cuda else " (without CUDA)"
    return finding("ok", version)


def _compiled_module() -> Finding:
    name, purpose = "sacl_fast._C", "C++ and CUDA operators (backends cpu, cuda)"
    remedy = (
        "SACL_FAST_BUILD_EXT=1 pip install --no-build-isolation SOURCES, with a C++ compiler "
        "(and nvcc), torch, pybind11 and ninja installed"
    )
    if not _findable(name):
        return Finding(
            section="packages",
            name=name,
            state="missing",
            detail="not built",
            purpose=purpose,
            remedy=remedy,
        )
    if (obstacle := _import_obstacle(name)) is not None:
        return Finding(
            section="packages",
            name=name,
            state="broken",
            detail=f"does not import: {obstacle}",
            purpose=purpose,
            remedy=remedy,
        )
    info = sys.modules[name].build_info()
    cuda = f"CUDA {info['cuda']} for {', '.join(info['architectures'])}" if info["cuda"] else ""
    detail = ", ".join(filter(None, (info["version"], info["cxx"], cuda or "without CUDA")))
    return Finding(section="packages", name=name, state="ok", detail=detail, purpose=purpose)


def _apex() -> Finding:
    """NVIDIA apex, known by its submodules; nothing of another ``apex`` is run to find out."""
    spec = importlib.util.find_spec("apex")
    folders = list(spec.submodule_search_locations or []) if spec else []
    nvidia = PathFinder.find_spec("optimizers", folders) is not None if folders else False
    state: State = "missing"
    if spec is None:
        detail = "not installed"
    elif not nvidia:
        detail = "the apex that is installed is an unrelated package; pip uninstall apex removes it"
    elif not _findable("amp_C"):
        detail = "installed without its CUDA extensions (no amp_C)"
    elif obstacle := _import_obstacle("apex.optimizers") or _import_obstacle("amp_C"):
        state, detail = "broken", f"does not import: {obstacle}"
    else:
        state, detail = "ok", _version("apex") or "version unknown"
    return Finding(
        section="packages",
        name="NVIDIA apex",
        state=state,
        detail=detail,
        purpose="fused optimisers (backend apex)",
        remedy=""
        if state == "ok"
        else "build github.com/NVIDIA/apex with APEX_CPP_EXT=1 APEX_CUDA_EXT=1, or use NVIDIA's "
        "PyTorch containers; never pip install apex",
    )


def _findable(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ModuleNotFoundError:  # not even its parent package
        return False


def _import_obstacle(module: str) -> str | None:
    """Why a module that is there cannot be imported; None if it can."""
    try:
        importlib.import_module(module)
    except Exception as error:  # a broken package raises anything, and saying what is the point
        return " ".join(f"{type(error).__name__}: {error}".split())
    return None


def _devices() -> Iterator[Finding]:
    count = torch.cuda.device_count()
    for i in range(count):
        gpu = torch.cuda.get_device_properties(i)
        yield Finding(
            section="devices",
            name=f"cuda:{i}",
            state="ok",
            detail=f"{gpu.name}, compute capability {gpu.major}.{gpu.minor}, "
            f"{gpu.total_memory / 2**30:.0f} GiB",
        )
    if not count:
        why = "no driver or no device" if torch.version.cuda else "this torch is built without CUDA"
        detail = f"no GPU ({why}): everything runs on the CPU"
        yield Finding(section="devices", name="cuda", state="missing", detail=detail)


def _backends() -> Iterator[Finding]:
    """What ``auto`` gives for the views and every operator, on the CPU and on the first GPU."""
    from sacl_fast.config import Config
    from sacl_fast.data.loading.open import resolve_loader

    devices = [torch.device("cpu")]
    if torch.cuda.is_available():
        devices.append(torch.device("cuda", 0))
    for operator, checks in OPERATORS.items():
        for device in devices:
            backend, reason = resolve("auto", operator, device)
            outcomes = _self_checks(operator, checks, device)
            yield _backend(f"{operator} on {device.type}", f"{backend}: {reason}", outcomes)
    for operator, checks in FUSED_OPERATORS.items():
        for device in devices[1:]:
            if outcomes := _self_checks(operator, checks, device):
                yield _backend(f"{operator} on {device.type}", "in fused passes", outcomes)
    for device in devices:
        for packed, of in ((False, "files"), (True, "pixels")):
            loader, reason = resolve_loader(Config(), device, packed=packed)
            name = f"views of {of} on {device.type}"
            yield Finding(section="backends", name=name, state="ok", detail=f"{loader}: {reason}")


_AGAIN = "SACL_FAST_SELF_CHECK=again checks anew, as after a change of driver or machine"


def _backend(name: str, detail: str, outcomes: dict[str, Outcome]) -> Finding:
    several = len(outcomes) > 1
    said = [
        f"{of}'s {found}" if several else str(found)
        for of, found in outcomes.items()
        if found.state != "not checked" or f"{found.obstacle}" not in detail
    ]
    wrong = any(found.state == "failed" for found in outcomes.values())
    unsure = any(found.state == "not checked" for found in outcomes.values()) and not is_off()
    return Finding(
        section="backends",
        name=name,
        state="broken" if wrong else "missing" if unsure else "ok",
        detail="; ".join([detail, *said]),
        remedy=_AGAIN if wrong else "",
    )


def _self_checks(
    operator: str, checks: dict[Backend, Check], device: torch.device
) -> dict[str, Outcome]:
    """Of each backend that can run on the device."""
    return {
        backend: outcome_of_self_check(operator, backend, device)
        for backend, check in checks.items()
        if check(device) is None
    }
