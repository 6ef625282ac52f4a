"""Encoders by name: any timm model without its classifier, and the CIFAR ResNet-20.

What timm's factory does not offer is added here: a width multiplier for the families that have
one inside timm, and stems for small images.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Annotated, Any

import timm
import torch
from timm.models import efficientnet, mobilenetv3
from torch import Tensor, nn

from sacl_fast.checks import BelowOne, Count, Range, checked, shown
from sacl_fast.config.choices import Stem
from sacl_fast.encoders.resnet20 import ResNet20
from sacl_fast.errors import UserError, nearest, reason_of

# Families whose generator takes a channel multiplier. The digits of the name are the variant's
# own multiplier in percent (mobilenetv2_140).
_MULTIPLIED: dict[str, Callable[..., nn.Module]] = {
    r"mobilenetv1_(\d{3})": efficientnet._gen_mobilenet_v1,
    r"mobilenetv2_(\d{3})": efficientnet._gen_mobilenet_v2,
    r"mobilenetv3_(?:large|small)_(\d{3})": mobilenetv3._gen_mobilenet_v3,
}
# EfficientNet-B0..B7: (width, depth) of Tan & Le, ICML 2019.
_EFFICIENTNET = [
    (1.0, 1.0), (1.0, 1.1), (1.1, 1.2), (1.2, 1.4), (1.4, 1.8), (1.6, 2.2), (1.8, 2.6), (2.0, 3.1),
]  # fmt: skip
_RESNET_CHANNELS = (64, 128, 256, 512)

# Activations (``ReLU6`` is a ``Hardtanh``) whose gradient is computed from their input. Where they
# are to change that in place, autograd copies it first: a whole activation read and written.
_COPIED_IN_PLACE = (nn.Hardtanh, nn.Hardswish, nn.Hardsigmoid, nn.SiLU, nn.Mish, nn.Threshold)

# What timm's models raise, while they are built or run, where sizes or options do not fit.
_REFUSALS = (
    *(RuntimeError, AssertionError, ValueError, TypeError, LookupError, AttributeError),
    *(ArithmeticError, ImportError),
)


@checked
def build_encoder(
    name: str,
    *,
    width: Annotated[float, Range(0.01, 64)] = 1.0,
    stem: Stem = "imagenet",
    image_size: Count = 224,
    in_chans: Count = 3,
    drop_path: BelowOne = 0.0,
) -> nn.Module:
    """An untrained encoder: (N, in_chans, image_size, image_size) -> (N, F).

    Args:
        name: ``resnet20``, or a timm model's name; it is made with ``num_classes=0``.
        width: multiplies the channels, where timm offers it.
        stem: ``stride1`` and ``cifar`` adapt the stem to small images; see ``EncoderConfig``.
        image_size: side of the images in pixels; fixed into models with position embeddings.
        drop_path: stochastic depth rate.

    Raises:
        UserError: an unknown name, or a width, stem, drop path or image size that this model
            cannot have.
    """
    options: dict[str, Any] = {"in_chans": in_chans}
    if drop_path:
        options["drop_path_rate"] = drop_path
    if name == "resnet20":
        return ResNet20(width, **options)
    _check_name(name)
    pretrained_cfg = timm.get_pretrained_cfg(name)
    if pretrained_cfg is not None and pretrained_cfg.fixed_input_size:
        options |= _transformer_options(name, stem, image_size)
    options["num_classes"] = 0
    try:
        encoder = _create(name, width, options)
    except _REFUSALS as error:
        like = f"with width {width:g} and options {options}"
        why = reason_of(error)
        raise UserError(f"encoder {name!r} cannot be built {like}: {why}") from error
    if stem != "imagenet" and "patch_size" not in options:
        _adapt_stem(name, encoder, stem)
    for module in encoder.modules():
        if isinstance(module, _COPIED_IN_PLACE):
            module.inplace = False
    output_dim(encoder, image_size, in_chans=in_chans)  # refuses what cannot run
    return encoder


def _check_name(name: str) -> None:
    """Refuse a model that timm does not have; a tag, of weights that are not loaded, too."""
    model, dot, tag = name.partition(".")
    if not timm.is_model(model):
        known = [*timm.list_models(), "resnet20"]
        raise UserError(f"unknown encoder {shown(name)}; {nearest(model[:100], known)}")
    tags = [full.partition(".")[2] for full in timm.list_pretrained(f"{model}.*")]
    if dot and tag not in tags:
        works = f"; {nearest(tag[:100], tags)}" if tags else ""
        raise UserError(
            f"encoder {model} has no tag {shown(tag)} in timm; without one works (nothing is "
            f"downloaded, the weights are random){works}"
        )


@checked
def output_dim(encoder: nn.Module, image_size: Count, *, in_chans: Count = 3) -> int:
    """F, the length of the encoder's feature vector, from a forward pass of one image."""
    training = encoder.training
    device = next(encoder.parameters()).device
    image = torch.zeros(1, in_chans, image_size, image_size, device=device)
    try:
        with torch.no_grad():
            features = encoder.eval()(image)
    except _REFUSALS as error:
        made_for = getattr(encoder, "pretrained_cfg", None) or {}
        size = made_for.get("input_size", (0, 0))[-1]
        works = f"; it was made for {size} px (views.size)" if size not in (0, image_size) else ""
        raise UserError(
            f"{type(encoder).__name__} does not run on {image_size} px images with this stem: "
            f"{reason_of(error).rstrip('.')}{works}"
        ) from error
    finally:
        encoder.train(training)
    if not isinstance(features, Tensor) or features.ndim != 2 or not features.shape[1]:
        raise UserError(
            f"{type(encoder).__name__} gives no feature vector for an image, so it cannot be the "
            "encoder; classification models do"
        )
    return features.shape[1]


