"""``sacl-fast finetune TRAINED [options]``. Torch is imported once the options are understood."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from sacl_fast.config.finetune import FinetuneConfig
from sacl_fast.errors import UserError
from sacl_fast.output import show_log

if TYPE_CHECKING:
    from sacl_fast.evaluation.trained import Trained

_HELP = (
    "sacl-fast finetune TRAINED [options]. TRAINED: a run folder, a checkpoint or an encoder's "
    "file. The defaults below are for an encoder's file; a run brings its own images and seed."
)


def run_finetune(args: list[str], parse: Callable[..., FinetuneConfig]) -> int:
    """Fine-tune as the command line says, and print the result; returns the exit status.

    Args:
        parse: ``parse(command, default, args, description=...)``: ``default`` with the options.
    """
    rest = list(args)
    path = rest.pop(0) if rest and not rest[0].startswith("-") else None
    if not args:
        rest = ["--help"]
    parse("finetune", FinetuneConfig(), rest, description=_HELP)  # before anything takes time
    if path is None:
        raise UserError(
            "finetune needs what to fine-tune, first: a run folder, a checkpoint or an encoder's "
            "file"
        )
    show_log()

    from sacl_fast.evaluation.named_images import settings_of
    from sacl_fast.evaluation.report import plain, result_files
    from sacl_fast.evaluation.trained import open_trained
    from sacl_fast.transfer.finetune import finetune

    trained = open_trained(path)
    settings = settings_of(parse, "finetune", defaults(trained), rest, description=_HELP)
    done = finetune(trained, settings)
    if done.result is None:
        return 128 + done.stopped_by
    print(plain(done.result))
    files = [*result_files(done.result, done.folder), done.folder / "last.safetensors"]
    print(f"written: {', '.join(str(file) for file in files)}")
    return 0


def defaults(trained: Trained) -> FinetuneConfig:
    """The settings that a run brings along."""
    run = trained.config
    return FinetuneConfig(seed=run.seed, precision=run.precision, data=run.data)
