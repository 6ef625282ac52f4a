"""Slimming: the slim encoder is the dense one with the weak filters of each convolution zeroed.

The two share their weights. A convolution keeps the ``int(s * Cout)`` filters (at least 1) of
largest L1 norm, ties to the lower index; depthwise convolutions rank their own filters. A zeroed
filter gives an output of exactly 0 (its bias, where it has one, is zeroed with it) and receives
no gradient from the slim pass (Meng et al., NeurIPS 2023, Section 3).

``mask`` mode multiplies masks into full weights: it saves no work and is the reference. ``skip``
mode computes the same (outputs, gradients, running statistics) from the kept filters alone: the
convolutions' weights and biases are ``KeptFilters`` there, and activations ``SlimTensor``s.

``whole`` mode is to ``dense``, the encoder as it is, what ``skip`` is to ``mask``: all filters are
kept, and the same rules run on activations of one part, so that norm and activation, say, are one
operator.

What zeroed filters leave behind is constant, and a batch norm of it multiplies gradients by
``weight / sqrt(eps)``. In most encoders none of that arrives anywhere, in some it compounds;
``norm_gradient="damped"`` bounds it, and what rounding makes of constants, in both modes alike
(``ops.batch_norm.damped``).
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Literal, get_args

import torch
from timm.layers import EffectiveSEModule, SEModule
from timm.models._efficientnet_blocks import SqueezeExcite
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.checks import Pattern, Ratio, checked
from sacl_fast.config import SlimConfig
from sacl_fast.config.choices import NormGradient, SlimBatchNorm, SlimMode
from sacl_fast.encoders.recalibrate import recalibrated
from sacl_fast.errors import UserError, nearest
from sacl_fast.ops.batch_norm import DAMPED
from sacl_fast.ops.slim_conv import BACKEND
from sacl_fast.slim.channels import Channels, all_channels, channels
from sacl_fast.slim.checkpointing import Recomputation, blocks_of, checkpointed
from sacl_fast.slim.damping import damp
from sacl_fast.slim.tensor import KeptFilters, dense, resolving

Mode = Literal["dense", "whole", SlimMode]
Given = dict[nn.Conv2d, dict[str, Tensor]]
# timm's, some of which stand under other names than the patterns of SlimConfig.exclude know.
_SQUEEZE_EXCITE = (EffectiveSEModule, SEModule, SqueezeExcite)


class Masks(dict[str, Tensor]):
    """Convolution name -> mask (Cout,), true where the filter is kept."""

    statistics: dict[str, Tensor] | None = None
    """Name of a batch norm's buffer -> its value in the slim encoder of these masks; None where
    that has not been estimated."""


@checked
def strongest_filters(weight: Tensor, ratio: Ratio) -> Tensor:
    """Mask (Cout,) of the ``max(1, int(ratio * Cout))`` filters of largest L1 norm.

    Args:
        weight: (Cout, Cin / groups, kh, kw).
    """
    # float64, so that the memory format's order of summation cannot decide a near tie.
    norms = weight.detach().double().abs().flatten(1).sum(1)  # (Cout,)
    keep = max(1, int(ratio * len(norms)))
    order = torch.sort(norms, descending=True, stable=True).indices
    return torch.zeros_like(norms, dtype=torch.bool).index_fill_(0, order[:keep], True)


class Slicer(nn.Module):
    """Chooses the slim encoder's filters and runs the encoder with them.

    >>> import timm, torch
    >>> encoder = timm.create_model("resnet18", num_classes=0)
    >>> slicer = Slicer(encoder, ratio=0.5)
    >>> with slicer.mode("mask"):
    ...     features = encoder(torch.rand(2, 3, 64, 64))
    >>> slicer.masks["layer1.0.conv1"].sum()
    tensor(32)

    Its ``state_dict`` holds the masks, with ``batch_norm="separate"`` the slim encoder's own batch
    norms, and the slim encoder's batch-norm statistics where they have been estimated
    (``recalibrate``); the encoder's keys stay timm's.
    """

    statistics: dict[str, Tensor] | None = None
    """See ``Masks``. They are of the weights and masks as they were then: whoever changes weights
    sets them to None, as ``refresh`` does."""

    @checked
    def __init__(
        self,
        encoder: nn.Module,
        ratio: Ratio = 0.5,
        *,
        exclude: tuple[Pattern, ...] = SlimConfig.exclude,
        batch_norm: SlimBatchNorm = "shared",
        norm_gradient: NormGradient = "exact",
    ) -> None:
        """Slims every ``Conv2d`` of ``encoder`` that is not part of a squeeze-excite block and in
        whose name no pattern of ``exclude`` is found. ``norm_gradient``: see ``SlimConfig``;
        ``slim.constant_channels`` finds out whether an encoder needs ``damped``.

        Raises:
            UserError: a ratio outside (0, 1], or another value that cannot be.
        """
        super().__init__()
        self.ratio = ratio
        self.norm_gradient = norm_gradient
        self.enabled = True
        """Off while slimming has not started (``slim.warmup_epochs``): all filters are kept."""
        self.backend = "auto"
        """Of the operators of ``skip`` and ``whole``; see ``ops.backend``."""
        self.checkpointing = False
        """Whether passes with gradient are checkpointed (``slim.checkpointing``). They are also
        where timm's ``set_grad_checkpointing`` was called, in place of its own way, which would
        compute again with all filters."""
        self._mode: Mode | None = None
        self._given: Given = {}
        self._switches = [m for m in encoder.modules() if hasattr(m, "grad_checkpointing")]
        # Plain lists: the encoder's modules are not the slicer's to save or to train.
        self._encoder = [encoder]
        self._kept: dict[str, Channels] = {}
        self._convs: list[tuple[str, nn.Conv2d]] = []
        self._unslimmed: list[nn.Conv2d] = []
        self._norms: list[nn.Module] = []
        self._norm_sites: list[tuple[nn.Module, str, str]] = []
        self.slim_norms = nn.ModuleDict()

        modules = dict(encoder.named_modules())
        gates = tuple(f"{n}." for n, m in modules.items() if isinstance(m, _SQUEEZE_EXCITE))

        def excluded(name: str) -> bool:
            return name.startswith(gates) or any(re.search(p, name) for p in exclude)

        for name, module in modules.items():
            if isinstance(module, nn.Conv2d) and not excluded(name):
                key = _key(name)
                self._convs.append((key, module))
                self.register_buffer(key, torch.ones(module.out_channels, dtype=torch.bool))
            elif isinstance(module, nn.Conv2d):
                self._unslimmed.append(module)
            elif isinstance(module, _BatchNorm) and batch_norm == "separate":
                parent, _, child = name.rpartition(".")
                self._norm_sites.append((modules[parent], child, _key(name)))
                self.slim_norms[_key(name)] = copy.deepcopy(module)
                self._norms.append(self.slim_norms[_key(name)])
            elif isinstance(module, _BatchNorm):
                self._norms.append(module)
        self.register_load_state_dict_pre_hook(_before_loading)
        self.register_load_state_dict_post_hook(_after_loading)
        self.refresh()

    @property
    def encoder(self) -> nn.Module:
        return self._encoder[0]

    @property
    def skips(self) -> bool:
        """Whether filters are zeroed, now, that mode ``skip`` can leave out."""
        return self.enabled and self.ratio < 1 and bool(self._convs)

    @property
    def active(self) -> bool:
        """Whether the slim encoder differs from the dense one."""
        return self.skips or bool(self._norm_sites)

    @property
    def kept(self) -> tuple[Channels, ...]:
        """The filters that are kept in each convolution."""
        return tuple(self._kept.values())

    @property
    def masks(self) -> Masks:
        """Which filters of each convolution are kept, and the statistics that go with them."""
        masks = Masks({key.replace("/", "."): self.get_buffer(key) for key, _ in self._convs})
        masks.statistics = self.statistics
        return masks

    @property
    def norms(self) -> dict[str, nn.Module]:
        """Batch-norm name -> the slim encoder's own; empty where both encoders share theirs."""
        return {key.replace("/", "."): norm for key, norm in self.slim_norms.items()}

    @torch.no_grad()
    def refresh(self) -> None:
        """Choose the filters anew from the weights as they are now."""
        for key, conv in self._convs:
            self.get_buffer(key).copy_(strongest_filters(conv.weight, self.ratio))
        self.statistics = None
        self._read_masks()

    @torch.no_grad()
    def recalibrate(self, batches: Iterable[Tensor]) -> None:
        """Estimate the slim encoder's batch-norm statistics, which it is to be used with.

        The running ones are of training, where both encoders update them. See
        ``encoders.recalibrate``; the encoder is left as it is.

        Args:
            batches: images (N, C, H, W) as the encoder is used on them, equally many in each.
        """
        with self.mode("mask"), recalibrated(self.encoder, batches):
            self.note_statistics()

    def note_statistics(self) -> None:
        """Take those that the encoder has now, recalibrated in mode ``mask``, as the slim
        encoder's."""
        self.statistics = {
            f"{name}.{own}": buffer.detach().clone()
            for name, norm in self.encoder.named_modules()
            if isinstance(norm, _BatchNorm)
            for own, buffer in norm.named_buffers(recurse=False)
        }

    @torch.no_grad()
    def slim_state(self) -> dict[str, Tensor]:
        """The slim encoder's ``state_dict``, under the encoder's names and full-size: filters that
        are not kept are zeros, batch norms and their statistics are its own.

        Loaded into another encoder of the same kind it gives the slim encoder in eval mode.

        Raises:
            RuntimeError: the statistics are not known; ``recalibrate`` estimates them.
        """
        if self.statistics is None:
            raise RuntimeError("the slim encoder's statistics are not known: recalibrate first")
        state = {name: value.detach() for name, value in self.encoder.state_dict().items()}
        for name, norm in self.norms.items():
            state |= {f"{name}.{own}": v.detach() for own, v in norm.state_dict().items()}
        for name, mask in self.masks.items():
            for own, p in self.encoder.get_submodule(name).named_parameters(recurse=False):
                key = f"{name}.{own}"
                state[key] = state[key] * mask.view(-1, *[1] * (p.ndim - 1))
        return state | self.statistics

    def get_extra_state(self) -> dict[str, Tensor] | None:
        return self.statistics

    def set_extra_state(self, state: dict[str, Tensor] | None) -> None:
        self.statistics = state

    def _read_masks(self) -> None:
        """Learn on the host which filters are kept: here, so that no step has to ask."""
        if not self._convs:
            return
        masks = torch.cat([self.get_buffer(key) for key, _ in self._convs]).cpu().numpy()
        for key, conv in self._convs:
            own, masks = masks[: conv.out_channels], masks[conv.out_channels :]
            self._kept[key] = channels(own.nonzero()[0])

    @contextmanager
    def mode(self, mode: Mode) -> Iterator[None]:
        """Within it, the encoder is the dense (``dense``, ``whole``) or the slim network (``mask``,
        ``skip``)."""
        if mode not in get_args(Mode):
            raise UserError(f"unknown mode {mode!r}; {nearest(mode, get_args(Mode))}")
        on = [m for m in self._switches if m.grad_checkpointing]
        checkpointing = (self.checkpointing or on) and torch.is_grad_enabled()
        blocks = blocks_of(self.encoder) if checkpointing else []
        with self._within(mode, {}), checkpointed(blocks, self._again(), instead_of=on):
            yield

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """For whoever checkpoints something within a mode: in backward it is to be in it again::

        checkpoint(block, x, use_reentrant=False, context_fn=slicer.contexts)
        """
        return nullcontext(), Recomputation(self.encoder, self._again())

    def _again(self) -> Callable[[], AbstractContextManager[None]]:
        """What enters the present mode once more, with the same weights."""
        mode, given = self._mode, self._given

        def enter() -> AbstractContextManager[None]:
            if mode is None or self._given is given:
                return nullcontext()
            return self._within(mode, given)

        return enter

    @contextmanager
    def _within(self, mode: Mode, given: Given) -> Iterator[None]:
        """``given``: what is in the place of weights; filled where the mode is entered anew."""
        if self._mode is not None:
            raise RuntimeError(f"mode {mode!r} inside mode {self._mode!r}: leave that one first")
        self._mode, self._given = mode, given
        with ExitStack() as undo:
            undo.callback(self._leave)
            if mode in get_args(SlimMode):
                for parent, child, key in self._norm_sites:
                    undo.callback(_swap_module(parent, child, self.slim_norms[key]))
            if mode in get_args(SlimMode) and self.enabled and self.ratio < 1:
                for key, conv in self._convs:
                    undo.callback(self._slim(key, conv, mode))
                if self.norm_gradient == "damped":
                    undo.callback(DAMPED.reset, DAMPED.set(True))
                    for norm in self._norms:
                        undo.callback(damp(norm))
                if mode == "skip":
                    self._run_by_rules(self._unslimmed, undo)
            elif mode == "whole":
                convs = (conv for _, conv in self._convs)
                self._run_by_rules((*convs, *self._unslimmed), undo)
            yield

    def _leave(self) -> None:
        self._mode, self._given = None, {}

    def _run_by_rules(self, whole: Iterable[nn.Conv2d], undo: ExitStack) -> None:
        """Have the encoder run by the rules of slim activations, with these convolutions whole."""
        for conv in whole:
            undo.callback(_keep_all(conv, self._given))
        undo.callback(BACKEND.reset, BACKEND.set(self.backend))
        hook = self._encoder[0].register_forward_hook(lambda *call: dense(call[2]))
        undo.callback(hook.remove)
        undo.enter_context(resolving())

    def _slim(self, key: str, conv: nn.Conv2d, mode: Mode) -> Callable[[], None]:
        """Zero the filters of a convolution that are not kept; returns what undoes it."""
        mask, kept = self.get_buffer(key), self._kept[key]
        if mode == "skip":
            return _replace_parameters(conv, self._given, lambda p: KeptFilters(p, mask, kept))
        return _replace_parameters(
            conv, self._given, lambda p: p * mask.view(-1, *[1] * (p.ndim - 1))
        )

    def extra_repr(self) -> str:
        return f"ratio={self.ratio}, convolutions={len(self._convs)}"