def _create(name: str, width: float, options: dict[str, Any]) -> nn.Module:
    """The timm model, through the family's own generator where the width is not 1."""
    model = name.partition(".")[0]
    if width == 1.0:
        return timm.create_model(name, **options)
    for pattern, generate in _MULTIPLIED.items():
        if match := re.fullmatch(pattern, model):
            return generate(name, int(match[1]) / 100 * width, **options)
    if match := re.fullmatch(r"efficientnet_b([0-7])", model):
        own_width, depth = _EFFICIENTNET[int(match[1])]
        return efficientnet._gen_efficientnet(
            name, channel_multiplier=own_width * width, depth_multiplier=depth, **options
        )
    if re.fullmatch(r"resnet\d+", model):
        channels = tuple(max(8, round(c * width / 8) * 8) for c in _RESNET_CHANNELS)
        return timm.create_model(name, channels=channels, **options)
    raise UserError(
        f"encoder {name!r} has no width multiplier in timm; mobilenetv1_*, mobilenetv2_*, "
        "mobilenetv3_large_*, mobilenetv3_small_*, efficientnet_b0 to b7, resnet* and resnet20 do"
    )


def _transformer_options(name: str, stem: Stem, image_size: int) -> dict[str, Any]:
    """Image size and, for the stems of small images, patch size of a vision transformer."""
    options: dict[str, Any] = {"img_size": image_size}
    if stem != "imagenet":
        with torch.device("meta"):
            patch_embed = getattr(timm.create_model(name), "patch_embed", None)
        if patch_embed is None or not hasattr(patch_embed, "patch_size"):
            raise UserError(f"encoder {name!r} has no stem {stem!r}; 'imagenet' works")
        options["patch_size"] = patch_embed.patch_size[0] // {"stride1": 2, "cifar": 4}[stem]
    return options


def _adapt_stem(name: str, encoder: nn.Module, stem: Stem) -> None:
    """Stop the stem from down-sampling: its first convolution, and for ``cifar`` the rest too."""
    path = getattr(encoder, "pretrained_cfg", {}).get("first_conv")
    if not isinstance(path, str):
        raise UserError(f"encoder {name!r} has no single stem convolution; stem 'imagenet' works")
    conv = encoder.get_submodule(path)
    if not isinstance(conv, nn.Conv2d) or (
        conv.stride[0] > 1 and conv.stride[0] == conv.kernel_size[0]
    ):
        raise UserError(f"encoder {name!r} cuts the image into patches; stem 'imagenet' works")
    if stem == "cifar":
        if conv.kernel_size[0] > 3:
            parent, _, child = path.rpartition(".")
            conv = nn.Conv2d(
                conv.in_channels, conv.out_channels, 3, padding=1, bias=conv.bias is not None
            )
            nn.init.kaiming_normal_(conv.weight, mode="fan_out", nonlinearity="relu")
            setattr(encoder.get_submodule(parent), child, conv)
        for parent_name in ("", path.partition(".")[0]):
            parent_module = encoder.get_submodule(parent_name)
            for child, module in parent_module.named_children():
                if isinstance(module, nn.MaxPool2d):
                    setattr(parent_module, child, nn.Identity())
    conv.stride = (1, 1)
