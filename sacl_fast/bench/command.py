"""``sacl-fast bench [PRESET] [options]``: how fast a step is here, and against what."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from sacl_fast.bench.figures import write_json
from sacl_fast.bench.waterfall import WARM_UP, Make, plot, prepared, variants, waterfall
from sacl_fast.checks import check, counted
from sacl_fast.config import Config
from sacl_fast.config.choices import BenchVariant
from sacl_fast.engine.ceilings import machine_load
from sacl_fast.engine.convolutions import tried_algorithms
from sacl_fast.engine.determinism import deterministic
from sacl_fast.engine.distributed import pick_device
from sacl_fast.engine.measure import fitting
from sacl_fast.engine.preflight import check_run
from sacl_fast.engine.verdict import other_work
from sacl_fast.errors import UserError, reason_of
from sacl_fast.files import user_path

_STEPS = 10
_SECONDS = 1.0  # that a step of ours takes at most; a slow machine is given fewer images


def run_bench(config: Config, *, steps: str | None = None, names: str | None = None) -> None:
    """Time the variants of ``waterfall.py`` and print a line each; into the folder ``config.out``,
    where it is given, go ``bench.json`` and ``bench.png``.

    Args:
        steps: how many are timed, as it was typed.
        names: the variants, with commas between them; all but ``compiled``, which takes minutes,
            where it is not given.

    Raises:
        UserError: a variant that there is not, a number that is none, or a run that cannot be.
    """
    timed, load = _count(steps), machine_load()
    check_run(config)
    chosen = _chosen(variants(config), names)
    folder = None if config.out is None else _folder(config.out)
    device = pick_device(config.device)
    with deterministic(config.deterministic), tried_algorithms(device):  # as training does
        asked, start = config.batch_size, time.perf_counter()
        config, ms = fitting(config, prepared(config)[0], _SECONDS)
        built = time.perf_counter() - start  # and warmed up, as each is
        of_each = WARM_UP + timed * (2 if device.type == "cpu" else 1)
        seconds = len(chosen) * (built + 1e-3 * ms * of_each)
        what = f"{config.encoder.name} x {config.encoder.width:g}, {config.views.size} px"
        print(f"{what}, batch {config.batch_size}, {counted(timed, 'step')} of each:")
        if config.batch_size < asked:
            print(f"(one of {asked}, as asked for, takes too long here, or too much memory)")
        compiling = ", and minutes to compile" if "compiled" in chosen else ""
        print(f"(about {seconds:.0f} s{compiling})", flush=True)
        makers = variants(config)  # of the batch that fits
        result = waterfall(
            config,
            {name: makers[name] for name in chosen},
            steps=timed,
            warmup=0,
            json=folder and folder / "bench.json",
        )
    for sentence in filter(None, (conclusion(result), other_work(load))):
        print(sentence)
    if folder and any("step_ms" in row for row in result.get("rows", ())):
        plot(result, folder / "bench.png")
        print(folder / "bench.png")


def conclusion(result: dict[str, Any]) -> str:
    """The fastest of ours against the pseudocode, in a sentence; "" where either is missing."""
    rows = {row["name"]: row for row in result.get("rows", ()) if "step_ms" in row}
    first = rows.pop("pseudocode", None)
    rows.pop("compiled", None)
    if not first or not rows:
        return ""
    best = max(rows.values(), key=lambda row: times_as_fast(row, first))
    ratio = times_as_fast(best, first)
    of = " of ours" if ratio < 1 else ""
    memory = best["peak_memory_bytes"] / first["peak_memory_bytes"]
    sentence = (
        f"{best['name']} is the fastest{of}: {ratio:.2f} times as fast as the pseudocode, in "
        f"{memory:.2f} of its memory"
    )
    if (own := rows.get("run")) and own is not best:
        sentence += f"; a run with these settings is {times_as_fast(own, first):.2f} times as fast"
    return f"{sentence}."


def times_as_fast(row: dict[str, Any], first: dict[str, Any]) -> float:
    """By paired steps, where they were paired."""
    if "of_first" in row:
        return row["of_first"]["p50"]
    return first["step_ms"]["p50"] / row["step_ms"]["p50"]


def _count(given: str | None) -> int:
    if given is None:
        return _STEPS
    if not given.isascii() or not given.isdigit() or not 1 <= int(given) <= 10_000:
        raise UserError(f"--steps is {given!r}; a number from 1 to 10000 works")
    return int(given)


def _chosen(found: dict[BenchVariant, Make], names: str | None) -> list[BenchVariant]:
    """In their own order, since all are compared with the first."""
    if names is None:
        return [name for name in found if name != "compiled"]
    given = names.split(",")
    for name in given:
        if check(name, BenchVariant, "a name in --variants") not in found:
            raise UserError(
                f"the variant {name} does not run here, on this device and by these settings; "
                f"{', '.join(found)} do"
            )
    return [name for name in found if name in given]


def _folder(out: str) -> Path:
    """The folder, in which a file of figures can be written."""
    folder = user_path(out, "out")
    try:
        write_json(folder / "bench.json", {"benchmark": "bench_step", "rows": []})
    except OSError as error:
        why = reason_of(error)
        raise UserError(f"cannot write into {folder}: {why}; --out names another folder") from error
    return folder
