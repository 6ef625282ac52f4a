"""Images that were named on the command line in the place of the run's own."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from sacl_fast.config import DataConfig
from sacl_fast.data.images.recognise import source_of
from sacl_fast.errors import UserError
from sacl_fast.evaluation.trained import Trained
from sacl_fast.files import user_path


def as_given(data: DataConfig, args: Sequence[str]) -> DataConfig:
    """``data``, parsed from the options ``args``: a root without a source is opened as what it is,
    and not as what the run was trained on."""
    given = {arg.partition("=")[0].replace("_", "-") for arg in args}
    if data.root is None or "--data.root" not in given or "--data.source" in given:
        return data
    return replace(data, source=source_of(user_path(data.root, "data.root")))


def require_images(trained: Trained, data: DataConfig) -> None:
    """Refuse to go on where neither the trained encoder nor an option names images."""
    if not trained.has_data and data.source == "folder" and data.root is None:
        own = f" (its own were {trained.own_source})" if trained.own_source else ""
        raise UserError(
            f"{trained.path} does not say on which images to evaluate it{own}; --data.root names a "
            "folder of them, --data.source cifar10 and the like a data set"
        )
