"""Everything that a machine with a GPU should show, in stages: correctness first, then speed.

    python benchmarks/on_gpu.py --out results                          # all stages, 15 minutes
    python benchmarks/on_gpu.py --out results --stages B C --minutes 5
    python benchmarks/on_gpu.py --out results --cifar cifar10.tar.gz --photos imagenet-sample.tar

=====  ==========================================================================================
stage  what
=====  ==========================================================================================
A      the two ceilings (a large copy, a large product), the build, all gpu tests, memcheck
B      kernels: norm and activation, depthwise and 1x1 convolutions, views, the loss
C      whole steps: the pseudocode, eager and compiled, then ours with each feature added
D      data: the loaders stage by stage, and how long training waits for them
E      CIFAR-10, MobileNet-V1: SACL-XD, the log loss, Barlow Twins; equal epochs, those that fit
=====  ==========================================================================================

Each task is a process of its own with a time limit, and none ends another. It writes a log, and
most a JSON file, into the results folder; ``summary.json`` is written anew after each, and the last
thing printed is a table. The exit status is 1 where a task failed.

Only the standard library and torch are needed to start. ``--wheels`` names a folder of wheels for
what else is missing (tyro and what it needs). The compiled module is built for the device's own
architecture, unless one that has code for it lies in the tree.

``--device cpu`` runs what needs no GPU at small sizes, to see that the tasks themselves work.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
STAGES = {"A": "ceilings, build, tests", "B": "kernels", "C": "step", "D": "data", "E": "training"}
ENCODERS = ("mobilenetv1_100", "mobilenetv3_large_100", "efficientnet_b0", "resnet50")
METHODS = {
    "XD": "cifar10",
    "XD, log loss": "cifar10 --loss.distillation log",
    "Barlow Twins": "barlow_twins_cifar10",
}

Headline = Callable[[dict[str, Any]], str]


@dataclass(frozen=True)
class Task:
    """A command of a stage."""

    stage: str
    name: str
    command: Sequence[str]
    limit: float
    """Seconds, after which it is killed."""
    headline: Headline | None = None
    """Of the JSON file ``NAME.json`` that the command writes; None: the last line of its log."""
    needs: str = ""
    """What is missing for it here; it is left out and says so."""
    environment: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Outcome:
    stage: str
    name: str
    seconds: float
    status: str
    """``ok``, ``failed (exit status)``, ``over its limit`` or ``left out``."""
    headline: str


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--out", type=Path, default=ROOT / "benchmarks/results/gpu")
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--only", nargs="+", metavar="TASK", help="only these tasks")
    parser.add_argument("--minutes", type=float, default=15.0, help="for all of it")
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--wheels", type=Path, help="folder of wheels to install first")
    parser.add_argument("--cifar", type=Path, help="CIFAR-10: folder or archive of images")
    parser.add_argument("--photos", type=Path, help="folder or archive of full-size JPEGs")
    options = parser.parse_args()
    options.out.mkdir(parents=True, exist_ok=True)
    end = time.monotonic() + 60 * options.minutes
    if options.wheels is not None:
        install(options.wheels, options.out / "site")
    outcomes: list[Outcome] = []
    for task in tasks(options):
        if task.stage not in options.stages or (options.only and task.name not in options.only):
            continue
        left = end - time.monotonic()
        outcome = run(task, options.out, left)
        print_rows([outcome])
        outcomes.append(outcome)
        write_summary(options.out, outcomes)
    if "E" in options.stages and not options.only:
        outcomes.append(train(options, end - time.monotonic()))
        write_summary(options.out, outcomes)
    print()
    print_rows(outcomes)
    failed = [o for o in outcomes if o.status not in ("ok", "left out")]
    sys.exit(1 if failed else 0)


# --- the tasks ------------------------------------------------------------------------------------


def tasks(options: argparse.Namespace) -> Iterable[Task]:
    """Those of stages A to D, in order."""
    on_gpu, out = options.device == "cuda", options.out.resolve()
    needs_gpu = "" if on_gpu else "a CUDA device"

    def bench(
        stage: str, name: str, limit: float, program: str, *arguments: str, **more: Any
    ) -> Task:
        command = [sys.executable, f"benchmarks/{program}.py", *arguments]
        return Task(stage, name, [*command, "--json", str(out / f"{name}.json")], limit, **more)

    where = ("--device", options.device)
    yield bench("A", "ceilings", 60, "bench_ceilings", *where, headline=of_ceilings)
    if on_gpu:
        yield Task("A", "build", build_command(), 240, environment=own_architecture())
    yield Task("A", "doctor", [sys.executable, "-m", "sacl_fast", "doctor"], 150)
    pytest = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    yield Task(
        "A", "tests", [*pytest, "-m", "gpu", *parallel(8), "tests"], 240, needs=needs_gpu
    )  # fmt: skip
    sanitized = ["compute-sanitizer", "--tool", "memcheck", "--error-exitcode", "9", *pytest]
    yield Task(
        "A",
        "memcheck",
        [*sanitized, "-m", "gpu", "tests/cuda/test_cuda_graph.py"],
        120,
        needs=needs_gpu or ("" if shutil.which("compute-sanitizer") else "compute-sanitizer"),
        # Without torch's cache, in which an access beyond one tensor would meet another.
        environment={"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    )

    kind = (*where, "--dtype", "bfloat16" if on_gpu else "float32", "--batch", batch(options, 256))
    brief = ("--seconds", "0.1" if on_gpu else "0.02")
    for name in ("batch_norm_act", "depthwise_conv", "slim_pointwise"):
        yield bench("B", name, 120, f"bench_{name}", *kind, *brief, headline=of_rows)
    yield bench("B", "augment", 120, "bench_augment", *kind, *brief, headline=of_views)
    encoders = () if on_gpu else ("--encoders", "resnet20")
    yield bench("B", "lars", 120, "bench_lars", *where, *brief, *encoders, headline=of_rows)
    sizes = ("--n", "256", "--d", "2048", "8192") if on_gpu else ("--n", "32", "--d", "64")
    loss = ("bench_xcorr_loss", *where, *sizes, *brief)
    yield bench("B", "xcorr_loss", 180, *loss, headline=of_loss)

    layouts = [(encoder, 224) for encoder in (ENCODERS if on_gpu else ENCODERS[:1])]
    for encoder, size in (*layouts, (ENCODERS[0], 32)):
        more = step(options, encoder, size)
        yield bench("C", f"step_{encoder}_{size}", 120, *more, headline=of_step)
    compiled = step(options, ENCODERS[0], 224, "pseudocode", "compiled")
    yield bench(
        "C", f"step_{ENCODERS[0]}_compiled", 240, *compiled, headline=of_step, needs=needs_gpu
    )

    for name, preset, root in (
        ("data_photos", "imagenet1k", options.photos),
        ("data_cifar", "cifar10", options.cifar),
    ):
        amount = ("--images", "2048", "--train", "20") if on_gpu else ("--images", "16")
        data = ("bench_data", "--preset", preset, "--rounds", "1", *amount, *tiny(options))
        given = ("--stages", "decode", "all", "--encoder.name", ENCODERS[0])
        given += ("--data.root", str(root), "--data.labels", "none")
        needs = "" if root is not None else f"--{name.removeprefix('data_')}"
        yield bench("D", name, 210, *data, *given, headline=of_data, needs=needs)


def step(options: argparse.Namespace, encoder: str, size: int, *variants: str) -> tuple[str, ...]:
    """A waterfall of the step of ``encoder``, at 224 px or at CIFAR's 32."""
    on_gpu = options.device == "cuda"
    preset = "cifar10" if size == 32 else "imagenet100"
    steps = ("--steps", "10" if on_gpu else "1")
    given = ("--preset", preset, "--encoder.name", encoder, "--device", options.device)
    # torch.compile takes minutes: once is enough, in a task of its own.
    variants = variants or (
        "pseudocode",
        "plain",
        "kernels",
        *(["trial"] if on_gpu else []),
        *("skip", "dense"),
        *(["fused"] if on_gpu else []),
    )
    return ("bench_step", "--waterfall", *steps, *given, *tiny(options), "--variants", *variants)


