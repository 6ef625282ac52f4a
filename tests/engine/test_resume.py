"""Going on from a checkpoint: what is refused, what is set aside, what stays the same."""

import os
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image

import sacl_fast
from sacl_fast.engine.checkpoint import (
    UnusableCheckpoint,
    changed_settings,
    list_checkpoints,
    load_checkpoint,
    save_checkpoint,
)
from sacl_fast.engine.distributed import process_group
from sacl_fast.engine.metrics import read_metrics
from sacl_fast.engine.run_folder import claimed_run_folder
from sacl_fast.engine.trainer import Run
from sacl_fast.errors import UserError
from tests.engine.runs import checkpoints, losses, with_checkpoints

tiny = pytest.fixture(with_checkpoints)


@pytest.fixture(scope="module")
def kept(tmp_path_factory):
    return tmp_path_factory.mktemp("kept") / "run"


@pytest.fixture
def trained(tiny, kept):
    """``tiny``, trained: once for all tests, since a run's folder can be copied."""
    if kept.exists():
        shutil.copytree(kept, tiny.out)
    else:
        sacl_fast.train(tiny)
        shutil.copytree(tiny.out, kept)
    return tiny


def at(config, step):
    return str(Path(config.out) / "checkpoints" / f"step_{step:08d}.pt")


def keep_until(config, step):
    """The run as it was when it was killed after ``step``, with a checkpoint at each."""
    for path in list_checkpoints(Path(config.out) / "checkpoints"):
        if int(path.stem[5:]) > step:
            path.unlink()
    (Path(config.out) / "encoder.safetensors").unlink(missing_ok=True)


def rewrite(path, **changes):
    """A checkpoint with other content, sealed like any."""
    state = load_checkpoint(Path(path))
    state.pop("format")
    save_checkpoint(Path(path), {k: v for k, v in (state | changes).items() if v != "gone"}, keep=9)


# Back to an earlier step


def test_going_back_sets_aside_what_came_after(trained, caplog):
    folder, before = Path(trained.out), losses(trained.out)
    back = replace(trained, resume=at(trained, 2), optim=replace(trained.optim, lr=0.5))
    sacl_fast.train(back)
    assert checkpoints(folder) == [1, 2, 3, 4, 5, 6]
    (aside,) = (folder / "superseded").iterdir()
    assert sorted(p.name for p in aside.iterdir()) == [
        "best.pt", "encoder.safetensors", "encoder_slim.safetensors", "metrics.jsonl",
        *(f"step_0000000{i}.pt" for i in "3456"),
    ]  # fmt: skip
    rows = read_metrics(aside / "metrics.jsonl")
    assert {r["step"]: r["loss"] for r in rows if r["kind"] == "train"} == {
        step: loss for step, loss in before.items() if step > 2
    }
    after = losses(folder)
    assert after.keys() == before.keys() and after[2] == before[2] and after[6] != before[6]
    assert "the run goes on from step 2, so this is moved to" in caplog.text
    assert "the learning rate goes on at" in caplog.text
    assert load_checkpoint(Path(at(trained, 6)))["config"]["optim"]["lr"] == 0.5


def test_two_runs_back_keep_both_pasts(trained):
    for _ in range(2):
        sacl_fast.train(replace(trained, resume=at(trained, 4)))
    asides = sorted((Path(trained.out) / "superseded").iterdir())
    assert len(asides) == 2
    assert all((aside / "step_00000006.pt").exists() for aside in asides)


def test_another_run_s_checkpoint_into_a_folder_in_use_deletes_nothing(tiny):
    sacl_fast.train(replace(tiny, epochs=1))
    other = replace(tiny, out=f"{tiny.out}-2", seed=1, epochs=1)
    sacl_fast.train(other)
    sacl_fast.train(replace(tiny, out=other.out, resume=at(tiny, 2), epochs=1))
    assert checkpoints(other.out) == [3] and list(losses(other.out)) == [3]
    (aside,) = (Path(other.out) / "superseded").iterdir()
    assert len(list(aside.glob("step_*.pt"))) == 3 and list(losses(aside)) == [1, 2, 3]


