"""Weights to start from: whose they can be, and what is said of those that do not fit."""

from __future__ import annotations

from dataclasses import replace

import pytest
import timm
import torch
from safetensors.torch import save_file

from sacl_fast.config import EncoderConfig
from sacl_fast.encoders import build_encoder
from sacl_fast.encoders.pretrained import load_pretrained
from sacl_fast.engine.method import build_networks
from sacl_fast.engine.trainer import train
from sacl_fast.errors import UserError

NAME = "mobilenetv3_small_050"


@pytest.fixture
def weights(tmp_path):
    """Of a classifier, as timm has them."""
    torch.manual_seed(7)
    state = timm.create_model(NAME, num_classes=3).state_dict()
    path = tmp_path / "weights.safetensors"
    save_file(state, path)
    return path, state


def test_a_file_under_timms_names(weights):
    path, state = weights
    torch.save(
        {"state_dict": {f"module.{k}": v for k, v in state.items()}}, path.with_name("w.pth")
    )
    for given in (path, path.with_name("w.pth")):
        encoder = build_encoder(NAME, image_size=32, stem="stride1")
        load_pretrained(encoder, NAME, str(given))
        assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())


def test_position_embeddings_are_resized():
    vit = "vit_tiny_patch16_224"
    big, small = build_encoder(vit, image_size=64), build_encoder(vit, image_size=32)
    torch.nn.init.normal_(big.pos_embed)  # type: ignore[arg-type]

    def load(encoder, path):
        torch.save(big.state_dict(), path)
        load_pretrained(encoder, vit, str(path))

    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        load(small, f"{folder}/w.pt")
    assert torch.equal(small.blocks[0].attn.qkv.weight, big.blocks[0].attn.qkv.weight)  # type: ignore
    assert small.pos_embed.shape[1] == 5 and small.pos_embed.std() > 0.1  # type: ignore


def test_what_does_not_fit_is_one_sentence(weights, tmp_path):
    path, state = weights
    few = {k: v for k, v in state.items() if "blocks.1" not in k} | {"extra": torch.zeros(2)}
    save_file(few, tmp_path / "few.safetensors")
    save_file(state, tmp_path / "named.safetensors", {"encoder": "resnet18"})
    (tmp_path / "text.pt").write_text("no weights")
    torch.save(timm.create_model(NAME, num_classes=3), tmp_path / "pickled.pt")
    torch.save({"epoch": 3}, tmp_path / "none.pt")
    key = "conv_stem.weight"
    for name, value in (("nan", state[key] * torch.nan), ("inf", state[key] / 0)):
        save_file(state | {key: value}, tmp_path / f"{name}.safetensors")
    save_file({k: v.long() for k, v in state.items()}, tmp_path / "whole.safetensors")
    save_file(state, tmp_path / "encoder_slim.safetensors", {"slim_ratio": "0.5"})
    save_file(state, tmp_path / "last.safetensors", {"slim_ratio": "0.5"})
    cases = {
        str(
            tmp_path / "few.safetensors"
        ): r"are missing \(blocks.1.*1 tensors are not the enc.*ext",
        str(tmp_path / "named.safetensors"): "holds resnet18, but encoder.name is",
        str(tmp_path / "text.pt"): r"text.pt is no file of weights \([^:]*work",
        str(tmp_path / "pickled.pt"): r"pickled.pt is no file of weights \([^:]*work",
        str(tmp_path / "none.pt"): r"none.pt is no file of weights",
        str(
            tmp_path / "nan.safetensors"
        ): r"start from: 1 of its tensors .conv_stem.weight\) hold NaN",
        str(
            tmp_path / "inf.safetensors"
        ): r"start from: 1 of its tensors .conv_stem.weight\) hold NaN",
        str(tmp_path / "whole.safetensors"): r"\.\.\.\) hold no floating-point numbers",
        str(tmp_path / "encoder_slim.safetensors"): "slim network.*; encoder.safetensors works",
        str(tmp_path / "last.safetensors"): "slim network.*; the file of a dense encoder works",
        str(tmp_path / "no.pt"): "where there is no file",
        str(tmp_path): "where there is no file",
    }
    for given, said in cases.items():
        encoder = build_encoder(NAME, image_size=32)
        before = {k: v.clone() for k, v in encoder.state_dict().items()}
        with pytest.raises(UserError, match=said):
            load_pretrained(encoder, NAME, given)
        assert all(torch.equal(v, before[k]) for k, v in encoder.state_dict().items())
    with pytest.raises(UserError, match=r"of another shape .* encoder.width"):
        load_pretrained(build_encoder(NAME, image_size=32, width=2.0), NAME, str(path))
    with pytest.raises(UserError, match="timm, which has no weights of resnet20"):
        load_pretrained(build_encoder("resnet20"), "resnet20", "timm")


def test_timms_own_weights(weights, monkeypatch):
    """As they are downloaded, but for the download; no random number is drawn."""
    _, state = weights
    create = timm.create_model

    def downloaded(name, *, pretrained=False, **options):
        model = create(name, **options)
        if pretrained:
            model.load_state_dict(state, strict=False)
        return model

    encoder = build_encoder("mobilenetv3_small_050.lamb_in1k", image_size=32)
    monkeypatch.setattr(timm, "create_model", downloaded)
    drawn = torch.get_rng_state()
    load_pretrained(encoder, "mobilenetv3_small_050.lamb_in1k", "timm")
    assert torch.equal(drawn, torch.get_rng_state())
    assert all(torch.equal(v, state[k]) for k, v in encoder.state_dict().items())

    def offline(*_, **__):
        raise ConnectionError("no network")

    monkeypatch.setattr(timm, "create_model", offline)
    with pytest.raises(UserError, match="cannot be had: no network"):
        load_pretrained(encoder, NAME, "timm")


def test_a_run_starts_from_them_and_resumes_without(tiny, tmp_path):
    first = train(replace(tiny, epochs=1))
    file = first.folder / "encoder.safetensors"
    start = replace(tiny.encoder, pretrained=str(file))
    config = replace(tiny, out=str(tmp_path / "second"), encoder=start)
    plain, given = build_networks(tiny), build_networks(config, pretrained=True)
    assert not torch.equal(*(n.encoder.state_dict()["conv1.weight"] for n in (plain, given)))
    torch.manual_seed(0)
    drawn = build_networks(tiny).projector.state_dict()
    torch.manual_seed(0)
    again = build_networks(config, pretrained=True)
    assert all(torch.equal(v, drawn[k]) for k, v in again.projector.state_dict().items())
    chosen = {k: v.clone() for k, v in again.slicer.masks.items()}
    again.slicer.refresh()
    assert all(torch.equal(v, chosen[k]) for k, v in again.slicer.masks.items())

    from sacl_fast.encoders import read_encoder_metadata

    second = train(config)
    assert read_encoder_metadata(second.folder / "encoder.safetensors")["pretrained"] == str(file)
    checkpoint = first.folder / "checkpoints" / "step_00000003.pt"
    encoder = build_encoder("resnet20", width=0.25, image_size=16)
    load_pretrained(encoder, "resnet20", str(checkpoint))
    file.unlink()
    (second.folder / "encoder.safetensors").unlink()
    assert train(replace(config, resume="auto")).finished
    with pytest.raises(UserError, match="where there is no file"):
        train(replace(config, out=str(tmp_path / "third")))
    assert not (tmp_path / "third").exists()


def test_the_setting_is_a_path_or_timm():
    assert EncoderConfig(pretrained="timm").pretrained == "timm"
    with pytest.raises(UserError):
        EncoderConfig(pretrained="")
