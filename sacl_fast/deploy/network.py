"""The encoder at one width, as it is exported."""

from __future__ import annotations

import copy
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace

from torch import Tensor, nn

from sacl_fast.checks import Ratio, check
from sacl_fast.deploy.fold import fold_batch_norms
from sacl_fast.encoders.file import encoder_metadata
from sacl_fast.errors import UserError
from sacl_fast.evaluation.trained import Trained, Width, fresh_slicer
from sacl_fast.slim import Slicer
from sacl_fast.slim.export import compact_zeroed

logger = logging.getLogger(__name__)

Batches = Callable[[], Iterable[Tensor]]
"""Gives batches of normalised training images (N, 3, S, S)."""


@dataclass(frozen=True)
class Network:
    """An encoder of normalised images (N, 3, size, size), in eval mode on the CPU."""

    width: str
    """``dense``, ``slim`` or a ratio such as ``0.25``."""
    reference: nn.Module
    """At full size, with filters that are not kept as zeros: what exports are held against."""
    module: nn.Module
    """The same, without those filters: what graphs are made of."""
    metadata: Mapping[str, str]
    """See ``encoders.file``."""

    @property
    def state(self) -> dict[str, Tensor]:
        return self.reference.state_dict()

    @property
    def size(self) -> int:
        return int(self.metadata["image_size"])

    @property
    def mean(self) -> tuple[float, ...]:
        return tuple(json.loads(self.metadata["mean"]))

    @property
    def std(self) -> tuple[float, ...]:
        return tuple(json.loads(self.metadata["std"]))


def read_widths(widths: Iterable[object]) -> tuple[Width | float, ...]:
    """``dense``, ``slim`` and ratios, each once; a ratio may be a text.

    Raises:
        UserError: another name, a number outside (0, 1], or none at all.
    """
    found: list[Width | float] = []
    for given in widths:
        if given in ("dense", "slim"):
            found.append(given)
            continue
        try:
            ratio = float(given)  # type: ignore[arg-type]
        except (TypeError, ValueError):
            raise UserError(
                f"width is {given!r}; dense, slim or a number above 0 and at most 1 works"
            ) from None
        found.append(check(ratio, Ratio, "width"))
    if not found:
        raise UserError("no width is given; dense, slim or a number above 0 and at most 1 works")
    return tuple(dict.fromkeys(found))


def needs_images(trained: Trained, widths: Iterable[Width | float]) -> bool:
    """Whether batch-norm statistics of one of these widths are to be estimated."""
    return any(width not in trained.states and width != 1.0 for width in widths)


def make_network(trained: Trained, width: Width | float, batches: Batches | None) -> Network:
    """The encoder at a width: dense, slim as it was trained, or with the filters of largest L1 norm
    at another ratio.

    Args:
        batches: for the statistics that are not known; None where there are no images.

    Raises:
        UserError: it does not hold that width, or there are no images and it takes some.
    """
    config, knn = trained.config, {**trained.knn, **trained.label_free}
    if isinstance(width, str):
        state = trained.state(width, batches)
    elif width == 1:
        state = trained.state("dense", batches)
    else:
        state = _at_ratio(trained, width, batches)
        config, knn = replace(config, slim=replace(config.slim, ratio=width)), {}
    name = width if isinstance(width, str) else f"{width:g}"
    is_slim = width not in ("dense", 1.0)
    reference = copy.deepcopy(trained.encoder).requires_grad_(False).eval()
    reference.load_state_dict(state)
    metadata = encoder_metadata(
        config,
        epochs=trained.epochs,
        steps=trained.steps,
        images=trained.images,
        knn=knn,
        slim=is_slim,
    )
    module = fold_batch_norms(compact_zeroed(reference)) if is_slim else reference
    return Network(name, reference, module, metadata)


def check_ratio(trained: Trained) -> None:
    """Refuse to slim an encoder to a ratio that it was not trained at, where that cannot be."""
    if "dense" not in trained.widths:
        raise UserError(
            f"{trained.path} holds the slim encoder only, in which filters at another ratio cannot "
            "be chosen; the run folder or its encoder.safetensors works"
        )
    if not _slicer_of(trained).kept:
        name = trained.config.encoder.name
        raise UserError(f"encoder {name} has no convolution to slim; width dense works")


def _slicer_of(trained: Trained) -> Slicer:
    """A slicer of the encoder's, with an encoder of its own."""
    if trained.slicer is not None:
        return copy.deepcopy(trained.slicer)
    return fresh_slicer(copy.deepcopy(trained.encoder), trained.config)


def _at_ratio(trained: Trained, ratio: float, batches: Batches | None) -> dict[str, Tensor]:
    """The full-size state of the encoder with the strongest filters at a ratio."""
    if batches is None:
        raise UserError(
            f"width {ratio:g} needs training images, from which batch-norm statistics are "
            "estimated; --data.root names them"
        )
    logger.info("estimating the batch-norm statistics of width %g", ratio)
    slicer = _slicer_of(trained)
    slicer.ratio, slicer.enabled = ratio, True
    slicer.refresh()
    slicer.recalibrate(batches())
    return slicer.slim_state()
