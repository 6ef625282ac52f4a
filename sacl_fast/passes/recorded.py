"""The slim or the dense encoder, run from a recording of itself.

Skipping asks Python with every operation what to do with each part of an activation
(``slim.tensor``): a third of the time of a slim MobileNet-V3 at s = 0.25 on two CPU cores. The
answers depend on the masks and on the shape of the images, not on values. So a pass is recorded
(``passes.recording``), and the recording runs instead of it until the masks change. Mode ``whole``
does the same for the dense encoder, which no masks change.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from sacl_fast.checks import checked
from sacl_fast.passes.graph import Fusion
from sacl_fast.passes.recording import Obstacle, Recording, record
from sacl_fast.passes.sharing import SharedGradients
from sacl_fast.slim.slicer import Slicer

logger = logging.getLogger(__name__)

RecordedMode = Literal["skip", "whole"]

_KINDS = 4  # remembered: with and without gradient, each for two sizes of a batch
_TRIES = 3  # of a kind: the first one may fill caches that later ones read


@dataclass
class _Kind:
    """What is known of passes of one kind."""

    tried: int = 0
    last: Recording | None = None
    confirmed: Recording | None = None


class RecordedEncoder:
    """The slim encoder (mode ``skip``) or the dense one (``whole``): to the bit what it gives in
    that mode, and faster from the third time.

    >>> import timm, torch
    >>> encoder = timm.create_model("resnet18", num_classes=0)
    >>> slim = RecordedEncoder(Slicer(encoder))
    >>> slim(torch.rand(2, 3, 64, 64)).shape  # as within slicer.mode("skip")
    torch.Size([2, 512])

    Passes are recorded until two of one kind agree, and then that recording runs. A kind is: the
    masks, the images' shape, strides and type, gradient mode, autocast, each module's training
    flag, and the memory of parameters and buffers. What ``forward`` reads from Python besides, such
    as a drop rate, is taken to stay: ``forget`` after changing that. Where passes cannot be
    recorded, differ, or are seldom of one kind, they are left as they are, and a line of the log
    says why; so are those of an encoder with hooks.

    (Under autocast, weights are cast in each pass. And where images have shrunk to one pixel their
    memory format is ambiguous, so that rounding may differ from that of the mode; it is the same in
    passes that are recorded and in those that are run from the recording.)
    """

    @checked
    def __init__(
        self, slicer: Slicer, mode: RecordedMode = "skip", *, fused: Fusion = "none"
    ) -> None:
        """``fused``: how far batch norms are fused into their neighbours (``passes.fusion``); if
        they are, passes are equal up to rounding."""
        self.slicer = slicer
        self.mode: RecordedMode = mode
        self.fused: Fusion = fused
        self.sharing: SharedGradients | None = None
        """With another encoder of the same parameters, whose pass follows or came before."""
        self._kinds: OrderedDict[Hashable, _Kind] = OrderedDict()
        self._in_vain = 0
        self._obstacle: Obstacle | None = None

    def __call__(self, x: Tensor) -> Tensor:  # (N, 3, H, W) -> (N, D)
        kind = None if self._obstacle else self._kind(x)
        if kind is None:
            return self._run(x)
        own = self._kinds.setdefault(kind, _Kind())
        self._kinds.move_to_end(kind)
        if len(self._kinds) > _KINDS:
            _, oldest = self._kinds.popitem(last=False)
            self._in_vain += oldest.confirmed is None
        if self._in_vain > _KINDS:
            self._give_up(Obstacle("masks or images change their form too often"))
        if own.confirmed is not None:
            return own.confirmed(x, self.sharing)
        if own.tried == _TRIES or self._obstacle:
            return self._run(x)
        own.tried += 1
        return record(self._run, x, lambda found: self._note(own, found), fused=self.fused)

    def forget(self) -> None:
        """Record anew."""
        self._kinds.clear()

    def __getstate__(self) -> dict[str, Any]:  # of a copy, whose parameters are others
        return {**vars(self), "_kinds": OrderedDict()}

    def _run(self, x: Tensor) -> Tensor:
        with self.slicer.mode(self.mode):
            return self.slicer.encoder(x)

    def _note(self, own: _Kind, found: Recording | Obstacle) -> None:
        if isinstance(found, Obstacle):
            return self._give_up(found)
        last, own.last = own.last, found
        if last is not None and last.agrees_with(found):
            own.last, own.confirmed = None, found
            self._in_vain = 0
        elif last is not None and own.tried == _TRIES:
            self._give_up(Obstacle("each pass runs different operators or on different tensors"))

    def _give_up(self, obstacle: Obstacle) -> None:
        if self._obstacle is None:
            encoder = "slim" if self.mode == "skip" else "dense"
            text = "%s encoder: not recorded, so that Python's time stays: %s"
            logger.info(text, encoder, obstacle)
        self._obstacle = obstacle
        self._kinds.clear()

    def _kind(self, x: Tensor) -> Hashable:
        """What a recording is for; None where there can be none."""
        slicer, device = self.slicer, x.device.type
        if type(x) is not Tensor or torch.is_inference_mode_enabled():
            return None
        training, memory = [], []
        rest: list[nn.Module] = [slicer.encoder]
        slim: tuple[Hashable, ...] = ()
        if self.mode == "skip":
            if not slicer.skips:
                return None
            rest.append(slicer)
            slim = slicer.norm_gradient, *slicer.kept
        while rest:  # Module.modules() takes 1 ms for a MobileNet-V3
            module = rest.pop()
            if _has_hooks(module):
                return None
            training.append(module.training)
            for tensors in (module._parameters, module._buffers):
                for t in tensors.values():
                    if t is not None:
                        memory += (id(t), t.data_ptr(), t.requires_grad)
                        if t._backward_hooks:
                            return None
            rest.extend(m for m in module._modules.values() if m is not None)
        autocast = torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device)
        return (
            *(slicer.backend, *slim),
            *(x.shape, x.stride(), x.storage_offset(), x.dtype, x.device, x.requires_grad),
            *(torch.is_grad_enabled(), autocast),
            *training,
            *memory,
        )


def _has_hooks(module: nn.Module) -> bool:
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
    )


def share_gradients(first: object, second: object) -> SharedGradients:
    """Have two recorded encoders of the same parameters add up their gradients at once, where the
    second's pass follows the first's; other encoders are left as they are."""
    sharing = SharedGradients()
    if isinstance(first, RecordedEncoder) and isinstance(second, RecordedEncoder):
        first.sharing = second.sharing = sharing
    return sharing
