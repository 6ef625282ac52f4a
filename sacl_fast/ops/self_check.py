"""Whether an operator that is not plain PyTorch is right on this machine.

Kernels are tested on the machines of whoever writes them. So before one is used on another, it is
held against plain PyTorch there, on a few small cases (``sacl_fast.verification``), and ``auto``
takes it only where it passed. A wrong kernel may end its process, or that process's use of the GPU:
so a process of its own checks all operators of a device, when the first of them is asked for. It
takes little longer than importing torch does, a few seconds.

What it found is remembered in the user's cache folder, a file for each device and build (``_about``
is what that means). Processes that ask at the same time, as the ranks of a run, wait for the first
one of them. Where nothing can be written, each process checks for itself.

``SACL_FAST_SELF_CHECK=again`` checks anew, once a run; ``off`` takes every operator unchecked.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import os
import platform
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict
from functools import cache
from pathlib import Path

import torch

from sacl_fast._version import __version__
from sacl_fast.errors import UserError
from sacl_fast.files import user_cache, whole_file
from sacl_fast.ops.self_check_process import ALL, VARIABLE, Outcome, checked

logger = logging.getLogger(__name__)

_KEPT = 50  # files; a build or a version that is gone leaves its own behind
_STARTED = time.time()

# Of each device, what was found of "OP BACKEND".
_found: dict[str, dict[str, Outcome]] = {}
_warned: set[tuple[str, str]] = set()
_lock = threading.Lock()


def is_off() -> bool:
    """Whether operators are to be taken unchecked."""
    return _asked() == "off"


def outcome_of(
    op: str, backend: str, device: torch.device, others: Callable[[], Iterable[str]]
) -> Outcome:
    """What came of the check, which is made where it was not yet.

    Args:
        others: names ``"OP BACKEND"`` of all that can run on the device, to be checked with it.
    """
    if is_off():
        return Outcome("not checked", f"{VARIABLE} is off")
    device, name = indexed(device), f"{op} {backend}"
    known = _found.setdefault(str(device), {})
    if name not in known:
        with _lock:
            if name not in known:
                known.update(_remembered_or_checked([name, *others()], device))
    return known[name]


def warn_once(op: str, backend: str, device: torch.device, outcome: Outcome, instead: str) -> None:
    """Tell that an operator is not used, why, and what happens instead; once in a process, and of
    the ranks on a machine the first one for all. Of all that could not be checked for one reason,
    the first one stands for the others."""
    failed = outcome.state == "failed"
    said = f"{op} {backend}" if failed else outcome.why, str(indexed(device))
    if said in _warned:
        return
    _warned.add(said)
    is_first = os.environ.get("LOCAL_RANK", "0") == "0"
    logger.log(
        logging.WARNING if is_first else logging.DEBUG,
        "%s: backend %s is not used on %s%s, since %s; %s (%s)",
        op,
        backend,
        device_name(device),
        "" if failed else ", nor what else is not checked",
        outcome.obstacle,
        instead,
        f"{VARIABLE}=again checks anew" if failed else f"{VARIABLE}=off uses it unchecked",
    )


def _asked() -> str:
    given = os.environ.get(VARIABLE, "")
    if given not in ("", "again", "off"):
        raise UserError(f"{VARIABLE} is {given!r}; again, off, or not set works")
    return given


def indexed(device: torch.device) -> torch.device:
    """The device that is meant, by its number."""
    if device.type == "cuda" and device.index is None:
        return torch.device("cuda", torch.cuda.current_device())
    return device


# --- remembering ----------------------------------------------------------------------------------


def _remembered_or_checked(names: Sequence[str], device: torch.device) -> dict[str, Outcome]:
    about = _about(device)
    file = _file(about)
    with _alone(file):
        known = _read(file)
        wanted = [name for name in dict.fromkeys(names) if name not in known]
        if not wanted:
            return known
        logger.info("checking %d operators on %s, once for this build", len(wanted), about["name"])
        known |= checked(wanted, device)
        _write(file, about, known)
    return known


def _file(about: dict[str, str]) -> Path | None:
    folder = user_cache()
    if folder is None:
        return None
    key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
    return folder / "self-checks" / f"{key}.json"


@contextlib.contextmanager
def _alone(file: Path | None) -> Iterator[None]:
    """Within it, no other process is between reading and writing the file; one that stays there for
    longer than its checks may take is not waited for, nor where there is no file to lock."""
    with contextlib.ExitStack() as opened:
        if file is not None:
            with contextlib.suppress(OSError):
                file.parent.mkdir(parents=True, exist_ok=True)
                lock = opened.enter_context(open(file.with_suffix(".lock"), "wb"))
                end = time.monotonic() + 2 * ALL
                while not _locked(lock.fileno()) and time.monotonic() < end:
                    time.sleep(0.1)
        yield


def _locked(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _read(file: Path | None) -> dict[str, Outcome]:
    """What is remembered; nothing of a file that is not ours, or is damaged."""
    if file is None:
        return {}
    try:
        found = json.loads(file.read_bytes())["found"]
        outcomes = {str(name): Outcome(**fields) for name, fields in found.items()}
    except (OSError, ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return {}
    oldest = _STARTED if _asked() == "again" else 1.0
    return {name: outcome for name, outcome in outcomes.items() if _counts(outcome, oldest)}


def _counts(outcome: Outcome, oldest: float) -> bool:
    plain = isinstance(outcome.when, float) and isinstance(outcome.why, str)
    if not plain or outcome.state not in ("passed", "failed"):
        return False
    return oldest <= outcome.when <= time.time() + 86_400


def _write(file: Path | None, about: dict[str, str], known: dict[str, Outcome]) -> None:
    if file is None:
        return
    lasting = {name: asdict(found) for name, found in known.items() if found.state != "not checked"}
    try:
        with whole_file(file) as opened:
            opened.write(json.dumps({"about": about, "found": lasting}, indent=1).encode())
        files = sorted(file.parent.glob("*.json"), key=lambda path: path.stat().st_mtime)
        for old in files[:-_KEPT]:
            old.unlink(missing_ok=True)
            old.with_suffix(".lock").unlink(missing_ok=True)
    except OSError as error:
        logger.debug("cannot remember what the self-check found: %s", error)


def _about(device: torch.device) -> dict[str, str]:
    """What the outcome may depend on."""
    versions = {name: _version(name) for name in ("numpy", "pillow", "torchvision", "triton")}
    return {
        "name": device_name(device),
        "device": _hardware(device),
        "code": _code(),
        "sacl-fast": __version__,
        "python": platform.python_version(),
        "torch": f"{torch.__version__}, CUDA {torch.version.cuda}",
        "interpreted": os.environ.get("TRITON_INTERPRET", ""),
        **versions,
    }


def _version(distribution: str) -> str:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return "none"


@cache
def _code() -> str:
    """A digest of the compiled module, and of the sources that call it and that Triton compiles."""
    package = Path(__file__).parent.parent
    files = [*package.glob("_C*.so")]
    for folder in ("ops", "verification", "data/views"):
        files += package.glob(f"{folder}/*.py")
    kernels = importlib.util.find_spec("sacl_kernels")
    for folder in (kernels.submodule_search_locations or []) if kernels else []:
        files += Path(folder).glob("*.py")
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode())
        with contextlib.suppress(OSError):
            digest.update(file.read_bytes())
    return digest.hexdigest()


def device_name(device: torch.device) -> str:
    """As people call it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return _of_cpu("model name") or platform.machine() or device.type


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        with contextlib.suppress(OSError):
            driver, *_ = Path("/proc/driver/nvidia/version").read_text().splitlines()
            return f"sm_{major}{minor}, {driver}"
        return f"sm_{major}{minor}"
    instructions = _of_cpu("flags") or _of_cpu("Features")
    return f"{platform.machine()}, {torch.backends.cpu.get_cpu_capability()}, {instructions}"


@cache
def _of_cpu(field: str) -> str:
    """A line of what Linux says of the first CPU."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            name, _, value = line.partition(":")
            if name.strip() == field:
                return value.strip()
    return ""
