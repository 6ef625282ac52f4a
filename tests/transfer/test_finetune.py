"""``sacl-fast finetune`` of what a tiny run leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import load_file
from torch import nn

import sacl_fast
from sacl_fast.config import Config, DataConfig, EncoderConfig
from sacl_fast.data.images.open import open_sources
from sacl_fast.data.loading.crops import CropLoader
from sacl_fast.data.loading.evaluation import EvalLoader
from sacl_fast.encoders import build_encoder, read_encoder_metadata
from sacl_fast.encoders.file import encoder_metadata, save_encoder
from sacl_fast.encoders.onednn import avoid_memory_overwrite
from sacl_fast.encoders.pretrained import load_pretrained
from sacl_fast.engine.checkpoint import list_checkpoints, load_checkpoint
from sacl_fast.engine.metrics import read_metrics
from sacl_fast.errors import Stopped, UserError
from sacl_fast.evaluation.trained import fresh_encoder
from sacl_fast.ops.backend import Resolution
from sacl_fast.transfer.classifier import load_classifier
from sacl_fast.transfer.training import Training
from tests.commands import refused, said
from tests.transfer.conftest import FEW, FEW_ARGS, few, network


def predicted(module: nn.Module, config: Config, root: Path) -> np.ndarray:
    """The accuracy of a network on the validation images, by hand."""
    val = open_sources(config.data, 0).val
    assert val is not None
    config = replace(config, data=replace(config.data, root=str(root), workers=0))
    loader = EvalLoader(val, np.arange(len(val)), config, torch.device("cpu"))
    with torch.no_grad():
        hits = [(module(x).argmax(1) == y).numpy() for x, y in loader]
    return np.concatenate(hits)


def test_what_is_written_is_what_is_printed(run_folder, labelled, tiny, capsys):
    told = said(capsys, "finetune", run_folder, *FEW_ARGS, "--from-scratch")
    folder = run_folder / "finetune" / labelled.name
    assert "(fine-tuning, 30 images; 95 % interval" in told and "training from scratch" in told
    assert sorted(path.name for path in folder.iterdir()) == [
        "best.safetensors", "checkpoints", "curves.png", "finetune.json", "finetune.md",
        "finetune_confusion.png", "from_scratch", "last.safetensors", "metrics.jsonl",
    ]  # fmt: skip
    written = json.loads((folder / "finetune.json").read_text())
    assert [e["name"] for e in written["encoders"]] == ["dense", "dense, from scratch"]
    assert written["verdict"] in told and written["classes"] == ["one", "three", "two"]
    said_of = read_encoder_metadata(folder / "last.safetensors")
    assert json.loads(said_of["classes"]) == ["one", "three", "two"]
    assert (said_of["image_size"], said_of["finetuned_steps"]) == ("16", "6")
    with pytest.raises(UserError, match=r"classifier, which sacl_fast.load_classifier opens; .*"):
        sacl_fast.load_encoder(folder / "last.safetensors")
    (checkpoint,) = list_checkpoints(folder / "checkpoints")
    for given in (folder, checkpoint.parent, checkpoint):
        hint = "of a fine-tuning, whose last.safetensors .* works here: .*run/checkpoints/step"
        with pytest.raises(UserError, match=hint):
            sacl_fast.load_encoder(given)
    with pytest.raises(UserError, match=r"the run folder .*run that it is in works"):
        sacl_fast.load_encoder(folder.parent)
    with pytest.raises(UserError, match="of 'sacl-fast finetune'; one of 'sacl-fast train' works"):
        load_checkpoint(checkpoint)
    with pytest.raises(UserError, match=r"is a checkpoint; last.safetensors of"):
        load_classifier(checkpoint)
    # Pre-training may go on from it, without the classifier.
    encoder = fresh_encoder(tiny)
    load_pretrained(encoder, tiny.encoder.name, str(folder / "last.safetensors"))
    kept = network(folder / "last.safetensors")["conv1.weight"]
    assert torch.equal(encoder.get_parameter("conv1.weight"), kept)
    module = load_classifier(folder)
    data = replace(tiny.data, root=str(labelled))
    right = predicted(module, replace(tiny, data=data), labelled)
    first = written["encoders"][0]
    assert 100 * right.mean() == pytest.approx(first["figures"]["top-1"]["mean"])
    rows = read_metrics(folder / "metrics.jsonl")
    accuracies = {row["step"]: row["accuracy"] for row in rows if row["kind"] == "accuracy"}
    assert list(accuracies) == [3, 6]
    assert f"best {max(accuracies.values()):.1f} at step" in first["note"]
    rates = [row["lr"] for row in rows if row["kind"] == "train"]
    assert rates == pytest.approx([0.05 * (1 + np.cos(np.pi * i / 6)) for i in range(6)])


@pytest.mark.parametrize("backbone", [None, 0.01])
def test_the_first_step_is_the_protocol(run_folder, labelled, tiny, backbone):
    """SGD with Nesterov momentum on the mean cross-entropy, from the trained encoder, batch norm in
    training mode: one step by hand."""
    done = sacl_fast.evaluate.finetune(run_folder, **few(steps=1, backbone_lr=backbone))
    got = network(done.folder / "last.safetensors")
    config = replace(tiny, data=replace(tiny.data, root=str(labelled)))
    train_source = open_sources(config.data, 0).train
    encoder = sacl_fast.load_encoder(run_folder)
    torch.manual_seed(0)
    encoder.reset_classifier(3)  # type: ignore[operator]
    avoid_memory_overwrite(encoder)
    order = np.random.default_rng([0, 0]).permutation(60)
    loader = CropLoader(train_source, order, config, torch.device("cpu"))
    batches = loader.batches()
    pixels, index = next(batches)
    batches.close()
    images = pixels.permute(0, 3, 1, 2).float() / 255
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (config.views.mean, config.views.std))
    loss = nn.functional.cross_entropy(
        encoder.train()((images - mean) / std), torch.from_numpy(train_source.labels)[index]
    )
    loss.backward()
    for name, p in encoder.named_parameters():
        # A batch norm of 16 images of 16 px makes much of the last digits.
        assert p.grad is not None
        rate = 0.1 if name.startswith("fc.") or backbone is None else backbone
        stepped = p.detach() - rate * 1.9 * p.grad
        torch.testing.assert_close(got[name], stepped, rtol=1e-2, atol=1e-3)
    assert encoder.get_parameter("fc.weight").grad.abs().max() > 0.1
    for name, b in encoder.named_buffers():
        torch.testing.assert_close(got[name], b, rtol=1e-4, atol=1e-4, msg=name)


def test_the_slim_network_keeps_its_zeros(run_folder, capsys):
    done = sacl_fast.evaluate.finetune(run_folder, width="slim", from_scratch=True, **FEW)
    assert done.folder.name.endswith("-slim")
    slim = network(run_folder / "encoder_slim.safetensors")
    for folder in (done.folder, done.folder / "from_scratch"):
        got, zeros = network(folder / "last.safetensors"), 0
        for name, before in slim.items():
            if before.ndim == 4:
                zero = ~before.flatten(1).any(1)
                if folder == done.folder:
                    assert torch.equal(~got[name].flatten(1).any(1), zero), name
                zeros += int((~got[name].flatten(1).any(1)).sum())
        assert zeros > 10
        whole = load_classifier(folder / "last.safetensors")
        compact = load_classifier(folder / "last.safetensors", compact=True)
        sizes = [sum(p.numel() for p in m.parameters()) for m in (whole, compact)]
        assert sizes[1] < 0.7 * sizes[0]
        images = torch.randn(2, 3, 16, 16)
        torch.testing.assert_close(compact(images), whole(images), rtol=1e-4, atol=1e-4)


def test_slim_training_is_that_of_masked_weights(run_folder, labelled, monkeypatch):
    """Skipping the zeroed filters changes nothing but the time."""
    done = sacl_fast.evaluate.finetune(run_folder, width="slim", **FEW, out=run_folder / "a")
    none = Resolution("torch", "none here")
    monkeypatch.setattr("sacl_fast.transfer.classifier.of_slim_operators", lambda _: none)
    plain = sacl_fast.evaluate.finetune(run_folder, width="slim", **FEW, out=run_folder / "b")
    a, b = (network(d.folder / "last.safetensors") for d in (done, plain))
    for name, value in a.items():
        torch.testing.assert_close(value, b[name], rtol=1e-3, atol=1e-3, msg=name)


def encoder_file(path: Path, config: Config, name: str) -> Path:
    """An encoder of timm's as a run of 32 px would leave it after no step."""
    encoder = EncoderConfig(name=name, drop_path=0.0)
    config = replace(config, encoder=encoder, views=replace(config.views, size=32))
    said_of = encoder_metadata(config, epochs=0.0, steps=0, images=60, knn={}, slim=False)
    module = build_encoder(name, image_size=32)
    save_encoder(path, module.state_dict(), said_of)
    return path


