"""``sacl-fast eval knn|linear|few-shot TRAINED [options]``.

Nothing here imports torch until the options are understood.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, TypeVar

from sacl_fast.config.evaluation import (
    Evaluation,
    FewShotEvaluation,
    KnnEvaluation,
    LinearEvaluation,
)
from sacl_fast.errors import UserError, nearest
from sacl_fast.output import show_log

if TYPE_CHECKING:
    from sacl_fast.evaluation.trained import Trained

_S = TypeVar("_S", bound=Evaluation)

METHODS: dict[str, type[Evaluation]] = {
    "knn": KnnEvaluation,
    "linear": LinearEvaluation,
    "few-shot": FewShotEvaluation,
}

_USAGE = """\
usage: sacl-fast eval METHOD TRAINED [options]

  knn         weighted kNN, as while training
  linear      a linear classifier on frozen features
  few-shot    classifiers of 1, 5, 10 images a class, of 1 % and 10 % of the images

TRAINED: a run folder, a checkpoint (.pt) or an encoder (.safetensors).
Dense, slim and untrained encoder are compared on the run's images, or on those of --data.root.

sacl-fast eval METHOD --help lists the options.
"""


def run_eval(args: list[str], parse: Callable[..., Evaluation]) -> None:
    """Run the command.

    Args:
        parse: ``parse(command, default, args, description=...)``: ``default`` with the options.
    """
    if not args or args[0] in ("-h", "--help", "help"):
        print(_USAGE, end="")
        return
    method, *rest = args
    if method not in METHODS:
        raise UserError(f"unknown evaluation {method!r}; {nearest(method, METHODS)}")
    path = rest.pop(0) if rest and not rest[0].startswith("-") else None
    command = f"eval {method}"
    description = (
        f"sacl-fast {command} TRAINED [options]. TRAINED: a run folder, a checkpoint or an "
        "encoder's file. The defaults below are for an encoder's file; a run brings its own."
    )
    kind = METHODS[method]
    parse(command, kind(), rest, description=description)  # before anything takes time
    if path is None:
        raise UserError(
            f"eval {method} needs what to evaluate, first: a run folder, a checkpoint or an "
            "encoder's file"
        )
    show_log()

    from sacl_fast.evaluation.named_images import settings_of
    from sacl_fast.evaluation.report import plain, result_files
    from sacl_fast.evaluation.run import evaluate_trained
    from sacl_fast.evaluation.trained import open_trained

    trained = open_trained(path)
    settings = settings_of(parse, command, defaults(kind, trained), rest, description=description)
    result = evaluate_trained(trained, settings)
    print(plain(result))
    assert result.folder is not None
    print(f"written: {', '.join(str(file) for file in result_files(result, result.folder))}")


def defaults(kind: type[_S], trained: Trained) -> _S:
    """The settings of an evaluation that a run brings along."""
    run = trained.config
    return kind(seed=run.seed, precision=run.precision, data=run.data, eval=run.eval)
