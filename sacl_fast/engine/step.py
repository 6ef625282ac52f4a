"""One training step: four passes, loss, backward, update. Nothing in it waits for the device."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from itertools import chain
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.dlpack import from_dlpack, to_dlpack

from sacl_fast.config import Config
from sacl_fast.encoders.onednn import avoid_memory_overwrite
from sacl_fast.engine.cuda_graph import Graphs, StepGraph, wants_graph
from sacl_fast.engine.data_parallel import data_parallel
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import Embeddings, SaclXd
from sacl_fast.engine.regions import region
from sacl_fast.losses import SaclXdLoss
from sacl_fast.ops.backend import resolve_all
from sacl_fast.ops.xcorr_loss import LossParts
from sacl_fast.optim import build_optimizer, learning_rate
from sacl_fast.precision import autocast, autocast_dtype


class Reading(NamedTuple):
    """What a step, or a part of it, came to, detached."""

    loss: Tensor  # ()
    parts: LossParts
    z1: Tensor  # (n, D)


class TrainingStep:
    """Model, loss, optimiser and schedule of a run, and the step over them."""

    def __init__(
        self, method: SaclXd, config: Config, ranks: Ranks, *, steps_per_epoch: int
    ) -> None:
        device = ranks.device
        self.backends = resolve_all(config.backend, device)
        self.config = config
        self.ranks = ranks
        self.device = device
        self.amp_dtype = autocast_dtype(config.precision, device)
        self.method = _on_device(method, device, channels_last=config.channels_last)
        graphs = Graphs(device) if wants_graph(config, device, ranks.world_size) else None
        self.model: nn.Module = self.method
        if ranks.world_size > 1:
            make = partial(data_parallel, method, config)
            self.model = graphs.beside(make) if graphs else make()
        self.criterion = SaclXdLoss(config.loss, backend=self.backends["xcorr_loss"].backend)
        self.optimizer = build_optimizer(
            method.parameters(), config.optim, backend=self.backends["lars"].backend
        )
        self.scaler = self._new_scaler()
        self.steps_per_epoch = steps_per_epoch
        self.number = torch.tensor(0, device=device)
        """Of the step that is computed; with ``lr`` all that a step takes from the host."""
        self.lr = torch.tensor(0.0, device=device)
        """Its learning rate."""
        self.first_nonfinite = torch.tensor(-1, device=device)
        """The first step whose loss was not finite, -1 while there is none."""
        self.graph = StepGraph(self, graphs, world_size=ranks.world_size) if graphs else None

    def __call__(self, view_a: Tensor, view_b: Tensor, step: int) -> Reading:
        """One step on two views (n, 3, H, W). Returns the loss and its parts, where gradients are
        accumulated their means, and ``z1``, then the last part's; the next step may overwrite
        them."""
        self.set_step(step)
        return (self.graph or self.compute)(view_a, view_b)

    def set_step(self, step: int) -> None:
        """Tell the device which step this is."""
        self.number.fill_(step)
        self.lr.fill_(self.learning_rate(step))

    def compute(self, view_a: Tensor, view_b: Tensor) -> Reading:
        """The step that was set, on the device alone."""
        n = self.config.engine.accumulate
        parts = enumerate(zip(_parts(view_a, n), _parts(view_b, n), strict=True))
        reading = _mean([self.gradients(a, b, i) for i, (a, b) in parts])
        with region("update"):
            self.update()
        self.note_nonfinite(reading.loss)
        return reading

    def gradients(self, view_a: Tensor, view_b: Tensor, part: int = 0) -> Reading:
        """Those of the batch's first part, or added to them a later one's."""
        if part == 0:  # before the passes, whose activations take the memory
            self.optimizer.zero_grad(set_to_none=True)
        last = part == self.config.engine.accumulate - 1
        with nullcontext() if last else self.alone():
            embeddings = self.four_passes(view_a, view_b)
            with region("loss"):
                loss, parts = self.criterion(*embeddings)
            with region("backward"):
                self.backward(loss, fresh=False)
        return Reading(loss.detach(), parts, embeddings.z1.detach())

    def alone(self) -> AbstractContextManager[object]:
        """Within it, gradients are not exchanged among ranks."""
        model = self.model
        return model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext()

    def four_passes(self, view_a: Tensor, view_b: Tensor) -> Embeddings:
        with autocast(self.device, self.amp_dtype):
            return self.model(view_a, view_b)

    def backward(self, loss: Tensor, *, fresh: bool = True) -> None:
        if fresh:
            self.optimizer.zero_grad(set_to_none=True)
        n = self.config.engine.accumulate
        self.scaler.scale(loss / n if n > 1 else loss).backward()

    def update(self) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = self.lr
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def renew_scaler(self) -> None:
        """Have the loss scaled as before, by a scaler that is in the midst of no step."""
        state, self.scaler = self.scaler.state_dict(), self._new_scaler()
        if state:
            self.scaler.load_state_dict(state)

    def _new_scaler(self) -> torch.amp.GradScaler:
        return torch.amp.GradScaler(self.device.type, enabled=self.amp_dtype is torch.float16)

    def learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            base=self.config.base_lr,
            warmup_steps=round(self.config.warmup_epochs * self.steps_per_epoch),
            total_steps=self.config.epochs * self.steps_per_epoch,
        )

    def note_nonfinite(self, loss: Tensor) -> None:
        """Remember on the device the first step whose loss was not finite."""
        fresh = (self.first_nonfinite < 0) & ~torch.isfinite(loss)
        self.first_nonfinite.copy_(torch.where(fresh, self.number, self.first_nonfinite))

    def weights_are_finite(self) -> bool:
        """Whether the last update left all parameters finite. Waits for the device."""
        with torch.no_grad():
            norms = torch._foreach_norm(list(self.method.parameters()), float("inf"))
        return bool(torch.stack(norms).isfinite().all())


def _parts(view: Tensor, n: int) -> Iterator[Tensor]:
    """A batch (N, 3, H, W) in n equal parts, in the same memory and layout."""
    if n == 1:
        yield view
        return
    for part in view.chunk(n):
        # Each at the beginning of a storage: to what has recorded a pass, all are of one kind.
        yield from_dlpack(to_dlpack(part))


def _mean(readings: list[Reading]) -> Reading:
    if len(readings) == 1:
        return readings[0]
    values = torch.stack([torch.stack([r.loss, *r.parts]) for r in readings])  # (n, 4)
    loss, *parts = values.mean(0).unbind()
    return Reading(loss, LossParts(*parts), readings[-1].z1)


def _on_device(method: SaclXd, device: torch.device, *, channels_last: bool) -> SaclXd:
    method = method.to(device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for tensor in chain(method.parameters(), method.buffers()):
        if tensor.ndim == 4:  # Module.to would try others, a 3-D convolution's, and fail
            tensor.data = tensor.data.to(memory_format=memory_format)
    if device.type == "cpu":
        avoid_memory_overwrite(method)
    return method