def test_timm_loads_the_file(tiny, labelled, tmp_path):
    path = encoder_file(tmp_path / "encoder.safetensors", tiny, "mobilenetv3_small_050")
    data = replace(tiny.data, root=str(labelled))
    done = sacl_fast.evaluate.finetune(path, data=data, **few(size=64, steps=2))
    assert done.result is not None
    plain = timm.create_model("mobilenetv3_small_050", num_classes=3).eval()
    plain.load_state_dict(load_file(done.folder / "best.safetensors"))
    images = torch.randn(2, 3, 64, 64)
    ours = sacl_fast.load_classifier(done.folder / "best.safetensors")
    torch.testing.assert_close(plain(images), ours(images))


def test_position_embeddings_are_resized(tiny, labelled, tmp_path):
    path = encoder_file(tmp_path / "encoder.safetensors", tiny, "vit_tiny_patch16_224")
    data = replace(tiny.data, root=str(labelled))
    done = sacl_fast.evaluate.finetune(path, data=data, **few(size=48, steps=1))
    assert network(done.folder / "last.safetensors")["pos_embed"].shape[1] == 1 + 9


# Of a process that gets a signal after a step: before the checkpoint of that step, if one is due.
_SIGNALLED = """
import os, sys
from sacl_fast.transfer.training import Training
read = Training._read
def reading(self, *args):
    read(self, *args)
    if self.step == {step}:
        os.kill(os.getpid(), {number})
Training._read = reading
from sacl_fast.cli import main
ended = main({args!r})
"""


