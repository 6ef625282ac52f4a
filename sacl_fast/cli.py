"""The command line, ``sacl-fast COMMAND ...``; ``_USAGE`` lists the commands.

The options of ``train`` and ``views`` are the fields of ``sacl_fast.config.Config``. They are
layered: preset, then the file given with ``--config``, then the options themselves. Torch is
imported once everything is understood, so that help and typing errors answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

from sacl_fast._version import __version__
from sacl_fast.checks import counted
from sacl_fast.config import Config
from sacl_fast.config.choices import BenchVariant
from sacl_fast.config.file import layered, read_config_file
from sacl_fast.errors import (
    OtherRankFailed,
    SaidByAnother,
    Stopped,
    UserError,
    in_one_line,
    nearest,
    reason_of,
)
from sacl_fast.files import kind_of, user_path
from sacl_fast.machine import limit_threads
from sacl_fast.options import parse_options
from sacl_fast.output import is_courtesy, make_courtesy, open_standard_streams
from sacl_fast.presets import PRESETS, get_preset

if TYPE_CHECKING:
    from sacl_fast.engine.result import RunResult

_USAGE = """\
usage: sacl-fast COMMAND ...

  train [PRESET] [--config FILE] [--dry-run] [--profile] [options]
                                            pre-train an encoder without labels
  eval knn|linear|few-shot TRAINED [options]
                                            how good an encoder is, and what it gained
  finetune TRAINED [options]                train it and a classifier on labelled images
  features TRAINED [options]                features as a file, and what they look like
  report RUN... [--out FILE]                runs side by side
  export TRAINED OUT [options]              an encoder as ONNX and other files
  views [PRESET] [--config FILE] [options]  draw both views of some images
  cache IMAGES OUT [--size N] [options]     decode images once, into a file that trains faster
  index SHARDS                              index .tar shards (data.source webdataset)
  bench [PRESET] [--config FILE] [options]  how fast a step is, beside the paper's pseudocode
  doctor                                    what is installed, what runs, and why
  doctor --measure [PRESET] [options]       what bounds a step here, and what to change

presets: {presets}
(default: demo, which needs no data)

sacl-fast train --help lists the options. sacl-fast --version prints the version.
"""

_HELP = {
    "index": """\
usage: sacl-fast index SHARDS

SHARDS: a folder of .tar shards, or one shard. Writes beside each the index by which DALI reads it
(data.source webdataset), and prints its path.
""",
    "doctor": """\
usage: sacl-fast doctor
       sacl-fast doctor --measure [PRESET] [options]

