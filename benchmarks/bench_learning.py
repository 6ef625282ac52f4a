"""What encoders are worth that were trained in different ways, over several seeds.

    python benchmarks/bench_learning.py --data.root cifar10.cache --data.source cache \\
        --case XD "demo" --case "Barlow Twins" "demo --slim.ratio 1 --loss.distillation none" \\
        --seeds 0 1 2 --evaluate knn linear-fast --out runs/learning --json learning.json

A case is a name and what stands behind ``sacl-fast train``; options that this program does not know
are those of every case, behind its own. Each seed trains each case in turn, so that what is cut
short has all cases as often. A run is evaluated dense and slim, and beside them untrained, by kNN,
by a linear classifier on fixed features (``linear-fast``; ``linear`` is the whole protocol) or by
few images a class; or it is fine-tuned, and beside it the same from scratch, with any options of
``sacl-fast finetune``: ``--evaluate "finetune --percent 1"``. The file is written after each run,
and rows that it has of the same command line are kept. Accuracies are percent; the table has means
over seeds and their standard deviation, and so of what pre-training adds.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
import shlex
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import sacl_fast
from sacl_fast.bench.figures import write_json
from sacl_fast.cli import parse_config
from sacl_fast.config.finetune import FinetuneConfig
from sacl_fast.errors import UserError
from sacl_fast.evaluation.scores import Result
from sacl_fast.evaluation.trained import open_trained
from sacl_fast.options import parse_options
from sacl_fast.output import show_log
from sacl_fast.transfer.command import defaults
from sacl_fast.transfer.finetune import finetune

FINETUNE = "finetune"
CONTROLS = ("untrained", "from scratch")
EVALUATIONS: dict[str, Callable[[Path], Result]] = {
    "knn": sacl_fast.evaluate.knn,
    "linear-fast": lambda run: sacl_fast.evaluate.linear(run, fast=True),
    "linear": sacl_fast.evaluate.linear,
    "few-shot": lambda run: sacl_fast.evaluate.few_shot(run, per_class=(1, 5, 10), percent=()),
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").partition("\n")[0], allow_abbrev=False
    )
    parser.add_argument(
        "--case",
        nargs=2,
        action="append",
        required=True,
        metavar=("NAME", "OPTIONS"),
        help="what to call it, and a preset and options of sacl-fast train; once for each case",
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument(
        "--evaluate",
        nargs="+",
        type=evaluation_of,
        default=["knn"],
        help=f"{', '.join(EVALUATIONS)}, or '{FINETUNE} OPTIONS'",
    )
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no run after")
    parser.add_argument("--out", type=Path, default=Path("runs/learning"), help="the runs' folders")
    parser.add_argument("--json", type=Path, help="write the figures here")
    options, common = parser.parse_known_args()
    show_log()

    if len({name for name, _ in options.case}) < len(options.case):
        parser.error("two cases have the same name")
    try:
        known = json.loads(options.json.read_text())["rows"] if _is_there(options.json) else []
    except (ValueError, LookupError, TypeError):
        parser.error(f"--json {options.json} is there, and no file of this program")
    commands = {
        (name, seed): [*shlex.split(case), *common, "--seed", str(seed)]
        for seed in options.seeds
        for name, case in options.case
    }
    try:
        for arguments in commands.values():
            parse_config("train", arguments)  # that no later one is wrong
    except UserError as error:
        parser.error(str(error))

    rows: list[dict[str, Any]] = []
    started = time.monotonic()
    for (name, seed), arguments in commands.items():
        command = shlex.join(["sacl-fast", "train", *arguments])
        row = next((row for row in known if row["command"] == command), None)
        row = {"command": command, **(row or {}), "case": name, "seed": seed}
        missing = [evaluation for evaluation in options.evaluate if evaluation not in row]
        if missing and time.monotonic() - started < 60 * options.minutes:
            row |= measured(arguments, options.out / folder_name(name, seed, command), missing)
        if all(evaluation in row for evaluation in options.evaluate):
            rows.append(row)
        if options.json is not None:
            write_json(options.json, {"benchmark": "bench_learning", "rows": rows})
    print(table(rows, options.evaluate) if rows else "no time was left for a run")


def evaluation_of(text: str) -> str:
    """One of ``--evaluate``."""
    name, *given = shlex.split(text) or [""]
    if name == FINETUNE:
        try:
            parse_options(FINETUNE, FinetuneConfig(), given)
        except UserError as error:
            raise argparse.ArgumentTypeError(str(error)) from None
    elif text not in EVALUATIONS:
        raise argparse.ArgumentTypeError(
            f"{text!r} is none of {', '.join(EVALUATIONS)} and {FINETUNE}"
        )
    return text


def _is_there(path: Path | None) -> bool:
    return path is not None and path.exists()


def folder_name(case: str, seed: int, command: str) -> str:
    """Of a run: one of other options has another."""
    words = re.sub(r"\W+", "_", case).strip("_")
    return f"{words}-{seed}-{hashlib.sha256(command.encode()).hexdigest()[:8]}"


def measured(arguments: list[str], folder: Path, evaluations: list[str]) -> dict[str, Any]:
    """A run, or what ``folder`` has of it, and its evaluations."""
    config = replace(parse_config("train", arguments), out=str(folder), resume="auto")
    start = time.monotonic()
    result = sacl_fast.train(config)
    if not result.finished:
        sys.exit(128 + result.stopped_by)  # the same command goes on
    seconds = time.monotonic() - start
    row: dict[str, Any] = {"steps": result.steps, "train_seconds": round(seconds, 1)}
    row["course"] = course(result.folder / "metrics.jsonl")
    for evaluation in evaluations:
        row[evaluation] = {
            scores.name: {name: round(figure.mean, 2) for name, figure in scores.figures.items()}
            for scores in evaluated(evaluation, result.folder).scores
        }
    return row


def evaluated(evaluation: str, run: Path) -> Result:
    """What one of ``--evaluate`` gives; a fine-tuning that was stopped goes on."""
    if evaluation in EVALUATIONS:
        return EVALUATIONS[evaluation](run)
    trained = open_trained(run)
    settings = parse_options(FINETUNE, defaults(trained), shlex.split(evaluation)[1:])
    out = run / FINETUNE / hashlib.sha256(evaluation.encode()).hexdigest()[:8]
    done = finetune(trained, replace(settings, from_scratch=True, out=str(out), resume="auto"))
    if done.result is None:
        sys.exit(128 + done.stopped_by)
    return done.result


def course(metrics: Path) -> list[dict[str, float]]:
    """The evaluations while training: epoch and figures."""
    epochs: dict[float, dict[str, float]] = {}
    for line in metrics.read_text().splitlines():
        reading = json.loads(line)
        if reading["kind"] in ("knn", "label_free"):
            figures = {k: round(v, 2) for k, v in reading.items() if k.endswith(("dense", "slim"))}
            epochs.setdefault(reading["epoch"], {"epoch": reading["epoch"]}).update(figures)
    return list(epochs.values())


def table(rows: list[dict[str, Any]], evaluations: list[str]) -> str:
    """Markdown: a line for each case and encoder, a column for each figure."""
    rows = [{**row, **{key: with_gains(row[key]) for key in evaluations}} for row in rows]
    cases = {row["case"]: [other for other in rows if other["case"] == row["case"]] for row in rows}
    figures = {
        (case, encoder, f"{evaluation}, {column}"): [
            row[evaluation][encoder][column] for row in of_case
        ]
        for case, of_case in cases.items()
        for evaluation in evaluations
        for encoder, columns in of_case[0][evaluation].items()
        for column in columns
    }
    columns = list(dict.fromkeys(column for _, _, column in figures))
    lines = [f"| case | encoder | {' | '.join(columns)} |", f"|---|---|{'---|' * len(columns)}"]
    for case, encoder in dict.fromkeys((case, encoder) for case, encoder, _ in figures):
        cells = [told(figures.get((case, encoder, column), [])) for column in columns]
        lines.append(f"| {case} | {encoder} | {' | '.join(cells)} |")
    return "\n".join(lines)


def with_gains(scores: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    """An evaluation's figures, and how far each encoder's are above those of its control."""
    found = dict(scores)
    for encoder, figures in scores.items():
        for control in (f"{encoder}, {name}" for name in CONTROLS):
            if control in scores:
                found[f"{encoder}, gain"] = {
                    name: figure - scores[control][name] for name, figure in figures.items()
                }
    return found


def told(values: list[float]) -> str:
    if len(values) < 2:
        return f"{values[0]:.1f}" if values else ""
    return f"{statistics.mean(values):.1f} ± {statistics.stdev(values):.1f}"


if __name__ == "__main__":
    main()
