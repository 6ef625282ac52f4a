"""A dataclass of settings from the options of a command line, by tyro, whose messages become one
sentence."""

from __future__ import annotations

import contextlib
import io
import re
from itertools import pairwise
from typing import Literal, TypeVar

from sacl_fast.checks import Settings, check
from sacl_fast.errors import UserError, reason_of

_S = TypeVar("_S", bound=Settings)


def parse_options(command: str, default: _S, args: list[str], *, description: str = "") -> _S:
    """``default`` with the options of ``args``."""
    import tyro

    for option, shell in pairwise(args):
        if option in ("--tyro-print-completion", "--tyro-write-completion"):
            check(shell, Literal["bash", "zsh", "tcsh", "fish"], option)

    prog = f"sacl-fast {command}"
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            return tyro.cli(
                type(default), prog=prog, default=default, args=args, description=description
            )
    except SystemExit as stopped:
        if stopped.code in (0, None):
            raise
        box = said.getvalue()
        raise UserError(_of_settings(stopped, box) or _in_one_sentence(box)) from None
    except OSError as error:
        if error.filename is None:  # of standard output; else the one file that tyro writes
            raise
        raise UserError(f"cannot write the completion: {reason_of(error)}") from None


def _of_settings(stopped: SystemExit, box: str) -> str | None:
    """What a class of settings said of a value, where that ended the parsing. A part of the
    setting's name that the class cannot know stands in tyro's box."""
    error: BaseException | None = stopped
    while error is not None and not isinstance(error, UserError):
        error = error.__context__
    if error is None:
        return None
    named = re.search(r"Error parsing ([\w.]+):", box)
    return re.sub(r"^\w+\.\*", named[1], str(error)) if named else str(error)


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
        line.split()[0].rstrip(",")
        for paragraph in paragraphs
        if paragraph[0].startswith("Perhaps you meant")
        for line in paragraph
        if line.startswith("--")
    ]
    if len(sentence) > 500:  # somebody's file in the place of an option
        sentence = f"{sentence[:300]}...{sentence[-100:]}"
    meant = list(dict.fromkeys(meant))
    if len(meant) > 4:
        meant = [*meant[:3], f"one of {len(meant) - 3} others"]
    return sentence + (f"; did you mean {' or '.join(meant)}?" if meant else "")