def _before_loading(slicer: nn.Module, state: dict[str, object], prefix: str, *_: object) -> None:
    """Checkpoints from before statistics were kept have none."""
    state.setdefault(f"{prefix}_extra_state", None)


def _after_loading(slicer: nn.Module, _: object) -> None:
    assert isinstance(slicer, Slicer)
    slicer._read_masks()


def _key(name: str) -> str:
    """A module's name as the name of a buffer or submodule, where dots are not allowed."""
    return name.replace(".", "/")


def _swap_module(parent: nn.Module, child: str, module: nn.Module) -> Callable[[], None]:
    """Replace a child by ``module`` (in the child's training mode); returns what undoes it."""
    own = parent.get_submodule(child)
    module.train(own.training)
    setattr(parent, child, module)
    return lambda: setattr(parent, child, own)


def _keep_all(conv: nn.Conv2d, given: Given) -> Callable[[], None]:
    """Have a rule compute a convolution of which all filters are kept, too. ``slim_pointwise``
    takes a squeeze-excite block's 0.4 to 0.6 of the time (32 images, two CPU cores)."""
    kept = all_channels(conv.out_channels)
    return _replace_parameters(conv, given, lambda p: KeptFilters(p, None, kept))


def _replace_parameters(
    conv: nn.Conv2d, given: Given, replace: Callable[[nn.Parameter], Tensor]
) -> Callable[[], None]:
    """Replace weight and bias by the tensors that are given for them, or else made; returns what
    undoes it."""
    own = {name: p for name, p in conv._parameters.items() if p is not None}
    if conv not in given:
        given[conv] = {name: replace(parameter) for name, parameter in own.items()}
    for name, tensor in given[conv].items():
        del conv._parameters[name]
        setattr(conv, name, tensor)

    def undo() -> None:
        for name, parameter in own.items():
            delattr(conv, name)
            conv._parameters[name] = parameter

    return undo
