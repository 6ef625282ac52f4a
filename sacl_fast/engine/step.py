"""One training step: four passes, loss, backward, update. Nothing in it waits for the device."""

from __future__ import annotations

import warnings
from functools import partial
from itertools import chain

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sacl_fast.config import Config
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import Embeddings, SaclXd
from sacl_fast.errors import UserError
from sacl_fast.losses import SaclXdLoss
from sacl_fast.ops.backend import of_slim_operators, resolve_all
from sacl_fast.ops.slim_channels import take_pixels
from sacl_fast.ops.xcorr_loss import LossParts
from sacl_fast.optim import build_optimizer, learning_rate
from sacl_fast.slim import RecordedEncoder
from sacl_fast.slim.slicer import Mode
from sacl_fast.slim.tensor import SlimTensor

_STEPS_WORTH_RECORDING = 30
"""Between two choices of filters. Recording the slim passes takes as long as some 20 steps with
them save (ResNet-20 at 32 px, MobileNet-V3 and EfficientNet-B0 at 32 to 112 px; 14 to 25)."""


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """The autocast type of ``auto``, ``fp32``, ``bf16`` or ``fp16`` on a device; None: fp32.

    ``auto`` is bf16 where the GPU computes in it. Older ones emulate it, slowly, and the range of
    fp16 is not always enough for the gradients of the slim passes, so there it is fp32.
    """
    if precision == "auto":
        precision = "bf16" if device.type == "cuda" and _computes_bf16(device) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise UserError("precision 'fp16' needs a GPU; 'fp32' and 'bf16' work on a CPU")
    return {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}[precision]


def precision_reason(precision: str, device: torch.device) -> str | None:
    """A line for whoever could train faster; None where ``auto`` is the fastest already."""
    if precision != "auto" or device.type != "cuda" or _computes_bf16(device):
        return None
    return (
        f"precision auto: fp32, because {torch.cuda.get_device_name(device)} is older than bf16; "
        "--precision fp16 is faster where its range is enough"
    )


def _computes_bf16(device: torch.device) -> bool:
    return bool(torch.version.hip) or torch.cuda.get_device_capability(device) >= (8, 0)


def stay_within_memory(model: nn.Module) -> None:
    """Compute some convolutions differently, in training of which oneDNN overwrites memory.

    For the weight gradient of a 1x1 convolution with a stride, in channels-last memory, of fewer
    than 16 channels it reserves too little (seen with version 3.10 in torch 2.11, AVX-512).
    """
    for module in model.modules():
        if (
            isinstance(module, nn.Conv2d)
            and type(module).forward is nn.Conv2d.forward  # others may change the weight
            and (module.kernel_size, module.padding) == ((1, 1), (0, 0))
            and (module.stride != (1, 1) and module.groups == 1 and module.in_channels < 16)
        ):
            module.forward = partial(_convolve_what_is_read, module)


def _convolve_what_is_read(conv: nn.Conv2d, input: Tensor) -> Tensor:
    if isinstance(input, SlimTensor):  # whose rule does so
        return nn.Conv2d.forward(conv, input)
    down, right = conv.stride
    return F.conv2d(take_pixels(input, (down, right)), conv.weight, conv.bias)


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
        memory_format = torch.channels_last if config.channels_last else torch.contiguous_format
        self.method = method.to(device)
        for tensor in chain(method.parameters(), method.buffers()):
            if tensor.ndim == 4:  # Module.to would try others, a 3-D convolution's, and fail
                tensor.data = tensor.data.to(memory_format=memory_format)
        if device.type == "cpu":
            stay_within_memory(method)
        self.model: nn.Module = self.method
        if ranks.world_size > 1:
            # A 1x1 weight lies in memory in two ways at once; DDP copies either and warns of one.
            warnings.filterwarnings("ignore", "Grad strides do not match bucket view strides")
            synchronized = config.encoder.sync_batch_norm
            self.model = DistributedDataParallel(method, broadcast_buffers=not synchronized)
        self.method.slicer.backend = of_slim_operators(self.backends).for_calls
        self.method.slim_mode, self.slim_mode_reason = self._slim_mode()
        steps = config.slim.refresh_steps or steps_per_epoch
        if self.method.slim_mode == "skip" and steps >= _STEPS_WORTH_RECORDING:
            self.method.recorded = RecordedEncoder(method.slicer)
        self.criterion = SaclXdLoss(config.loss, backend=self.backends["xcorr_loss"].backend)
        self.optimizer = build_optimizer(method.parameters(), config.optim)
        self.scaler = torch.amp.GradScaler(device.type, enabled=self.amp_dtype is torch.float16)
        self.steps_per_epoch = steps_per_epoch
        self.first_nonfinite = torch.tensor(-1, device=device)
        """The first step whose loss was not finite, -1 while there is none."""

    def _slim_mode(self) -> tuple[Mode, str]:
        """How the slim passes run, and why."""
        config, backend = self.config, of_slim_operators(self.backends).backend
        if config.slim.mode != "auto":
            return config.slim.mode, "as requested"
        if backend != "cpu" or self.amp_dtype is not None or not config.channels_last:
            return "mask", "skip is the faster one on the compiled CPU operators, in float32 only"
        return "skip", "the faster one on the compiled CPU operators"

    def __call__(
        self, view_a: Tensor, view_b: Tensor, step: int
    ) -> tuple[Tensor, LossParts, Tensor]:
        """One step on two views (n, 3, H, W). Returns the loss, its parts and ``z1``, detached."""
        embeddings = self.four_passes(view_a, view_b)
        loss, parts = self.criterion(*embeddings)
        self.backward(loss)
        self.update(step)
        self.note_nonfinite(loss.detach(), step)
        return loss.detach(), parts, embeddings.z1.detach()

    def four_passes(self, view_a: Tensor, view_b: Tensor) -> Embeddings:
        with self.autocast():
            return self.model(view_a, view_b)

    def backward(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()

    def update(self, step: int) -> None:
        lr = self.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()

    def autocast(self) -> torch.autocast:
        enabled = self.amp_dtype is not None
        return torch.autocast(self.device.type, self.amp_dtype or torch.bfloat16, enabled=enabled)

    def learning_rate(self, step: int) -> float:
        return learning_rate(
            step,
            base=self.config.base_lr,
            warmup_steps=round(self.config.warmup_epochs * self.steps_per_epoch),
            total_steps=self.config.epochs * self.steps_per_epoch,
        )

    def note_nonfinite(self, loss: Tensor, step: int) -> None:
        """Remember on the device the first step whose loss was not finite."""
        fresh = (self.first_nonfinite < 0) & ~torch.isfinite(loss)
        self.first_nonfinite = torch.where(fresh, step, self.first_nonfinite)

    def weights_are_finite(self) -> bool:
        """Whether the last update left all parameters finite. Waits for the device."""
        with torch.no_grad():
            norms = torch._foreach_norm(list(self.method.parameters()), float("inf"))
        return bool(torch.stack(norms).isfinite().all())
