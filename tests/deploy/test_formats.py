"""Graphs of architectures of several kinds, dense and compact, equal the encoder at any batch."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sacl_fast.config import Config, EncoderConfig, ViewsConfig
from sacl_fast.deploy.formats import FORMATS
from sacl_fast.deploy.network import Network
from sacl_fast.encoders import build_encoder
from sacl_fast.encoders.file import encoder_metadata
from sacl_fast.slim import Slicer
from sacl_fast.slim.export import compact_zeroed


def network(name: str, width: float, slim: bool) -> Network:
    torch.manual_seed(0)
    encoder = build_encoder(name, width=width, image_size=32).eval()
    slicer = Slicer(encoder)
    config = Config(encoder=EncoderConfig(name=name, width=width), views=ViewsConfig(size=32))
    metadata = encoder_metadata(config, epochs=1, steps=1, images=8, knn={}, slim=slim)
    if not slim:
        return Network("dense", encoder, encoder, metadata)
    slicer.recalibrate([torch.rand(8, 3, 32, 32)])
    encoder.load_state_dict(slicer.slim_state())
    return Network("slim", encoder, compact_zeroed(encoder), metadata)


@pytest.mark.parametrize(
    ("name", "width", "slim", "form"),
    [
        ("mobilenetv3_small_050", 0.5, True, "onnx"),
        ("efficientnet_b0", 0.25, True, "onnx"),  # squeeze-excite
        ("resnet18", 0.125, True, "torch-export"),
        ("vit_tiny_patch16_224", 1.0, False, "onnx"),
    ],
)
@torch.no_grad()
def test_graphs_of_architectures(name: str, width: float, slim: bool, form, tmp_path: Path):
    for package in FORMATS[form].packages:
        if importlib.util.find_spec(package) is None:
            pytest.skip(f"needs {package}")
    made = network(name, width, slim)
    path = tmp_path / f"encoder{FORMATS[form].suffix}"
    content = FORMATS[form].content(made, False)
    assert isinstance(content, bytes)
    path.write_bytes(content)
    run = FORMATS[form].load(path)
    for batch in (1, 5):
        images = torch.rand(batch, 3, 32, 32)
        features = made.reference(images)
        largest = features.abs().max().item()
        torch.testing.assert_close(run(images), features, rtol=0, atol=1e-4 * largest)


class CrossCovariance(nn.Module):
    """Attention between channels of unit length, whose norm stops onnxruntime's symbolic shapes."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3, 2, 1)

    def forward(self, images: Tensor) -> Tensor:
        x = F.normalize(self.conv(images).flatten(2), dim=-1)  # (N, 8, H W)
        return (x @ x.transpose(1, 2)).flatten(1)


@torch.no_grad()
def test_int8_of_attention_between_channels(tmp_path: Path):
    for package in FORMATS["onnx"].packages:
        pytest.importorskip(package)
    torch.manual_seed(0)
    encoder, form = CrossCovariance().eval(), FORMATS["onnx"]
    config = Config(views=ViewsConfig(size=16))
    metadata = encoder_metadata(config, epochs=1, steps=1, images=8, knn={})
    made, images = Network("dense", encoder, encoder, metadata), torch.rand(6, 3, 16, 16)
    whole, small = tmp_path / "encoder.onnx", tmp_path / "encoder_int8.onnx"
    assert form.int8 is not None
    content = form.content(made, False)
    assert isinstance(content, bytes)
    whole.write_bytes(content)
    small.write_bytes(form.int8(made, False, whole, [images]))
    for path in (whole, small):
        cosines = torch.cosine_similarity(form.load(path)(images), encoder(images))
        assert cosines.min() > 0.99
