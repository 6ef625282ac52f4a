"""The command line: ``sacl-fast train | views | index | doctor``.

The options of ``train`` and ``views`` are the fields of ``sacl_fast.config.Config``. They are
layered: preset, then the file given with ``--config``, then the options themselves. Torch is
imported once everything is understood, so that help and typing errors answer at once.
"""

from __future__ import annotations

import contextlib
import errno
import io
import logging
import os
import re
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sacl_fast._version import __version__
from sacl_fast.config import Config, to_flags
from sacl_fast.errors import OtherRankFailed, UserError, nearest
from sacl_fast.output import make_courtesy, open_standard_streams
from sacl_fast.presets import PRESETS, get_preset

if TYPE_CHECKING:
    from sacl_fast.engine.trainer import RunResult

_USAGE = """\
usage: sacl-fast COMMAND ...

  train [PRESET] [--config FILE] [--dry-run] [options]   pre-train an encoder without labels
  views [PRESET] [--config FILE] [options]               draw both views of some images
  index SHARDS                                           index .tar shards (data.source webdataset)
  doctor                                                 what is installed, what runs, and why

presets: {presets}
(default: demo, which needs no data)

sacl-fast train --help lists the options. sacl-fast --version prints the version.
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; returns the exit status.

    0: done; 1: a bug, another process's failure, or output that cannot be written; 2: bad input;
    128 + n: a run that signal n ended, unfinished.
    """
    open_standard_streams()
    make_courtesy("stderr")
    status = _run(list(sys.argv[1:] if argv is None else argv))
    if argv is None and status == 128 + signal.SIGINT:
        from sacl_fast.engine.signals import die_of

        die_of(signal.SIGINT)
    return status


def _run(args: list[str]) -> int:
    commands: dict[str, Callable[[list[str]], int | None]] = {
        "train": _train,
        "views": _views,
        "index": _index,
        "doctor": _doctor,
    }
    try:
        if not args or args[0] in ("-h", "--help", "help"):
            print(_USAGE.format(presets=", ".join(PRESETS)), end="")
            status = 0
        elif args[0] in ("-V", "--version"):
            print(f"sacl-fast {__version__}")
            status = 0
        elif args[0] in commands:
            status = commands[args[0]](args[1:]) or 0
        else:
            raise UserError(f"unknown command {args[0]!r}; {nearest(args[0], commands)}")
        sys.stdout.flush()
        return status
    except UserError as error:
        print(f"sacl-fast: {error}", file=sys.stderr)
        return 2
    except OtherRankFailed as error:
        if not error.said:
            print(f"sacl-fast: {error}", file=sys.stderr)
        return 1
    except BrokenPipeError:  # the reader of our output has seen enough: | head
        _write_no_more()
        return 0
    except KeyboardInterrupt:
        print("sacl-fast: interrupted", file=sys.stderr)
        return 128 + signal.SIGINT
    except OSError as error:
        if error.filename is not None or not _is_full(error):
            raise
        _write_no_more()
        print(f"sacl-fast: cannot write the output: {error.strerror}", file=sys.stderr)
        return 1


def _is_full(error: OSError) -> bool:
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EFBIG)