Says what is installed, what runs, and why. --measure: what bounds a step of that preset on this
machine, and what to change; sacl-fast doctor --measure --help lists the options.
""",
}
"""Of the commands without options, for the others have theirs from the parser of options."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0: done; 1: a bug, another process's failure, or output that cannot be written; 2: bad input;
    128 + n: a run that signal n ended, unfinished.
    """
    open_standard_streams()
    make_courtesy("stderr")
    limit_threads(os.environ)  # before torch is imported
    status = _run(list(sys.argv[1:] if argv is None else argv))
    if argv is None and status == 128 + signal.SIGINT:
        from sacl_fast.engine.signals import die_of

        die_of(signal.SIGINT)
    return status


def _run(args: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "train": _train,
        "eval": _eval,
        "finetune": _finetune,
        "features": _features,
        "report": _report,
        "export": _export,
        "views": _views,
        "cache": _cache,
        "index": _index,
        "bench": _bench,
        "doctor": _doctor,
    }
    try:
        status = 0
        if not args or args[0] in ("-h", "--help", "help"):
            print(_USAGE.format(presets=", ".join(PRESETS)), end="")
        elif args[0] in ("-V", "--version"):
            print(f"sacl-fast {__version__}")
        elif args[0] in _HELP and args[1:] in (["-h"], ["--help"]):
            print(_HELP[args[0]], end="")
        elif args[0] in commands:
            with contextlib.suppress(SystemExit):  # after the help of a command
                status = commands[args[0]](args[1:]) or 0
        else:
            raise UserError(f"unknown command {args[0]!r}; {nearest(args[0], commands)}")
        sys.stdout.flush()
        return status
    except SaidByAnother:
        return 2
    except UserError as error:
        print(f"sacl-fast: {in_one_line(error)}", file=sys.stderr)
        return 2
    except OtherRankFailed as error:
        if not error.said:
            print(f"sacl-fast: {error}", file=sys.stderr)
        return 1
    except Stopped as stopped:
        return 128 + stopped.number
    except KeyboardInterrupt:
        print("sacl-fast: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        if is_courtesy(sys.stdout) or error.filename is not None or not _of_output(error):
            raise
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for the buffer's rest
        if error.errno == errno.EPIPE:  # the reader has seen enough: | head
            return 0
        print(f"sacl-fast: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1


def _of_output(error: OSError) -> bool:
    return error.errno in (errno.EPIPE, errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def _train(args: list[str]) -> int:
    from sacl_fast.engine.signals import ended_by_signals

    with ended_by_signals():  # but for the steps, after which it stops with a checkpoint
        return _train_or_describe(args)


def _train_or_describe(args: list[str]) -> int:
    dry_run = _take_flag(args, "--dry-run")
    profile = _take_flag(args, "--profile")
    config = parse_config(
        "train",
        args,
        extra="--dry-run: print the resolved configuration, sizes, costs, memory and time only. "
        "--profile: write a trace of some steps into the run folder and print where their time "
        "goes.",
    )
    if dry_run:
        from sacl_fast.engine.dry_run import print_dry_run

        print_dry_run(config)
        return 0
    from sacl_fast.engine.launch import read_launch

    make_courtesy("stdout")
    first = read_launch().rank == 0
    from sacl_fast.engine.trainer import train

    logging.basicConfig(format="%(message)s")
    if first:
        logging.getLogger("sacl_fast").setLevel(logging.INFO)
    result = train(config, profile=profile)
    if result.finished and first:
        _print_result(result)
    return 0 if result.finished else 128 + result.stopped_by


def _print_result(result: RunResult) -> None:
    for width in ("dense", "slim"):
        if (after := result.knn.get(f"knn_{width}")) is not None:
            before = result.knn_before.get(f"knn_{width}")
            change = "" if before is None else f"{before:.2f} % before training, "
            print(f"kNN accuracy, {width} encoder: {change}{after:.2f} % after")
            if before is not None and after < before:
                print(
                    f"warning: the {width} encoder is worse than before training; more epochs, "
                    "another --optim.lr or larger batches may help, and curves.png shows where it "
                    "fell"
                )
    for name, before in result.label_free_before.items():
        if not result.knn and name.startswith("rankme") and name in result.label_free:
            after, width = result.label_free[name], name.removeprefix("rankme_")
            print(f"RankMe, {width} encoder: {before:.1f} before training, {after:.1f} after")
    pictures = [result.folder / name for name in ("curves.png", "views.png")]
    print(f"pictures: {', '.join(str(path) for path in pictures if path.exists())}")
    print(f"encoder:  {result.folder / 'encoder.safetensors'}")
    slim = result.folder / "encoder_slim.safetensors"
    if slim.exists():
        print(f"slim:     {slim}")
    best = result.folder / "encoder_best.safetensors"
    if best.exists():
        print(f"best:     {best}, of an earlier epoch")


def _eval(args: list[str]) -> None:
    from sacl_fast.evaluation.command import run_eval

    run_eval(args, parse_options)


def _finetune(args: list[str]) -> int:
    from sacl_fast.engine.signals import ended_by_signals
    from sacl_fast.transfer.command import run_finetune

    with ended_by_signals():  # but for the steps, after which it stops with a checkpoint
        return run_finetune(args, parse_options)


def _features(args: list[str]) -> None:
    from sacl_fast.looking.command import run_features

    run_features(args, parse_options)


def _report(args: list[str]) -> None:
    from sacl_fast.looking.command import run_report

    run_report(args, parse_options)


def _export(args: list[str]) -> None:
    from sacl_fast.deploy.command import run_export

    run_export(args, parse_options)


def _views(args: list[str]) -> None:
    config = parse_config("views", args, extra="Writes views.png (or --out FILE.png).")
    from sacl_fast.data.images.open import open_sources
    from sacl_fast.data.images.root import refuse_among_images
    from sacl_fast.data.loading.contact_sheet import contact_sheet

    path = user_path(config.out or "views.png", "out")
    refuse_among_images(path.parent, config.data, "--out names a picture elsewhere")
    sheet = contact_sheet(open_sources(config.data, config.seed).train, config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except (OSError, ValueError) as error:
        why = reason_of(error)
        raise UserError(f"cannot write {path}: {why}; --out names another picture") from error
    print(path)


def _cache(args: list[str]) -> None:
    from sacl_fast.caching.command import run_cache

    run_cache(args, parse_options)


def _index(args: list[str]) -> None:
    if len(args) != 1 or args[0].startswith("-"):
        raise UserError("index takes a folder of .tar shards, or one shard")
    from sacl_fast.data.images.shard_index import index_shards

    root = user_path(args[0], "index")
    if kind_of(root) is None:
        raise UserError(f"{root} does not exist (from {Path.cwd()})")
    for path in index_shards(root):
        print(path)


def _bench(args: list[str]) -> None:
    steps = _take_value(args, "--steps", "a number")
    variants = _take_value(args, "--variants", "names, with commas between them")
    config = parse_config(
        "bench",
        args,
        extra="Times training steps on random images: the paper's pseudocode in eager PyTorch, "
        "then this engine's, a feature at a time. --steps N: how many of each (10). --variants "
        f"A,B: only these of {', '.join(get_args(BenchVariant))} (which takes minutes, and is left "
        "out otherwise). --out FOLDER: where bench.json and bench.png are written, which nothing "
        "else is. Ignored, since they change no step: resume, resume-at, epochs, all of data, "
        "eval, log and checkpoint, and of views all but views.size.",
    )
    # The profiler, which counts memory, warns of what was allocated before it.
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    from sacl_fast.bench.command import run_bench

    run_bench(config, steps=steps, names=variants)


def _doctor(args: list[str]) -> None:
    if _take_flag(args, "--measure"):
        config = parse_config("doctor --measure", args, extra="Trains nothing and writes nothing.")
        from sacl_fast.engine.verdict import print_verdict

        print_verdict(config)
        return
    if args:
        raise UserError(f"doctor takes options after --measure only, {args[0]!r} was given")
    from sacl_fast.engine.environment import print_doctor

    print_doctor(sys.stdout)


def parse_config(command: str, args: Sequence[str], *, extra: str = "") -> Config:
    """The configuration that ``[PRESET] [--config FILE] [options]`` describes.

    Raises:
        UserError: an unknown preset or key, or a value that does not fit.
        SystemExit: after printing help.
    """
    rest = list(args)
    preset = rest.pop(0) if rest and not rest[0].startswith("-") else None
    file = _take_value(rest, "--config", "a file")
    config = get_preset(preset or "demo") if file is None else _with_file(preset, file)
    others = f"Preset {config.preset}; all: {', '.join(PRESETS)}."
    layers = "--config FILE: YAML, layered between preset and options."
    config = parse_options(command, config, rest, description=" ".join((others, layers, extra)))
    _check_warmup(config, rest)
    return config


def _with_file(preset: str | None, file: str) -> Config:
    """The preset with the settings of a file; without one, the preset that the file names, so that
    the 'config.yaml' of a run is that run again, name and all."""
    values = read_config_file(user_path(file, "--config"))
    named = values.pop("preset", None)
    try:
        if preset is None and named is not None:
            base = get_preset(named if isinstance(named, str) and named in PRESETS else "demo")
            return layered(base, {"preset": named, **values})
        return layered(get_preset(preset or "demo"), values)
    except UserError as error:
        raise UserError(f"{error} (in {file})") from None


def _check_warmup(config: Config, args: list[str]) -> None:
    """Refuse a warm-up that was asked for and fills the run; a preset's is shortened instead."""
    warmup = config.optim.warmup_epochs
    given = {arg.partition("=")[0].replace("_", "-") for arg in args}
    if "--optim.warmup-epochs" in given and warmup and warmup >= config.epochs:
        raise UserError(
            f"optim.warmup_epochs is {warmup} in a run of {counted(config.epochs, 'epoch')}, "
            "so that the learning rate would only rise; less than epochs works, such as "
            f"{config.epochs // 10}"
        )


def _take_flag(args: list[str], flag: str) -> bool:
    given = flag in args
    args[:] = [arg for arg in args if arg != flag]
    return given


def _take_value(args: list[str], option: str, what: str) -> str | None:
    for i, arg in enumerate(args):
        if arg == option:
            if i + 1 == len(args):
                raise UserError(f"{option} needs {what}")
            value = args[i + 1]
            del args[i : i + 2]
            return value
        if arg.startswith(f"{option}="):
            return args.pop(i).partition("=")[2]
    return None