def tiny(options: argparse.Namespace) -> tuple[str, ...]:
    """Settings of a small run, for the CPU."""
    if options.device == "cuda":
        return ()
    sizes = "--views.size 32 --batch-size 8 --projector.hidden 64 --projector.out 64"
    return (*sizes.split(), "--encoder.width", "0.25")


def batch(options: argparse.Namespace, size: int) -> str:
    return str(size if options.device == "cuda" else 1)


def train(options: argparse.Namespace, left: float) -> Outcome:
    """Stage E: each method for the same epochs, as many as fit into the time that is left."""
    out, on_gpu = options.out.resolve(), options.device == "cuda"
    measured = read_json(out / f"step_{ENCODERS[0]}_32.json")
    speed = best_speed(measured) if measured else 5_000.0
    # Barlow Twins takes half the time of the others. Half of all is starts, evaluations, waiting.
    epochs = max(1, int(0.5 * min(left, 600) * speed / 50_000 / 2.5)) if on_gpu else 1
    given = f"--evaluate knn linear-fast --minutes {left / 100} --epochs {epochs} --eval.every 0"
    given += f" --device {options.device} --data.source folder --seeds {'0 1 2' if on_gpu else '0'}"
    if not on_gpu:
        given += " --data.limit 64 --eval.bank 32 --eval.queries 16 --eval.k 5"
    cases = [word for method in METHODS.items() for word in ("--case", *method)]
    command = [sys.executable, "benchmarks/bench_learning.py", *cases, *given.split()]
    command += ["--json", str(out / "learning.json"), "--out", str(out / "cifar10")]
    command += ["--data.root", str(options.cifar), *tiny(options)]
    needs = "" if options.cifar is not None else "--cifar"
    task = Task("E", "learning", command, 600, headline=of_learning, needs=needs)
    return run(task, out, left)


