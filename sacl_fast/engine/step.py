"""One training step: four passes, loss, backward, update. Nothing in it waits for the device."""

from __future__ import annotations

from itertools import chain

import torch
from torch import Tensor, nn

from sacl_fast.config import Config
from sacl_fast.encoders.onednn import avoid_memory_overwrite
from sacl_fast.engine.cuda_graph import Graphs, StepGraph, wants_graph
from sacl_fast.engine.data_parallel import data_parallel
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import Embeddings, SaclXd
from sacl_fast.losses import SaclXdLoss
from sacl_fast.ops.backend import resolve_all
from sacl_fast.ops.xcorr_loss import LossParts
from sacl_fast.optim import build_optimizer, learning_rate
from sacl_fast.precision import autocast, autocast_dtype


class TrainingStep:
    """Model, loss, optimiser and schedule of a run, and the step over them."""

    def __init__(
        self, method: SaclXd, config: Config, ranks: Ranks, *, steps_per_epoch: int
    ) -> None:
        device = ranks.device
        self.backends = resolve_all(config.backend, device)
        self.config = config
        self.device = device
        self.amp_dtype = autocast_dtype(config.precision, device)
        self.method = _on_device(method, device, channels_last=config.channels_last)
        self.model: nn.Module = self.method
        if ranks.world_size > 1:
            self.model = data_parallel(method, config)
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
        self.graph: StepGraph | None = None
        if wants_graph(config, device, ranks.world_size):
            self.graph = StepGraph(self, Graphs(device), world_size=ranks.world_size)

    def __call__(
        self, view_a: Tensor, view_b: Tensor, step: int
    ) -> tuple[Tensor, LossParts, Tensor]:
        """One step on two views (n, 3, H, W). Returns the loss, its parts and ``z1``, detached;
        the next step may overwrite them."""
        self.set_step(step)
        return (self.graph or self.compute)(view_a, view_b)

    def set_step(self, step: int) -> None:
        """Tell the device which step this is."""
        self.number.fill_(step)
        self.lr.fill_(self.learning_rate(step))

    def compute(self, view_a: Tensor, view_b: Tensor) -> tuple[Tensor, LossParts, Tensor]:
        """The step that was set, on the device alone."""
        embeddings = self.four_passes(view_a, view_b)
        loss, parts = self.criterion(*embeddings)
        self.backward(loss)
        self.update()
        self.note_nonfinite(loss.detach())
        return loss.detach(), parts, embeddings.z1.detach()

    def four_passes(self, view_a: Tensor, view_b: Tensor) -> Embeddings:
        with autocast(self.device, self.amp_dtype):
            return self.model(view_a, view_b)

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()

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


def _on_device(method: SaclXd, device: torch.device, *, channels_last: bool) -> SaclXd:
    method = method.to(device)
    memory_format = torch.channels_last if channels_last else torch.contiguous_format
    for tensor in chain(method.parameters(), method.buffers()):
        if tensor.ndim == 4:  # Module.to would try others, a 3-D convolution's, and fail
            tensor.data = tensor.data.to(memory_format=memory_format)
    if device.type == "cpu":
        avoid_memory_overwrite(method)
    return method
