"""The published view tables as data (Meng et al., NeurIPS 2023); the order is ``ViewConfig``'s.

One table serves every data path. Nothing here applies them: ``draw.py`` does.
"""

from __future__ import annotations

from dataclasses import replace

from sacl_fast.config import ViewConfig, ViewsConfig

IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
CIFAR_MEAN, CIFAR_STD = (0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)

IMAGENET = ViewsConfig(
    size=224,
    blur_window=23,
    mean=IMAGENET_MEAN,
    std=IMAGENET_STD,
    a=ViewConfig(blur=1.0, solarize=0.0),
    b=ViewConfig(blur=0.1, solarize=0.2),
)

TINY_IMAGENET = replace(IMAGENET, size=64, blur_window=7)

CIFAR = ViewsConfig(
    size=32,
    blur_window=3,
    mean=CIFAR_MEAN,
    std=CIFAR_STD,
    a=ViewConfig(blur=0.0, solarize=0.0),
    b=ViewConfig(blur=0.0, solarize=0.2),
)

# For the drawn shapes of ``data.source demo``: colour says nothing about the class, so it is shaken
# harder than published (else the views are matched by their colours); the crop is milder than on
# photographs, because a fragment of an outline is no shape.
_SHAPE = ViewConfig(
    crop_scale=(0.4, 1.0),
    jitter=1.0,
    brightness=0.6,
    contrast=0.6,
    saturation=0.8,
    hue=0.5,
    grayscale=0.5,
)
DEMO = ViewsConfig(
    size=32,
    blur_window=3,
    mean=(0.5, 0.5, 0.5),
    std=(0.25, 0.25, 0.25),
    a=_SHAPE,
    b=replace(_SHAPE, solarize=0.2),
)