def parallel(workers: int) -> list[str]:
    """pytest's option, where pytest-xdist is installed."""
    return ["-n", str(workers)] if importlib.util.find_spec("xdist") else []


def build_command() -> list[str]:
    """Builds the compiled module where none that imports has code for this device."""
    found = (
        "import torch; from sacl_fast.ops import compiled;"
        "raise SystemExit(compiled.cuda_obstacle(torch.device('cuda', 0)) is not None)"
    )
    build = f"{sys.executable} setup.py build_ext --inplace"
    return ["bash", "-c", f'{sys.executable} -c "{found}" && echo "built before" || {build}']


def own_architecture() -> dict[str, str]:
    import torch

    if not torch.cuda.is_available():
        return {}
    major, minor = torch.cuda.get_device_capability()
    suffix = "a" if (major, minor) == (9, 0) else ""
    return {"TORCH_CUDA_ARCH_LIST": f"{major}.{minor}{suffix}", "SACL_FAST_BUILD_EXT": "1"}


# --- their figures --------------------------------------------------------------------------------


def of_ceilings(result: dict[str, Any]) -> str:
    bandwidth, rate = result["bytes_per_s"] / 1e12, result["flop_per_s"] / 1e12
    return f"{result['device']}: copy {bandwidth:.2f} TB/s, product {rate:.1f} TFLOP/s"


def of_rows(result: dict[str, Any]) -> str:
    """Of kernels that are bound by memory: the share of the copy's bandwidth, and torch's time."""
    figures = [f for row in result["rows"] for f in row.values() if isinstance(f, dict)]
    shares = sorted(f["bandwidth_share"] for f in figures if "bandwidth_share" in f)
    ratios = sorted(f["times_as_fast"] for f in figures if "times_as_fast" in f)
    if not shares or not ratios:
        return "no figures"
    return (
        f"{shares[0]:.0%} to {shares[-1]:.0%} of the copy (median {shares[len(shares) // 2]:.0%}); "
        f"{ratios[0]:.1f} to {ratios[-1]:.1f}x torch"
    )


def of_views(result: dict[str, Any]) -> str:
    rows = result["rows"]
    return "; ".join(f"{row['case']}: {row['images_per_second']:,.0f} images/s" for row in rows)


