"""Images that were named on the command line in the place of the run's own."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, TypeVar

from sacl_fast.config import DataConfig
from sacl_fast.data.images.recognise import source_of
from sacl_fast.errors import UserError
from sacl_fast.evaluation.trained import Trained
from sacl_fast.files import user_path

_S = TypeVar("_S")


def settings_of(
    parse: Callable[..., _S], command: str, default: _S, args: Sequence[str], *, description: str
) -> _S:
    """``default``, which a run brought along, with the options ``args``: what every command does
    that takes a trained encoder. A ``--data.root`` without ``--data.source`` is opened as what it
    is, and not as what the run was trained on.

    Args:
        parse: ``parse(command, default, args, description=...)``: ``default`` with the options.
    """
    settings: Any = parse(command, default, args, description=description)
    data: DataConfig = settings.data
    named = {arg.partition("=")[0].replace("_", "-") for arg in args}
    if data.root is None or "--data.root" not in named or "--data.source" in named:
        return settings
    source = source_of(user_path(data.root, "data.root"))
    return replace(settings, data=replace(data, source=source))


def require_images(trained: Trained, data: DataConfig) -> None:
    """Refuse to go on where neither the trained encoder nor an option names images."""
    if not trained.has_data and data.source == "folder" and data.root is None:
        own = f" (its own were {trained.own_source})" if trained.own_source else ""
        raise UserError(
            f"{trained.path} does not say on which images to evaluate it{own}; --data.root names a "
            "folder of them, --data.source cifar10 and the like a data set"
        )
