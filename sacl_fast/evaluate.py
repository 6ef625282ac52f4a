"""Evaluation from Python, as ``sacl-fast eval`` does it.

>>> import sacl_fast
>>> from sacl_fast.config import DataConfig
>>> result = sacl_fast.evaluate.knn(
...     "runs/imagenet1k/.../encoder.safetensors", data=DataConfig(root="~/photos")
... )
>>> [scores.name for scores in result.scores]
['dense', 'dense, untrained']

Each function takes what ``sacl_fast.load_encoder`` takes, a run's own images and settings being the
defaults; or a module (N, 3, S, S) -> (N, F) with ``data`` and ``views``, which say on which images
of which size and normalisation it is evaluated. ``source`` and ``val`` are images from Python, as
``sacl_fast.train`` takes them, in place of those of ``data``. Keyword arguments are the options of
the command: fields of ``sacl_fast.config.evaluation``. Nothing is written but where ``out`` names a
folder (of ``features``: a file).

What the images, their labels or the settings do not allow is a ``UserError``.
"""

from __future__ import annotations

import os
from dataclasses import replace
from typing import Any, TypeVar

from torch import nn

from sacl_fast.checks import Settings, rules
from sacl_fast.config import DataConfig, EvalConfig, ViewsConfig
from sacl_fast.config.evaluation import (
    Evaluation,
    FewShotEvaluation,
    KnnEvaluation,
    LinearEvaluation,
)
from sacl_fast.config.finetune import FinetuneConfig
from sacl_fast.config.looking import FeaturesConfig
from sacl_fast.data.images.given import Given, as_given, refuse_both
from sacl_fast.errors import UserError, nearest
from sacl_fast.evaluation.command import defaults
from sacl_fast.evaluation.run import evaluate_module, evaluate_trained
from sacl_fast.evaluation.scores import Figure, Result, Scores
from sacl_fast.evaluation.trained import open_trained
from sacl_fast.files import user_path
from sacl_fast.looking.command import features_defaults
from sacl_fast.looking.features import Features, features_of_module, features_of_trained
from sacl_fast.looking.files import check_writable, write_features
from sacl_fast.looking.run import check_new, made_folder
from sacl_fast.transfer import command as transfer
from sacl_fast.transfer.finetune import Finetuned
from sacl_fast.transfer.finetune import finetune as _finetune

__all__ = [
    "Features",
    "Figure",
    "Finetuned",
    "Result",
    "Scores",
    "features",
    "few_shot",
    "finetune",
    "knn",
    "linear",
]

_Encoder = nn.Module | str | os.PathLike[str]
_S = TypeVar("_S", bound=Evaluation)


def knn(
    encoder: _Encoder,
    *,
    data: DataConfig | None = None,
    eval: EvalConfig | None = None,
    views: ViewsConfig | None = None,
    source: Any = None,
    val: Any = None,
    **settings: Any,
) -> Result:
    """Weighted kNN; ``eval`` has k, temperature and how many images."""
    return _evaluate(KnnEvaluation, encoder, data, eval, views, Given(source, val), settings)


def linear(
    encoder: _Encoder,
    *,
    data: DataConfig | None = None,
    eval: EvalConfig | None = None,
    views: ViewsConfig | None = None,
    source: Any = None,
    val: Any = None,
    **settings: Any,
) -> Result:
    """A linear classifier on the frozen encoder, by the usual protocol (``epochs``, ``lr``);
    with ``fast``, on the features of all training images (``weight_decays``)."""
    return _evaluate(LinearEvaluation, encoder, data, eval, views, Given(source, val), settings)


def few_shot(
    encoder: _Encoder,
    *,
    data: DataConfig | None = None,
    eval: EvalConfig | None = None,
    views: ViewsConfig | None = None,
    source: Any = None,
    val: Any = None,
    **settings: Any,
) -> Result:
    """Classifiers of few images (``per_class``, ``percent``, ``draws``)."""
    return _evaluate(FewShotEvaluation, encoder, data, eval, views, Given(source, val), settings)