def test_checkpoints_that_are_gone_do_not_take_the_metrics_with_them(trained, caplog):
    before = losses(trained.out)
    shutil.rmtree(Path(trained.out) / "checkpoints")
    sacl_fast.train(replace(trained, resume="auto"))
    assert losses(trained.out) == before  # from the start, the same ones
    (aside,) = (Path(trained.out) / "superseded").iterdir()
    assert (
        losses(aside) == before and "the run begins at step 0, so this is moved to" in caplog.text
    )


@pytest.mark.parametrize("thing", ["file", "pipe", "loop"])
def test_checkpoints_that_is_no_folder_is_said_first(tiny, thing):
    sacl_fast.train(replace(tiny, epochs=1))
    folder = Path(tiny.out)
    before = (folder / "metrics.jsonl").read_bytes()
    shutil.rmtree(folder / "checkpoints")
    path = folder / "checkpoints"
    {"file": path.touch, "pipe": lambda: os.mkfifo(path), "loop": lambda: path.symlink_to(path)}[
        thing
    ]()
    with pytest.raises(UserError, match=r"checkpoints"):
        sacl_fast.train(replace(tiny, resume="auto"))
    assert (folder / "metrics.jsonl").read_bytes() == before
    assert not (folder / "superseded").exists() and not (folder / "run.lock").exists()


# Other data


def test_other_images_are_refused_or_gone_on_with_from_the_next_epoch(
    trained, image_folder, caplog
):
    keep_until(trained, 4)
    before = losses(trained.out)
    (image_folder / "dark" / "00.png").unlink()
    for i in range(50, 67):  # one image gone, 17 more: 64, four steps an epoch
        Image.new("RGB", (20, 20), (i, 0, 0)).save(image_folder / "dark" / f"{i}.png")
    resumed = replace(trained, resume="auto", epochs=3)
    said = r"48 images there, 64 here; 3 steps an epoch there, 4 here.*--resume-at next_epoch"
    with pytest.raises(UserError, match=said):
        sacl_fast.train(resumed)
    assert losses(trained.out) == before
    result = sacl_fast.train(replace(resumed, resume_at="next_epoch"))
    assert result.finished and result.steps == 12  # step 4 was in epoch 2 of 3: epoch 3 of 4 steps
    assert checkpoints(trained.out)[-5:] == [8, 9, 10, 11, 12]
    assert "going on from the next epoch: 48 images there, 64 here" in caplog.text
    assert load_checkpoint(Path(at(trained, 12)))["data"]["images"] == 64


def test_fewer_steps_an_epoch_than_before(trained, image_folder):
    """The numbers go back: what has higher ones is set aside, but not before there is a new one."""
    keep_until(trained, 4)
    for i in range(20):
        (image_folder / "dark" / f"{i:02}.png").unlink()  # one step an epoch
    one = replace(
        trained,
        resume="auto",
        resume_at="next_epoch",
        epochs=4,
        checkpoint=replace(trained.checkpoint, keep=1),
    )
    result = sacl_fast.train(one)
    assert result.finished and result.steps == 4 and checkpoints(trained.out) == [4]
    aside = Path(trained.out) / "superseded"
    assert sorted(p.name for p in aside.rglob("step_*")) == ["step_00000003.pt", "step_00000004.pt"]
    assert sacl_fast.train(one).steps == 4


@pytest.mark.parametrize("change", ["removed", "renamed", "added", "larger", "another class"])
def test_images_that_changed_are_noticed(tiny, image_folder, change):
    sacl_fast.train(replace(tiny, epochs=1))
    path = image_folder / "dark" / "07.png"
    if change == "removed":
        path.unlink()
    elif change == "renamed":
        path.rename(path.with_name("x.png"))
    elif change == "added":
        shutil.copy(path, path.with_name("x.png"))
    elif change == "larger":
        Image.effect_noise((60, 60), 90).convert("RGB").save(path)
    else:
        path.rename(image_folder / "bright" / "x.png")
    with pytest.raises(UserError, match=r"trained on other images or in another order: 48 images"):
        sacl_fast.train(replace(tiny, resume="auto"))


