"""``sacl-fast export TRAINED OUT [options]``. Torch is imported once the options are understood."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from sacl_fast.config.export import ExportConfig
from sacl_fast.errors import UserError
from sacl_fast.output import show_log

if TYPE_CHECKING:
    from sacl_fast.deploy.result import ExportResult

_HELP = (
    "sacl-fast export TRAINED OUT [options]. TRAINED: a run folder, a checkpoint or an encoder's "
    "file; OUT: a new folder. Files are run and compared with the encoder; one that differs is not "
    "kept. The defaults of data below are for an encoder's file; a run brings its own."
)


def run_export(args: list[str], parse: Callable[..., ExportConfig]) -> None:
    """Export as the command line says, and print the table.

    Args:
        parse: ``parse(command, default, args, description=...)``: ``default`` with the options.
    """
    paths = [arg for arg in args[:2] if not arg.startswith("-")]
    if not args or args[0].startswith("-"):
        paths = []
    options = args[len(paths) :] or ["--help"] * (not args)
    parse("export", ExportConfig(), options, description=_HELP)  # before anything takes time
    if len(paths) < 2:
        raise UserError(
            "export needs first what to export (a run folder, a checkpoint or an encoder's file), "
            "then a new folder"
        )
    show_log()

    from sacl_fast.deploy.export import NotKept, export
    from sacl_fast.evaluation.named_images import settings_of
    from sacl_fast.evaluation.trained import open_trained

    trained = open_trained(paths[0])
    default = replace(ExportConfig(), data=trained.config.data)
    config = settings_of(parse, "export", default, options, description=_HELP)
    try:
        result = export(
            trained,
            paths[1],
            *(_listed(text) for text in (config.width, config.format)),
            fold_norm=config.fold_norm,
            int8=config.int8,
            knn=config.knn,
            data=config.data if trained.config.data != config.data else None,
        )
    except NotKept as error:
        _print(error.result)
        raise
    _print(result)


def _listed(text: str) -> list[str]:
    return [part.strip() for part in text.split(",") if part.strip()]


def _print(result: ExportResult) -> None:
    from rich.console import Console
    from rich.table import Table

    head, rows = result.table()
    table = Table(box=None, pad_edge=False)
    for i, title in enumerate(head):
        table.add_column(title, justify="right" if i else "left", no_wrap=True)
    for row in rows:
        table.add_row(*row)
    console = Console(highlight=False, soft_wrap=False)
    if not console.is_terminal:
        console.width = 200
    console.print(table)
    console.print(result.caption)
    console.print(f"folder: {result.folder}", soft_wrap=True)