def finetune(
    encoder: str | os.PathLike[str],
    *,
    data: DataConfig | None = None,
    source: Any = None,
    val: Any = None,
    **settings: Any,
) -> Finetuned:
    """Train all weights and a classifier on labelled images, as ``sacl-fast finetune`` does:
    ``steps``, ``percent``, ``width``, ``from_scratch``, ``out`` and the other fields of
    ``FinetuneConfig``.

    Unlike the evaluations it always writes: into ``out``, or into ``finetune/IMAGES`` in the run
    folder. ``result`` of what is returned has the figures, ``folder`` the network
    (``last.safetensors``, which ``sacl_fast.load_classifier`` opens).
    """
    _check_names(FinetuneConfig, settings)
    images = Given(source, val)
    refuse_both(data, images)
    trained = open_trained(encoder)
    if data is not None:
        settings["data"] = data
    wanted = replace(transfer.defaults(trained), **settings)
    wanted = replace(wanted, data=as_given(wanted.data, images))
    return _finetune(trained, wanted, quiet=True, given=images)


def features(
    encoder: _Encoder,
    *,
    data: DataConfig | None = None,
    views: ViewsConfig | None = None,
    source: Any = None,
    val: Any = None,
    **settings: Any,
) -> Features:
    """The features of all images, as ``sacl-fast features`` writes them: ``.features`` (N, F)
    float32, mapped from a temporary file; ``.labels`` (N,), ``.names``, ``.classes``.

    Args:
        encoder, data, views, source, val: as of the evaluations.
        settings: ``width``, ``split``, ``images``, ``normalise``, ``batch_size`` and others of
            ``sacl_fast.config.looking.FeaturesConfig``; ``out``: the file to write too.
    """
    given = {} if data is None else {"data": data}
    _check_names(FeaturesConfig, settings)
    images = Given(source, val)
    refuse_both(data, images)
    path = user_path(settings["out"], "out") if settings.get("out") is not None else None
    if path is not None:
        check_writable(path)
        check_new([path])
    if isinstance(encoder, nn.Module):
        shown = _views_of_module(data, views, images)
        wanted = FeaturesConfig(**given, **settings)
        found = features_of_module(encoder, shown, wanted, None, given=images)
    else:
        _refuse_views(views)
        trained = open_trained(encoder)
        default = features_defaults(trained)
        wanted = replace(default, **given, **settings)
        found = features_of_trained(trained, wanted, None, quiet=True, given=images)
    if path is not None:
        with made_folder(path.parent):
            write_features(found, path)
    return found


def _check_names(kind: type[Settings], settings: dict[str, Any]) -> None:
    if unknown := settings.keys() - rules(kind).keys():
        name = min(unknown)
        raise UserError(f"unknown setting {name}; {nearest(name, rules(kind))}")


def _evaluate(
    kind: type[_S],
    encoder: _Encoder,
    data: DataConfig | None,
    eval: EvalConfig | None,
    views: ViewsConfig | None,
    images: Given,
    settings: dict[str, Any],
) -> Result:
    _check_names(kind, settings)
    refuse_both(data, images)
    given = {"data": data, "eval": eval}
    changes = {**{k: v for k, v in given.items() if v is not None}, **settings}
    if isinstance(encoder, nn.Module):
        shown = _views_of_module(data, views, images)
        wanted = replace(kind(), **changes)
        wanted = replace(wanted, data=as_given(wanted.data, images))
        return evaluate_module(encoder, shown, wanted, given=images)
    _refuse_views(views)
    trained = open_trained(encoder)
    wanted = replace(defaults(kind, trained), **changes)
    wanted = replace(wanted, data=as_given(wanted.data, images))
    return evaluate_trained(trained, wanted, write=False, quiet=True, given=images)


def _views_of_module(
    data: DataConfig | None, views: ViewsConfig | None, images: Given
) -> ViewsConfig:
    if (data is None and images.source is None) or views is None:
        raise UserError(
            "a module does not say on which images to evaluate it; data=DataConfig(...) or "
            "source=, and views=ViewsConfig(size=...) do"
        )
    return views


def _refuse_views(views: ViewsConfig | None) -> None:
    if views is not None:
        raise UserError("views are those of the run or the file; without views works")