def test_a_run_that_was_stopped_and_killed_goes_on_exactly(
    run_folder, tmp_path, monkeypatch, capsys
):
    """By SIGTERM after step 3, which leaves a checkpoint; gone on with, and by SIGKILL after step
    5, of which nothing is left but the checkpoint of step 4."""
    whole = sacl_fast.evaluate.finetune(run_folder, **FEW, out=tmp_path / "whole")
    killed = tmp_path / "killed"
    args = ["finetune", str(run_folder), "--out", str(killed), *FEW_ARGS]

    def left() -> list[str]:
        assert not (killed / "last.safetensors").exists()
        return [path.stem for path in list_checkpoints(killed / "checkpoints")]

    monkeypatch.setattr(Training, "_read", Training._read)  # and put back at the end
    space: dict[str, Any] = {}
    exec(_SIGNALLED.format(step=3, number=int(signal.SIGTERM), args=args), space)
    monkeypatch.undo()
    assert space["ended"] == 128 + signal.SIGTERM and left() == ["step_00000003"]
    assert "--resume auto goes on" in refused(capsys, *args)
    args += ["--resume", "auto"]
    assert "steps: 6 -> 7" in refused(capsys, *args, "--steps", "7")
    code = _SIGNALLED.format(step=5, number=int(signal.SIGKILL), args=args)
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == -signal.SIGKILL, ended.stderr
    assert left() == ["step_00000004"]
    said(capsys, *args)
    for name in ("last.safetensors", "best.safetensors"):
        a, b = (network(tmp_path / part / name) for part in ("whole", "killed"))
        assert all(torch.equal(value, b[key]) for key, value in a.items()), name
    of = [
        {r["step"]: r["loss"] for r in read_metrics(tmp_path / part / "metrics.jsonl")
         if r["kind"] == "train"}
        for part in ("whole", "killed")
    ]  # fmt: skip
    assert of[0] == of[1] and len(of[0]) == 6
    assert whole.result is not None
    written = json.loads((killed / "finetune.json").read_text())
    top1 = written["encoders"][0]["figures"]["top-1"]["mean"]
    assert top1 == whole.result.scores[0].figures["top-1"].mean


def test_an_evaluation_that_a_signal_ended_is_made_up_for(run_folder, monkeypatch):
    """And a run that is finished says the same again."""
    evaluate = Training._evaluate
    with monkeypatch.context() as patch:

        def ended(self: Training, **_: Any) -> None:
            raise Stopped(signal.SIGTERM)

        patch.setattr(Training, "_evaluate", ended)
        done = sacl_fast.evaluate.finetune(run_folder, **FEW)
    assert (done.result, done.stopped_by) == (None, signal.SIGTERM)
    assert Training._evaluate is evaluate
    results = [sacl_fast.evaluate.finetune(run_folder, **FEW, resume="auto") for _ in range(2)]
    rows = [r for r in read_metrics(done.folder / "metrics.jsonl") if r["kind"] == "accuracy"]
    assert [row["step"] for row in rows] == [3, 6]
    first, second = (found.result for found in results)
    assert first is not None and second is not None
    assert first.verdict == second.verdict and first.scores[0].note == second.scores[0].note


