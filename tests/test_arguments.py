"""Public functions and classes refuse arguments of another kind, mistyped choices, NaN and the
like: each of their arguments in turn, by its annotation."""

import inspect
import math
from collections.abc import Callable
from typing import Annotated, Any, Literal, get_args, get_origin, get_type_hints

import pytest
import torch
from torch import nn

from sacl_fast.config import EvalConfig, LossConfig, OptimConfig
from sacl_fast.encoders import Projector, build_encoder, output_dim
from sacl_fast.errors import UserError
from sacl_fast.evaluation.evaluate import evaluate_encoders
from sacl_fast.evaluation.features import extract_features
from sacl_fast.evaluation.knn import knn_accuracy
from sacl_fast.losses import BarlowTwinsLoss, SaclXdLoss
from sacl_fast.ops.backend import resolve, resolve_all
from sacl_fast.optim import Lars, build_optimizer, learning_rate
from sacl_fast.passes import RecordedEncoder
from sacl_fast.slim import Slicer
from sacl_fast.slim.conv import SlimConv2d
from sacl_fast.slim.slicer import strongest_filters

CPU = torch.device("cpu")


def encoder() -> nn.Module:
    return nn.Sequential(nn.Conv2d(3, 4, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())


def weights() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 2))]


def batches() -> list[tuple[torch.Tensor, torch.Tensor]]:
    return [(torch.rand(4, 3, 8, 8), torch.tensor([0, 1, 0, 1]))]


# Each public callable with arguments that work.
CALLS: list[tuple[Callable[..., Any], Callable[[], dict[str, Any]]]] = [
    (SaclXdLoss, dict),
    (BarlowTwinsLoss, dict),
    (Slicer, lambda: {"encoder": encoder()}),
    (strongest_filters, lambda: {"weight": torch.ones(4, 3, 1, 1), "ratio": 0.5}),
    (SlimConv2d, lambda: {"in_channels": 3, "out_channels": 4, "kernel_size": 1}),
    (RecordedEncoder, lambda: {"slicer": Slicer(encoder())}),
    (Lars, lambda: {"params": weights(), "lr": 0.1}),
    (build_optimizer, lambda: {"parameters": weights(), "config": OptimConfig()}),
    (learning_rate, lambda: {"step": 1, "base": 0.1, "warmup_steps": 2, "total_steps": 9}),
    (build_encoder, lambda: {"name": "resnet20", "image_size": 32}),
    (output_dim, lambda: {"encoder": encoder(), "image_size": 32}),
    (Projector, lambda: {"in_dim": 4, "hidden": 4, "out": 4}),
    (
        knn_accuracy,
        lambda: {
            **{"bank": torch.eye(4), "bank_labels": torch.arange(4)},
            **{"queries": torch.eye(4), "query_labels": torch.arange(4)},
            **{"k": 1, "temperature": 0.1, "num_classes": 4},
        },
    ),
    (
        evaluate_encoders,
        lambda: {
            **{"encoder": encoder(), "bank_loader": batches(), "query_loader": batches()},
            **{"config": EvalConfig(), "num_classes": 2, "device": CPU, "amp_dtype": None},
            "slicer": Slicer(encoder(), 1.0),
        },
    ),
    (extract_features, lambda: {"encoder": encoder(), "loader": batches(), "device": CPU}),
    (resolve, lambda: {"backend": "auto", "op": "slim_pointwise", "device": CPU}),
    (resolve_all, lambda: {"backend": "auto", "device": CPU}),
]
IDS = [call.__name__ for call, _ in CALLS]


def wrong(annotation: Any) -> list[Any]:
    """Values that an argument so annotated must refuse; none where anything goes."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return wrong(args[0])
    if origin is Literal:
        return [text + "x" for text in args] + ["", None, 3, True]
    if origin is tuple:
        return ["abc", 3, [object()]]
    if annotation is int:
        return [1.5, "1", None, True, math.nan, math.inf, 10**30, -1]
    if annotation is float:
        return ["0.5", None, True, math.nan, math.inf, -math.inf, 10**400, object()]
    if annotation is bool:
        return [0, 1, "yes", None]
    if annotation is str:
        return [3, None, "", b"x"]
    if type(None) in args:
        return [value for value in wrong(args[0]) if value is not None]
    if origin is None and isinstance(annotation, type) and annotation is not Any:
        return [3, "text", None, annotation]
    return []


@pytest.mark.parametrize(("call", "fitting"), CALLS, ids=IDS)
def test_each_argument_is_checked(call: Callable[..., Any], fitting: Callable[[], dict[str, Any]]):
    call(**fitting())
    function = call.__init__ if isinstance(call, type) else call
    hints = get_type_hints(function, include_extras=True)
    tried = 0
    for name in inspect.signature(function).parameters:
        for value in wrong(hints.get(name)):
            tried += 1
            with pytest.raises(UserError, match=rf"^{call.__name__}: {name}(\[0\])? is .* work"):
                call(**{**fitting(), name: value})
    assert tried >= 4


def test_keywords_beside_a_loss_config_count():
    config = LossConfig(alpha=0.5, scale=2.0)
    assert SaclXdLoss(config, alpha=0.1).config == LossConfig(alpha=0.1, scale=2.0)
    assert SaclXdLoss(config).config == config
    wrong: Any
    for wrong in ({"alpha": 2}, {"distillation": "corelation"}, {"eps": math.nan}):
        with pytest.raises(UserError, match=r"^loss"):
            SaclXdLoss(config, **wrong)
        with pytest.raises(UserError, match=r"^loss"):
            SaclXdLoss(**wrong)
    with pytest.raises(TypeError, match="alfa"):
        SaclXdLoss(alfa=0.1)


@pytest.mark.parametrize("kept", [0, 1.5, "half", math.nan, torch.ones(3, dtype=torch.bool)])
def test_a_slim_convolution_keeps_some_of_its_filters(kept):
    with pytest.raises(UserError):
        SlimConv2d(3, 4, 1).keep(kept)
