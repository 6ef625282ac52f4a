"""``sacl-fast features TRAINED [options]`` and ``sacl-fast report RUN... [options]``.

Nothing here imports torch until the options are understood.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from sacl_fast.config.looking import FeaturesConfig, ReportConfig
from sacl_fast.errors import UserError
from sacl_fast.output import show_log

if TYPE_CHECKING:
    from sacl_fast.evaluation.trained import Trained

_FEATURES = (
    "sacl-fast features TRAINED [options]: the features of all images as a file, and what they "
    "look like. TRAINED: a run folder, a checkpoint or an encoder's file. The defaults of data "
    "below are for an encoder's file; a run brings its own."
)
_REPORT = (
    "sacl-fast report RUN... [options]: runs side by side: figures, settings that differ, curves. "
    "RUN: a run folder."
)


def run_features(args: list[str], parse: Callable[..., Any]) -> None:
    """Run the command.

    Args:
        parse: ``parse(command, default, args, description=...)``: ``default`` with the options.
    """
    rest = list(args) or ["--help"]
    path = rest.pop(0) if not rest[0].startswith("-") else None
    parse("features", FeaturesConfig(), rest, description=_FEATURES)  # before anything takes time
    if path is None:
        raise UserError(
            "features needs the encoder, first: a run folder, a checkpoint or an encoder's file"
        )
    show_log()

    from sacl_fast.evaluation.named_images import settings_of
    from sacl_fast.evaluation.trained import open_trained
    from sacl_fast.looking.run import look_at_trained

    trained = open_trained(path)
    default = features_defaults(trained)
    settings = settings_of(parse, "features", default, rest, description=_FEATURES)
    written = look_at_trained(trained, settings)
    for line in written.lines:
        print(line)
    print(f"written: {', '.join(str(file) for file in written.files)}")


def features_defaults(trained: Trained) -> FeaturesConfig:
    """The settings that a run brings along."""
    run = trained.config
    return FeaturesConfig(
        seed=run.seed, precision=run.precision, data=run.data, batch_size=run.eval.batch_size
    )


def run_report(args: list[str], parse: Callable[..., Any]) -> None:
    """Run the command; ``parse`` as of ``run_features``."""
    count = next((i for i, arg in enumerate(args) if arg.startswith("-")), len(args))
    paths, options = args[:count], args[count:] or (["--help"] * (not args))
    settings = parse("report", ReportConfig(), options, description=_REPORT)
    if not paths:
        raise UserError("report needs run folders, first: one or several")
    show_log(logging.WARNING)

    from sacl_fast.looking.report import compare_runs

    compare_runs(paths, settings)