def test_the_same_images_elsewhere_are_the_same(trained, image_folder):
    keep_until(trained, 4)
    before = losses(trained.out)
    moved = image_folder.rename(image_folder.with_name("elsewhere"))
    data = replace(trained.data, root=str(moved))
    sacl_fast.train(replace(trained, resume="auto", data=data))
    assert losses(trained.out) == before


def test_another_order_is_refused_in_mid_epoch_only(trained, caplog):
    keep_until(trained, 4)
    with pytest.raises(UserError, match="seed is 0 there, 1 here"):
        sacl_fast.train(replace(trained, resume="auto", seed=1))
    with pytest.raises(UserError, match=r"3 steps an epoch there, 4 here; batch_size is 16"):
        sacl_fast.train(replace(trained, resume="auto", batch_size=12))
    with pytest.raises(UserError, match=r"batch_size is 16 there, 15 here"):
        sacl_fast.train(replace(trained, resume="auto", batch_size=15))
    keep_until(trained, 3)
    assert sacl_fast.train(replace(trained, resume="auto", seed=1)).finished
    assert "resuming with another seed: 0 -> 1" in caplog.text


def test_a_checkpoint_that_does_not_know_its_images(trained, caplog):
    keep_until(trained, 4)
    rewrite(at(trained, 4), data="gone")
    assert sacl_fast.train(replace(trained, resume="auto")).finished
    assert "does not say which images it was trained on" in caplog.text


# The end


def test_fewer_epochs_than_are_done(trained):
    keep_until(trained, 4)
    before = (Path(trained.out) / "metrics.jsonl").read_bytes()
    with pytest.raises(UserError, match="step 4 in epoch 2 of 2, so epochs 1 leaves nothing"):
        sacl_fast.train(replace(trained, resume="auto", epochs=1))
    keep_until(trained, 3)  # at the end of its first epoch, with the rate of a run of two
    with pytest.raises(UserError, match="step 3 in epoch 1 of 2, so epochs 1 leaves nothing"):
        sacl_fast.train(replace(trained, resume="auto", epochs=1))
    assert (Path(trained.out) / "metrics.jsonl").read_bytes() == before
    assert not (Path(trained.out) / "encoder.safetensors").exists()


def test_a_finished_run_is_left_as_it_is_and_what_is_missing_written(tiny, capsys):
    first = sacl_fast.train(tiny)
    folder = Path(tiny.out)
    encoder, metrics = folder / "encoder.safetensors", (folder / "metrics.jsonl").read_bytes()
    written = encoder.stat().st_mtime_ns, encoder.read_bytes()
    again = replace(tiny, resume="auto")
    result = sacl_fast.train(again)
    assert result == first
    assert (encoder.stat().st_mtime_ns, encoder.read_bytes()) == written
    encoder.unlink()
    assert sacl_fast.train(again) == first
    assert safetensors_equal(encoder.read_bytes(), written[1])
    assert (folder / "metrics.jsonl").read_bytes() == metrics
    assert not (folder / "superseded").exists()
    assert capsys.readouterr().out.count("all epochs (2) were done before") == 2
    # Other ways to run and to evaluate change nothing of what was trained; these would.
    assert sacl_fast.train(replace(again, eval=replace(tiny.eval, k=3))) == first
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    optim, slim = replace(tiny.optim, lr=0.5), replace(tiny.slim, ratio=0.25)
    for other, named in (
        (replace(again, slim=slim, optim=optim), "optim.lr: 1.0 -> 0.5; slim.ratio: 0.5 -> 0.25"),
        (replace(again, seed=1), "seed: 0 -> 1"),
    ):
        with pytest.raises(UserError, match=f"is of a finished run, .* settings: {named}. Those"):
            sacl_fast.train(other)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def safetensors_equal(one, other):
    from safetensors.torch import load

    one, other = load(one), load(other)
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def test_more_epochs_set_the_old_encoder_aside(trained):
    assert sacl_fast.train(replace(trained, resume="auto", epochs=3)).steps == 9
    (aside,) = (Path(trained.out) / "superseded").iterdir()
    assert sorted(p.name for p in aside.iterdir()) == [
        "encoder.safetensors",
        "encoder_slim.safetensors",
    ]


