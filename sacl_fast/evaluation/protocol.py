"""Linear evaluation by the usual protocol: a linear layer on a frozen encoder in eval mode, trained
by SGD (momentum 0.9) on random resized crops and flips.

============  ======  ==========  =====================  ============
classes       epochs  rate        schedule               weight decay
============  ======  ==========  =====================  ============
1,000 or more 100     0.3         cosine to 0            1e-5
fewer         100     0.1         / 10 at 60 %, at 80 %  0
============  ======  ==========  =====================  ============

All encoders see the same crops, so that they are made once. Each epoch leaves a checkpoint.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sacl_fast.checks import counted
from sacl_fast.config import Config, to_dict
from sacl_fast.config.evaluation import LinearEvaluation
from sacl_fast.data.loading.batch import Normalise
from sacl_fast.data.loading.crops import CropLoader
from sacl_fast.engine.checkpoint import (
    UnusableCheckpoint,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from sacl_fast.errors import UserError
from sacl_fast.evaluation.images import ChosenImages
from sacl_fast.evaluation.networks import Network
from sacl_fast.evaluation.progress import EvaluationProgress
from sacl_fast.optim.schedule import learning_rate
from sacl_fast.precision import autocast

logger = logging.getLogger(__name__)

STATE = "linear_state"
_MANY = 1000  # classes: ImageNet-1K's
_MOMENTUM = 0.9
_TIMED = 5  # steps, after the first
_CONTENT: dict[str, type | tuple[type, ...]] = {"step": int, "of": str, "layers": dict,
                                                "optimizers": dict}  # fmt: skip


@dataclass(frozen=True)
class Rates:
    """The learning rate at each step, and the weight decay."""

    base: float
    cosine: bool
    weight_decay: float

    def at(self, step: int, steps: int) -> float:
        if self.cosine:
            return learning_rate(step, base=self.base, warmup_steps=0, total_steps=steps)
        return self.base * 0.1 ** sum(10 * step >= part * steps for part in (6, 8))


def rates_of(settings: LinearEvaluation, classes: int) -> Rates:
    """Those of the protocol for so many classes, but for what the settings name."""
    many = classes >= _MANY
    lr = settings.lr if settings.lr is not None else 0.3 if many else 0.1
    decay = settings.weight_decay
    schedule = settings.schedule
    return Rates(
        lr,
        many if schedule == "auto" else schedule == "cosine",
        decay if decay is not None else 1e-5 if many else 0.0,
    )


@dataclass
class Layer:
    """A linear layer on one network, and what trains it."""

    network: Network
    encoder: nn.Module
    normalise: Normalise
    linear: nn.Linear
    optimizer: torch.optim.SGD


def train_layers(
    networks: Sequence[Network],
    images: ChosenImages,
    settings: LinearEvaluation,
    config: Config,
    device: torch.device,
    amp_dtype: torch.dtype | None,
    folder: Path | None,
    progress: EvaluationProgress,
) -> list[Layer]:
    """A layer for each network, trained as above.

    Args:
        folder: where the state is kept after each epoch; None: nowhere.

    Raises:
        UserError: there are fewer training images than fill a batch, or what is in ``folder`` is
            of another evaluation.
    """
    classes = len(images.train.classes)
    config = replace(config, batch_size=settings.batch_size)
    loader = CropLoader(images.train, images.train_index, config, device)
    rates, per_epoch = rates_of(settings, classes), loader.steps_per_epoch
    steps = settings.epochs * per_epoch
    layers = [
        _layer(network, classes, rates, settings.seed, config, device) for network in networks
    ]
    state = _State(folder, _fingerprint(layers, images, settings, classes))
    done = state.restore(layers)
    labels = torch.from_numpy(images.train.labels)
    tell = progress.steps(
        f"linear layers on {len(layers)} encoders: {counted(settings.epochs, 'epoch')}", steps, done
    )
    timer = _Timer(steps - done, settings.epochs - done // per_epoch, device)
    batches = loader.batches(done)
    try:
        for step in range(done, steps):
            pixels, index = next(batches)
            targets = labels[index].to(device, non_blocking=True)
            for layer in layers:
                layer.optimizer.param_groups[0]["lr"] = rates.at(step, steps)
                _learn(layer, pixels, targets, device, amp_dtype)
            tell()
            timer.stepped()
            if (step + 1) % per_epoch == 0:
                for layer in layers:
                    _require_finite(layer)
                state.save(step + 1, layers)
    finally:
        batches.close()
    return layers


def top_of(layer: Layer, features: Tensor, count: int = 5) -> Tensor:
    """The ``count`` likeliest classes (N, count) of features (N, F)."""
    with torch.no_grad():
        logits = layer.linear(features)
    return logits.topk(min(count, logits.shape[1]), dim=1).indices


def _layer(
    network: Network, classes: int, rates: Rates, seed: int, config: Config, device: torch.device
) -> Layer:
    encoder = network.build().eval()
    with torch.no_grad():
        size = network.views.size
        features = encoder(torch.zeros(1, 3, size, size, device=device)).shape[1]
    linear = nn.Linear(features, classes)
    generator = torch.Generator().manual_seed(seed % 2**63)
    with torch.no_grad():  # as in the linear evaluations of MoCo and Barlow Twins
        linear.weight.normal_(0, 0.01, generator=generator)
        linear.bias.zero_()
    linear.to(device)
    optimizer = torch.optim.SGD(
        linear.parameters(), lr=rates.base, momentum=_MOMENTUM, weight_decay=rates.weight_decay
    )
    normalise = Normalise(network.views, device, config.channels_last)
    return Layer(network, encoder, normalise, linear, optimizer)


def _learn(
    layer: Layer,
    pixels: Tensor,
    targets: Tensor,
    device: torch.device,
    amp_dtype: torch.dtype | None,
) -> None:
    with torch.no_grad(), autocast(device, amp_dtype):
        features = layer.encoder(layer.normalise(pixels)).float()
    with torch.enable_grad():
        loss = F.cross_entropy(layer.linear(features), targets)
        layer.optimizer.zero_grad()
        loss.backward()
    layer.optimizer.step()


def _require_finite(layer: Layer) -> None:
    if not layer.linear.weight.isfinite().all():
        raise UserError(
            f"the linear layer on the encoder ({layer.network.name}) diverged; a lower --lr works"
        )


class _Timer:
    """Says once how long the rest will take."""

    def __init__(self, steps: int, epochs: int, device: torch.device) -> None:
        self._steps, self._epochs, self._device = steps, epochs, device
        self._done, self._began = 0, 0.0

    def stepped(self) -> None:
        self._done += 1
        if self._done == 1:  # the first one allocates and compiles
            self._began = self._now()
        elif self._done == 1 + _TIMED:
            each = (self._now() - self._began) / _TIMED
            logger.info(
                "%s will take about %s (%.3g s a step, measured on the first %d of %s); "
                "--fast takes the time of one",
                counted(self._epochs, "epoch"), _duration(each * self._steps), each, _TIMED,
                f"{self._steps:,}",
            )  # fmt: skip

    def _now(self) -> float:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return time.perf_counter()


def _duration(seconds: float) -> str:
    minutes = round(seconds / 60)
    if minutes < 2:
        return f"{max(1, round(seconds))} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


# --- what is kept ---------------------------------------------------------------------------------


class _State:
    """The layers after the last whole epoch, in a folder in that of the results."""

    def __init__(self, folder: Path | None, of: str) -> None:
        self.folder, self.of = None if folder is None else folder / STATE, of

    def save(self, step: int, layers: Sequence[Layer]) -> None:
        if self.folder is None:
            return
        by_name: Callable[[str], dict[str, Any]] = lambda part: {  # noqa: E731
            layer.network.name: getattr(layer, part).state_dict() for layer in layers
        }
        state = {
            "step": step,
            "of": self.of,
            "layers": by_name("linear"),
            "optimizers": by_name("optimizer"),
        }
        save_checkpoint(checkpoint_path(self.folder, step), state, keep=1)

    def restore(self, layers: Sequence[Layer]) -> int:
        """Steps done before; 0 where there is nothing of this evaluation."""
        for path in [] if self.folder is None else list_checkpoints(self.folder)[::-1]:
            try:
                state = load_checkpoint(path, _CONTENT)
            except UnusableCheckpoint as error:
                logger.warning("%s; beginning anew", error)
                continue
            if state["of"] != self.of:
                logger.warning("%s is of another evaluation; beginning anew", path)
                continue
            for layer in layers:
                layer.linear.load_state_dict(state["layers"][layer.network.name])
                layer.optimizer.load_state_dict(state["optimizers"][layer.network.name])
            logger.info("going on after step %d (%s)", state["step"], path)
            return state["step"]
        return 0


def remove_state(folder: Path) -> None:
    """Remove what ``train_layers`` kept, once the result is written."""
    with contextlib.suppress(OSError):
        for path in list_checkpoints(folder / STATE):
            path.unlink()
        (folder / STATE).rmdir()


def _fingerprint(
    layers: Sequence[Layer], images: ChosenImages, settings: LinearEvaluation, classes: int
) -> str:
    """Of all that the layers depend on: weights, images by their order and labels, settings."""
    hashed = hashlib.sha256()
    for part in _parts(layers, images, settings, classes):
        hashed.update(part)
    return hashed.hexdigest()


def _parts(
    layers: Sequence[Layer], images: ChosenImages, settings: LinearEvaluation, classes: int
) -> Iterator[bytes]:
    values = to_dict(settings)
    kept = ("epochs", "lr", "schedule", "weight_decay", "batch_size", "seed", "precision")
    yield repr([values[name] for name in kept] + [classes]).encode()
    yield images.train_index.tobytes()
    yield images.train.labels[images.train_index].tobytes()
    for place in images.train_index[:: max(1, len(images.train_index) // 1000)]:
        yield images.train.identity(int(place))
    for layer in layers:
        yield repr((layer.network.name, layer.network.views)).encode()
        # Statistics may be estimated anew, on a GPU with other last digits.
        for weight in layer.encoder.parameters():
            yield weight.detach().cpu().contiguous().numpy().tobytes()
