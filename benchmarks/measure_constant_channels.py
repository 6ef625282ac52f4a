"""How much larger a slim encoder's gradients are than the dense one's, over timm's families.

    python benchmarks/measure_constant_channels.py --json benchmarks/results/constant_channels.json

Encoders as timm initialises them, random images, a random linear function of the features. For each
encoder: the largest gradient of convolution weights, and of norm weights and biases, of the dense
encoder and of the slim one, exact and damped (``slim.norm_gradient``); ``norms``, how many batch
norms see a constant channel that is not simply a zeroed filter's; ``in_a_row``, how many of them a
gradient passes one after another (``slim.constant_channels``).
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from sacl_fast.bench.figures import write_json
from sacl_fast.encoders import build_encoder
from sacl_fast.errors import UserError
from sacl_fast.slim import Slicer
from sacl_fast.slim.constant_channels import Probe, constant_norms_in_a_row
from sacl_fast.slim.slicer import Mode

ENCODERS = """
    repvit_m0_9 repvit_m1_0 fastvit_t8 mobileone_s0 ghostnet_050 ghostnetv2_100 ghostnetv3_100
    repghostnet_050 efficientvit_m0 efficientvim_m1 shvit_s1 efficientformerv2_s0 swiftformer_xs
    iformer_t inception_next_atto mobilenetv1_100 mobilenetv2_100 mobilenetv3_small_100
    mobilenetv3_large_100 mobilenetv4_conv_small efficientnet_b0 tf_efficientnet_b0
    efficientnetv2_rw_t mnasnet_small semnasnet_075 mixnet_s fbnetc_100 lcnet_050 tinynet_e
    rexnet_100 hardcorenas_a mobilevit_xxs mobilevitv2_050 efficientvit_b0 edgenext_xx_small
    regnetx_002 regnety_002 gernet_s repvgg_a0 resnet18 resnet50 resnext50_32x4d seresnet18
    resnest14d res2net50_26w_4s skresnet18 resnetv2_50 densenet121 dla34 dpn48b ese_vovnet19b_dw
    hrnet_w18_small hgnetv2_b0 cspresnet50 vgg11_bn fasternet_t0 starnet_s1 levit_conv_128s
    nextvit_small visformer_tiny convnext_atto poolformer_s12 tresnet_m lowformer_b0 cpubone_nano
    xception41
""".split()
FLOAT64 = ("repvit_m0_9", "fastvit_t8", "mobilenetv3_small_100", "resnet18")
KINDS = {"conv": nn.Conv2d, "norm": _BatchNorm}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--encoders", nargs="+", default=ENCODERS)
    parser.add_argument("--float64", nargs="*", default=FLOAT64, help="of them, in float64 too")
    parser.add_argument("--ratio", type=float, default=0.5)
    parser.add_argument("--size", type=int, default=64)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--json", type=Path, help="write the figures here")
    options = parser.parse_args()
    rows = []
    for name in options.encoders:
        for dtype in (torch.float32, *[torch.float64] * (name in options.float64)):
            torch.manual_seed(0)
            try:
                encoder = build_encoder(name, image_size=options.size).to(dtype).train()
            except UserError as error:
                print(f"{name}: {error}", flush=True)
                break
            rows.append({"encoder": name, **measure(encoder, options)})
            print(rows[-1], flush=True)
    if options.json:
        write_json(options.json, {**vars(options), "device": "cpu", "rows": rows})


def measure(encoder: nn.Module, options: argparse.Namespace) -> dict[str, Any]:
    dtype = next(encoder.parameters()).dtype
    torch.manual_seed(1)
    images = torch.randn(options.batch, 3, options.size, options.size, dtype=dtype)
    largest = {}
    passes: dict[str, Mode] = {"dense": "dense", "exact": "mask", "damped": "mask"}
    for name, mode in passes.items():
        own = copy.deepcopy(encoder)
        slicer = Slicer(own, options.ratio, norm_gradient="damped" if name == "damped" else "exact")
        torch.manual_seed(2)
        with slicer.mode(mode):
            features = own(images)
        (features * torch.randn_like(features)).sum().backward()
        largest[name] = {kind: largest_gradient(own, of) for kind, of in KINDS.items()}
    slicer = Slicer(encoder, options.ratio)
    probe = Probe(slicer, in_chans=3)
    probe.largest_gradient(1.0, options.size)
    return {
        "dtype": str(dtype).removeprefix("torch."),
        "batch_norms": sum(isinstance(m, _BatchNorm) for m in encoder.modules()),
        "norms": probe.met,
        "in_a_row": round(constant_norms_in_a_row(slicer, options.size), 1),
        "largest_gradient": largest,
    }


def largest_gradient(encoder: nn.Module, kind: type[nn.Module]) -> float | None:
    """Of the parameters of modules of a kind; None where there are none."""
    gradients = [
        p.grad.abs().max().item()
        for m in encoder.modules()
        if isinstance(m, kind)
        for p in m.parameters(recurse=False)
        if p.grad is not None
    ]
    return float(f"{max(gradients):.3g}") if gradients else None


if __name__ == "__main__":
    main()