def _write_no_more() -> None:
    """Let what is left in the buffer go: the interpreter would fail on it once more."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _train(args: list[str]) -> int:
    dry_run = _take_flag(args, "--dry-run")
    config = parse_config(
        "train", args, extra="--dry-run: print the resolved configuration, sizes and costs only."
    )
    if dry_run:
        from sacl_fast.engine.dry_run import print_dry_run

        print_dry_run(config)
        return 0
    from sacl_fast.engine.launch import read_launch
    from sacl_fast.engine.signals import ended_by_signals

    make_courtesy("stdout")
    with ended_by_signals():
        first = read_launch().rank == 0
        from sacl_fast.engine.trainer import train

        logging.basicConfig(format="%(message)s")
        if first:
            logging.getLogger("sacl_fast").setLevel(logging.INFO)
        result = train(config)
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
    print(f"pictures: {result.folder / 'curves.png'}, {result.folder / 'views.png'}")
    print(f"encoder:  {result.folder / 'encoder.safetensors'}")


def _views(args: list[str]) -> None:
    config = parse_config("views", args, extra="Writes views.png (or --out FILE.png).")
    from sacl_fast.data.contact_sheet import contact_sheet
    from sacl_fast.data.sources import open_sources

    path = Path(config.out or "views.png")
    sheet = contact_sheet(open_sources(config.data, config.seed).train, config)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        sheet.save(path)
    except (OSError, ValueError) as error:
        raise UserError(f"cannot write {path}: {error}; --out names another picture") from error
    print(path)


def _index(args: list[str]) -> None:
    if len(args) != 1 or args[0].startswith("-"):
        raise UserError("index takes a folder of .tar shards, or one shard")
    from sacl_fast.data.webdataset import index_shards

    root = Path(args[0]).expanduser()
    if not root.exists():
        raise UserError(f"{root} does not exist (from {Path.cwd()})")
    for path in index_shards(root):
        print(path)


def _doctor(args: list[str]) -> None:
    if args:
        raise UserError(f"doctor takes no options, {args[0]!r} was given")
    from sacl_fast.engine.environment import print_doctor

    print_doctor(sys.stdout)


def parse_config(command: str, args: Sequence[str], *, extra: str = "") -> Config:
    """The configuration that ``[PRESET] [--config FILE] [options]`` describes.

    Raises:
        UserError: an unknown preset or key, or a value that does not fit.
        SystemExit: after printing help.
    """
    rest = list(args)
    config = get_preset(rest.pop(0) if rest and not rest[0].startswith("-") else "demo")
    file = _take_value(rest, "--config")
    if file is not None:
        config = _parse(command, config, to_flags(_read_yaml(Path(file))), f" (in {file})")
    others = f"Preset {config.preset}; others: {', '.join(PRESETS)}."
    layers = "--config FILE: YAML, layered between preset and options."
    return _parse(command, config, rest, description=" ".join((others, layers, extra)))


def _parse(
    command: str, default: Config, args: list[str], where: str = "", *, description: str = ""
) -> Config:
    """``default`` with the options of ``args``; ``where`` they stand is added to what is wrong."""
    import tyro

    prog = f"sacl-fast {command}"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(Config, prog=prog, default=default, args=args, description=description)
    except SystemExit as stopped:
        if stopped.code in (0, None):
            raise
        raise UserError(f"{_in_one_sentence(said.getvalue())}{where}") from None


def _in_one_sentence(box: str) -> str:
    """What tyro says of a mistake in a box of paragraphs: the first, and what it suggests."""
    frame = "│╭╮╰╯─ "  # or, where the output is ASCII, lines of hyphens
    lines = [
        "" if set(line) <= set(frame + "-") else line.strip(frame) for line in box.splitlines()
    ]
    text = "\n".join(lines[1:]).strip()  # without the title
    paragraphs = [paragraph.splitlines() for paragraph in re.split(r"\n{2,}", text)]
    sentence = re.sub(r"^Error parsing [\w.]+: ", "", " ".join(paragraphs[0]))
    meant = [
        line.split()[0]
        for paragraph in paragraphs
        if paragraph[0].startswith("Perhaps you meant")
        for line in paragraph
        if line.startswith("--")
    ]
    return sentence + (f"; did you mean {' or '.join(dict.fromkeys(meant))}?" if meant else "")


def _read_yaml(path: Path) -> dict[str, Any]:
    import yaml

    try:
        values = yaml.safe_load(path.read_text())
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path} is not YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no configuration; a mapping such as 'epochs: 10' works")
    return {key: value for key, value in values.items() if key != "preset"}


def _take_flag(args: list[str], flag: str) -> bool:
    if flag not in args:
        return False
    args.remove(flag)
    return True


def _take_value(args: list[str], option: str) -> str | None:
    for i, arg in enumerate(args):
        if arg == option:
            if i + 1 == len(args):
                raise UserError(f"{option} needs a file")
            value = args[i + 1]
            del args[i : i + 2]
            return value
        if arg.startswith(f"{option}="):
            return args.pop(i).partition("=")[2]
    return None