def of_loss(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if row["method"] in ("ours", "eager")]
    times = {(row["method"], row["d"]): row["ms"]["p50"] for row in rows}
    sizes = sorted({row["d"] for row in rows})
    return "; ".join(
        f"D = {d}: {times['ours', d]:.3f} ms, {times['eager', d] / times['ours', d]:.0f}x eager"
        for d in sizes
    )


def of_step(result: dict[str, Any]) -> str:
    rows = [row for row in result["rows"] if "step_ms" in row]
    first, best = rows[0], min(rows, key=lambda row: row["step_ms"]["p50"])
    return (
        f"{best['name']}: {best['step_ms']['p50']:.1f} ms, {best['images_per_second']:,.0f} "
        f"images/s, {first['step_ms']['p50'] / best['step_ms']['p50']:.2f}x {first['name']}"
    )


def best_speed(result: dict[str, Any]) -> float:
    return max(row.get("images_per_second", 0.0) for row in result["rows"])


def of_data(result: dict[str, Any]) -> str:
    speeds = [
        f"{row['name']}: {row['images_per_second']:,.0f}"
        for row in result["rows"]
        if row["stage"] == "all"
    ]
    waits = [f"{row['name']}: {row['data_wait']:.0%}" for row in result["training"]]
    waiting = f"; {result['encoder']} waits, {', '.join(waits)}" if waits else ""
    return f"images/s, {', '.join(speeds)}{waiting}"


def of_learning(result: dict[str, Any]) -> str:
    rows = result["rows"]
    figures = [f"{row['case']} {row['knn']['dense']['top-1']:.1f}" for row in rows]
    return f"kNN top-1 after {rows[0]['steps']} steps, %: {', '.join(figures)}"


# --- running them ---------------------------------------------------------------------------------


def run(task: Task, out: Path, left: float) -> Outcome:
    """Run a task within its limit and the time that is left."""
    if task.needs:
        return Outcome(task.stage, task.name, 0.0, "left out", f"needs {task.needs}")
    if left < 5:
        return Outcome(task.stage, task.name, 0.0, "left out", "no time is left")
    limit, start = min(task.limit, left), time.monotonic()
    environment = {**os.environ, **task.environment, "PYTHONUNBUFFERED": "1"}
    paths = [str(ROOT), str(ROOT / "kernels"), str((out / "site").resolve())]
    environment["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    log = out / f"{task.name}.log"
    with log.open("wb") as file:
        process = subprocess.Popen(
            task.command,
            cwd=ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            code = process.wait(limit)
            status = "ok" if code == 0 else f"failed ({code})"
        except subprocess.TimeoutExpired:
            status = f"over its limit of {limit:.0f} s"
        # Its children too, whatever became of it.
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    seconds = time.monotonic() - start
    return Outcome(task.stage, task.name, seconds, status, headline(task, out, log))


def headline(task: Task, out: Path, log: Path) -> str:
    """What a task says in a line."""
    result = read_json(out / f"{task.name}.json") if task.headline else None
    if task.headline and result is not None:
        try:
            return task.headline(result)
        except (KeyError, IndexError, ZeroDivisionError) as error:
            return f"its figures cannot be read: {type(error).__name__} {error}"
    lines = log.read_text(errors="replace").split("\n")
    said = [line.strip() for line in lines if line.strip()]
    return said[-1] if said else ""


def read_json(path: Path) -> dict[str, Any] | None:
    try:
        result = json.loads(path.read_text())
    except (OSError, ValueError):  # none was written, or not to its end
        return None
    return result if isinstance(result, dict) else None


def install(wheels: Path, site: Path) -> None:
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    found = sorted(map(str, wheels.glob("*.whl")))
    if not found:
        sys.exit(f"no wheels in {wheels}")
    subprocess.run([*pip, "--upgrade", "--target", str(site), *found], check=True)


def write_summary(out: Path, outcomes: list[Outcome]) -> None:
    rows = ",\n".join("  " + json.dumps(vars(outcome)) for outcome in outcomes)
    (out / "summary.json").write_text(f"[\n{rows}\n]\n")


def print_rows(outcomes: list[Outcome]) -> None:
    for o in outcomes:
        print(f"{o.stage} {o.name:26} {o.seconds:6.0f} s  {o.status:14} {o.headline}", flush=True)


if __name__ == "__main__":
    main()