def test_a_folder_of_something_else_is_not_written_into(run_folder, labelled, tmp_path, capsys):
    photos = shutil.copytree(labelled, tmp_path / "photos")
    (photos / "checkpoints").mkdir()
    for folder in (photos, photos / "train/one", run_folder):
        before = sorted(folder.rglob("*"))
        for resume in ("never", "auto"):
            args = ("--out", folder, "--resume", resume, *FEW_ARGS)
            told = refused(capsys, "finetune", run_folder, *args)
            assert "holds no fine-tuning; --out names another folder" in told
        assert sorted(folder.rglob("*")) == before
    begun = tmp_path / "begun"  # and killed before its first checkpoint
    (begun / "checkpoints").mkdir(parents=True)
    (begun / "metrics.jsonl").write_text("")
    said(capsys, "finetune", run_folder, "--out", begun, "--resume", "auto", *FEW_ARGS)


def test_mistakes_are_one_sentence_and_leave_nothing(run_folder, labelled, tmp_path, capsys):
    unlabelled, one, lacking = (tmp_path / name for name in ("unlabelled", "one", "lacking"))
    shutil.copytree(labelled / "train/one", unlabelled)
    shutil.copytree(labelled / "train/one", one / "only")
    shutil.copytree(labelled, lacking)
    shutil.rmtree(lacking / "train/two")
    (tmp_path / "file").write_text("")
    alone = tmp_path / "alone.safetensors"
    shutil.copy(run_folder / "encoder.safetensors", alone)
    out = tmp_path / "out"
    for args, hint in {
        (run_folder, "--data.root", unlabelled): "no labels",
        (run_folder, "--data.root", one): "no labels",
        (run_folder, "--data.root", lacking): "none of the class folders",
        (run_folder, "--data.root", tmp_path / "no"): "does not exist",
        (run_folder, "--percent", "0"): "percent is 0.0; a value above 0 and at most 100 works",
        (run_folder, "--percent", "5", "--per-class", "3"): "per_class is 3; one of the two works",
        (run_folder, "--per-class", "21"): "class one has only 20 training images; at most 20",
        (run_folder, "--width", "slimm"): "slimm",
        (alone,): "does not say on which images",
        (alone, "--width", "slim", "--data.root", labelled): "holds the dense encoder only",
        (tmp_path / "file",): "neither a checkpoint nor an encoder",
        (): "",
    }.items():
        if hint:
            assert hint in refused(capsys, "finetune", *args, "--out", out), args
            assert not out.exists(), args
    assert "needs what to fine-tune" in refused(capsys, "finetune", "--steps", "3")
    told = refused(capsys, "finetune", run_folder, "--out", tmp_path / "file/x", *FEW_ARGS)
    assert "--out names another folder" in told
    assert "--steps" in said(capsys, "finetune")
    with pytest.raises(UserError, match="unknown setting step; did you mean steps"):
        sacl_fast.evaluate.finetune(run_folder, step=3)
    with pytest.raises(UserError, match="does not say its classes, so it is no fine-tuned"):
        load_classifier(alone)


def test_one_process_is_enough(run_folder, monkeypatch, capsys):
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "LOCAL_RANK": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "localhost")
    monkeypatch.setenv("MASTER_PORT", "29500")
    with pytest.raises(UserError, match="fine-tuning runs in one process"):
        sacl_fast.evaluate.finetune(run_folder, **FEW)


def test_a_diverged_run_and_a_full_disk(run_folder, tmp_path, monkeypatch):
    with pytest.raises(UserError, match=r"diverged; a lower --lr"):
        sacl_fast.evaluate.finetune(run_folder, **FEW, lr=1e18, out=tmp_path / "far")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError, match="No space left on device"):
        sacl_fast.evaluate.finetune(run_folder, **FEW, out=tmp_path / "full")
    left = [p for p in (tmp_path / "full").rglob("*") if p.suffix in (".pt", ".safetensors")]
    assert not left


def test_unreadable_images_are_passed_over(run_folder, labelled, tmp_path):
    root = tmp_path / "some"
    shutil.copytree(labelled, root)
    (root / "train/one/0.png").write_text("none")
    (root / "val/one/0.png").write_text("none")
    data = DataConfig(root=str(root), workers=0)
    done = sacl_fast.evaluate.finetune(run_folder, data=data, **FEW)
    assert done.result is not None and done.result.test_images == 29
    read = sum(1 for path in (root / "train").rglob("*.png")) - 1
    assert done.result.train_images == read


def test_without_validation_images_a_tenth_is_held_out(run_folder, image_folder):
    done = sacl_fast.evaluate.finetune(
        run_folder, data=DataConfig(root=str(image_folder), workers=0), **FEW
    )
    assert done.result is not None and done.result.held_out
    assert (done.result.train_images, done.result.test_images) == (44, 4)