# Damage


def test_every_kind_of_damage_falls_back_to_the_one_before(trained, caplog):
    before = losses(trained.out)
    folder = Path(trained.out) / "checkpoints"
    whole = Path(at(trained, 6)).read_bytes()
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 1
    keep_until(trained, 3)
    for step, content in enumerate((b"hello\n", b"", whole[:-1], bytes(flipped)), start=4):
        Path(at(trained, step)).write_bytes(content)
    shutil.copy(at(trained, 3), at(trained, 8))
    rewrite(at(trained, 8), optimizer="gone")
    shutil.copy(at(trained, 3), at(trained, 9))
    model = load_checkpoint(Path(at(trained, 3)))["model"]
    rewrite(at(trained, 9), model={k: v for k, v in model.items() if "conv1" not in k})
    (folder / "step_00000010.pt").mkdir()
    (folder / "step_00000011.pt").symlink_to("nothing")
    torch.save({"state_dict": {}}, at(trained, 12))
    (folder / "step_00000013.pt").symlink_to("step_00000013.pt")
    result = sacl_fast.train(replace(trained, resume="auto"))
    assert result.finished and losses(trained.out) == before
    assert caplog.text.count("; trying the one before") == 10
    assert checkpoints(trained.out) == [1, 2, 3, 4, 5, 6]
    (aside,) = (Path(trained.out) / "superseded").iterdir()
    assert len(list(aside.glob("step_*.pt"))) == 10


def test_damage_of_all_is_said_and_nothing_is_started(tiny):
    sacl_fast.train(replace(tiny, epochs=1))
    before = (Path(tiny.out) / "metrics.jsonl").read_bytes()
    for step in (1, 2, 3):
        Path(at(tiny, step)).write_text("hello")
    with pytest.raises(UnusableCheckpoint, match=r"damaged .* Another checkpoint .* works"):
        sacl_fast.train(replace(tiny, resume="auto"))
    assert (Path(tiny.out) / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize(
    "given", ["nothing.pt", "", "~no-such-user-here/x.pt", "x" * 300, "a\0b", "."]
)
def test_paths_that_are_no_checkpoint(tiny, given, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"resume is|cannot look at|no checkpoint in"):
        sacl_fast.train(replace(tiny, resume=given))
    assert not Path(tiny.out).exists()  # nothing is left of a run that did not begin


def test_damaged_metrics_end_nothing(trained):
    keep_until(trained, 4)
    before = losses(trained.out)
    path = Path(trained.out) / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines.insert(2, b"\xff\0 nonsense\n")
    path.write_bytes(b"".join(lines))
    assert sacl_fast.train(replace(trained, resume="auto")).finished
    assert losses(trained.out) == before


# Settings


def test_another_optimiser_is_refused(tiny):
    sacl_fast.train(replace(tiny, epochs=1))
    with pytest.raises(UserError, match=r"optim.name is 'adamw' here and 'lars' there"):
        sacl_fast.train(replace(tiny, resume="auto", optim=replace(tiny.optim, name="adamw")))


def test_the_optimiser_s_settings_are_those_of_now(tiny):
    sacl_fast.train(replace(tiny, epochs=1))
    optim = replace(tiny.optim, weight_decay=0.25, momentum=0.5)
    config = replace(tiny, resume="auto", optim=optim)
    with process_group("cpu") as ranks, claimed_run_folder(config, ranks) as claim:
        run = Run(config, ranks, claim)
        groups = run.step.optimizer.param_groups
        assert any(g["weight_decay"] == 0.25 for g in groups)
        assert all(g["momentum"] == 0.5 for g in groups)
        assert run.step.optimizer.state  # which is the checkpoint's
        run.console.close()
        run.close()


def test_settings_of_another_version_are_no_change():
    there = {"a": 1, "old": 2, "data": {"x": 1, "gone": 3}}
    here = {"a": 2, "new": 2, "data": {"x": 2, "more": 3}}
    assert changed_settings(there, here) == ["a: 1 -> 2", "data.x: 1 -> 2"]
