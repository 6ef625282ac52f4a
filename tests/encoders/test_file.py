"""encoder.safetensors: loaded by timm's own names, and what it says of itself."""

import json
import os
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

from sacl_fast.config import Config, EncoderConfig, LossConfig, ViewsConfig
from sacl_fast.encoders import build_encoder
from sacl_fast.encoders.file import (
    encode_encoder,
    encoder_metadata,
    load_encoder,
    read_encoder_metadata,
    save_encoder,
)
from sacl_fast.errors import UserError


def test_what_it_says_of_itself_builds_it(tmp_path):
    config = Config(
        preset="mine",
        encoder=EncoderConfig(name="mobilenetv3_small_050", width=0.5, stem="stride1"),
        views=ViewsConfig(size=32, mean=(0.1, 0.2, 0.3)),
    )
    encoder = build_encoder("mobilenetv3_small_050", width=0.5, stem="stride1", image_size=32)
    metadata = encoder_metadata(
        config, epochs=2.5, steps=10, images=70, knn={"knn_dense": 31.2345678, "knn_slim": 30.0}
    )
    path = tmp_path / "encoder.safetensors"
    assert save_encoder(path, encoder.state_dict(), metadata) == path.stat().st_size
    said: dict[str, Any] = read_encoder_metadata(path)
    assert said == metadata
    assert said["method"] == "sacl-xd" and said["preset"] == "mine" and said["format"] == "pt"
    numbers = {k: json.loads(said[k]) for k in ("mean", "epochs", "steps", "images", "knn_dense")}
    assert numbers == {
        "mean": [0.1, 0.2, 0.3], "epochs": 2.5, "steps": 10, "images": 70, "knn_dense": 31.2346,
    }  # fmt: skip
    again = build_encoder(
        said["encoder"],
        width=float(said["width"]),
        stem=said["stem"],
        image_size=int(said["image_size"]),
    )
    again.load_state_dict(load_file(path))
    odd = path.rename(os.fsdecode(os.fsencode(tmp_path) + b"/a\xff \n.safetensors"))
    first = load_encoder(odd).get_parameter("conv_stem.weight")
    assert torch.equal(first, again.get_parameter("conv_stem.weight"))


def test_without_labels_or_distillation():
    config = Config(loss=LossConfig(distillation="none"))
    said = encoder_metadata(config, epochs=1.0, steps=4, images=9, knn={})
    assert said["method"] == "barlow-twins" and "knn_dense" not in said


def test_modules_that_are_used_twice(tmp_path):
    encoder = timm.create_model("coat_lite_mini", num_classes=0)
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, encoder.state_dict(), {})
    again = timm.create_model("coat_lite_mini", num_classes=0)
    again.load_state_dict(load_file(path))
    for name, value in encoder.state_dict().items():
        assert torch.equal(value, again.state_dict()[name]), name


def test_tensors_in_one_storage(tmp_path):
    """Views, transposes, expanded and empty tensors, and the same one under two names."""
    x = torch.arange(24.0).view(4, 6)
    state = {
        "x": x, "same": x, "rows": x[1:3], "columns": x[:, 2], "t": x.T,
        "wide": x[:1].expand(5, 6), "none": x[:0], "none too": torch.zeros(0, 3),
        "half": x.to(torch.bfloat16), "parameter": nn.Parameter(x[2:]), "flag": x > 3,
    }  # fmt: skip
    path = tmp_path / "encoder.safetensors"
    save_encoder(path, state, {})
    loaded = load_file(path)
    assert loaded.keys() == state.keys()
    for name, value in state.items():
        assert torch.equal(loaded[name], value), name


@pytest.mark.parametrize(
    "value", [3, "text", None, torch.zeros(3).to_sparse(), torch.zeros(3, dtype=torch.cdouble)]
)
def test_states_that_it_cannot_hold(value):
    try:
        content = encode_encoder({"weight": torch.zeros(3), "odd": value}, {})
    except UserError as error:
        assert "safetensors" in str(error)
    else:
        assert len(content) > 0  # a later version can


def test_files_that_are_none(tmp_path):
    for content in (b"", b"hello", b"\xff" * 100):
        (tmp_path / "x").write_bytes(content)
        with pytest.raises(UserError, match="is no safetensors file"):
            read_encoder_metadata(tmp_path / "x")
    with pytest.raises(UserError, match="no encoder at"):
        read_encoder_metadata(tmp_path)
    save_encoder(tmp_path / "x", {"w": torch.zeros(2)}, {})
    assert read_encoder_metadata(tmp_path / "x") == {}
