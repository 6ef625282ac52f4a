"""``sacl-fast export RUN OUT``. Torch is imported once the options are understood."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING

from sacl_fast.config.export import ExportConfig
from sacl_fast.errors import UserError

if TYPE_CHECKING:
    from sacl_fast.deploy.result import ExportResult

HELP = (
    "sacl-fast export RUN OUT [options]: RUN is a run folder, a checkpoint or an encoder's file, "
    "OUT a new folder. Files are run and compared with the encoder; one that differs is not kept."
)


def run(args: list[str], parse: Callable[[ExportConfig, list[str]], ExportConfig]) -> None:
    """Export as the command line says, and print the table.

    Args:
        parse: gives the settings with the options of a list of arguments.
    """
    asks_for_help = any(arg in ("-h", "--help") for arg in args)
    if not asks_for_help and (len(args) < 2 or any(arg.startswith("-") for arg in args[:2])):
        raise UserError(
            "export takes a run folder, checkpoint or encoder, then a new folder: sacl-fast export "
            "runs/demo/DATE-TIME exported --width dense,slim --format onnx"
        )
    options = [arg for arg in args if arg.startswith("-")] if asks_for_help else args[2:]
    parse(ExportConfig(), options)  # what is mistyped is said at once
    from sacl_fast.deploy.export import export
    from sacl_fast.evaluation.trained import open_trained

    logging.basicConfig(format="%(message)s")
    logging.getLogger("sacl_fast").setLevel(logging.INFO)
    trained = open_trained(args[0])
    config = parse(replace(ExportConfig(), data=trained.config.data), options)
    result = export(
        trained,
        args[1],
        *(_listed(text) for text in (config.width, config.format)),
        fold_norm=config.fold_norm,
        int8=config.int8,
        knn=config.knn,
        data=config.data if trained.config.data != config.data else None,
    )
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
