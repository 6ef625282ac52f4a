"""What a run leaves, opened again: its folder, its checkpoints, its encoders' files."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml

import sacl_fast
from sacl_fast.config import Config
from sacl_fast.engine.checkpoint import list_checkpoints, load_checkpoint, save_checkpoint
from sacl_fast.engine.trainer import RunResult, train
from sacl_fast.errors import UserError
from sacl_fast.evaluation.load import training_batches
from sacl_fast.evaluation.trained import fresh_encoder, open_trained

CPU = torch.device("cpu")


@pytest.fixture
def run(tiny: Config) -> RunResult:
    result = train(replace(tiny, checkpoint=replace(tiny.checkpoint, keep=9, every_steps=1)))
    assert result.finished, f"stopped by signal {result.stopped_by}"
    return result


def newest(folder: Path) -> Path:
    return list_checkpoints(folder / "checkpoints")[-1]


def same(a: dict, b: dict) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_a_run_folder_its_last_checkpoint_and_its_files_hold_the_same(run, tiny):
    folder, names = run.folder, ("encoder.safetensors", "encoder_slim.safetensors")
    whole, last = open_trained(folder), open_trained(str(newest(folder)))
    dense, slim = (open_trained(folder / name) for name in names)
    for trained in (whole, last):
        assert trained.kind == "checkpoint" and trained.folder == folder.absolute()
        assert trained.config == tiny or trained.config == replace(
            tiny, checkpoint=trained.config.checkpoint
        )
        assert (trained.steps, trained.epochs, trained.images) == (6, 2.0, 48)
        assert trained.knn == run.knn and trained.knn_before == run.knn_before
        assert trained.widths == ("dense", "slim") and trained.has_data
        assert same(trained.state("dense"), dense.state("dense"))
        assert same(trained.state("slim"), slim.state("slim"))
    for trained, width in ((dense, "dense"), (slim, "slim")):
        assert trained.widths == (width,) and trained.slicer is None and not trained.has_data
        assert trained.config.views.size == 16 and trained.config.encoder.width == 0.25
        assert (trained.steps, trained.epochs, trained.images) == (6, 2.0, 48)
        assert trained.knn == pytest.approx(run.knn)
        assert not trained.encoder.training


def test_a_checkpoint_in_the_midst_has_its_statistics_estimated(run):
    early = open_trained(run.folder / "checkpoints" / "step_00000004.pt")
    assert early.steps == 4 and not early.states
    with pytest.raises(UserError, match=r"statistics are not in .*step_00000004.pt"):
        early.state("dense")
    stored = {k: v.clone() for k, v in early.encoder.state_dict().items()}
    state = early.state("dense", lambda: training_batches(early, CPU))
    assert same(early.encoder.state_dict(), stored)  # the encoder is left as it was
    changed = {k for k in state if not torch.equal(state[k], stored[k])}
    assert changed and all("running" in k or "num_batches" in k for k in changed)
    slim = early.state("slim", lambda: training_batches(early, CPU))
    assert any((v.flatten(1).abs().sum(1) == 0).any() for v in slim.values() if v.ndim == 4)


def test_load_encoder(run):
    x = torch.rand(3, 3, 16, 16)
    folder = run.folder
    with torch.no_grad():
        dense = [
            sacl_fast.load_encoder(p)
            for p in (folder, newest(folder), folder / "encoder.safetensors")
        ]
        for encoder in dense[1:]:
            assert not encoder.training and torch.equal(encoder(x), dense[0](x))
        slim = [
            sacl_fast.load_encoder(p, width="slim")
            for p in (folder, newest(folder), folder / "encoder_slim.safetensors")
        ]
        for encoder in slim[1:]:
            torch.testing.assert_close(encoder(x), slim[0](x))
        masked = open_trained(folder)
        masked.encoder.load_state_dict(masked.state("slim"))
        torch.testing.assert_close(slim[0](x), masked.encoder(x))
    size = [sum(p.numel() for p in e.parameters()) for e in (dense[0], slim[0])]
    assert size[1] < 0.7 * size[0]
    early = folder / "checkpoints/step_00000004.pt"
    assert sacl_fast.load_encoder(early)(x).shape == (3, 16)
    assert sacl_fast.load_encoder(early, width="slim")(x).shape == (3, 16)
    with pytest.raises(UserError, match="holds the slim encoder only; width 'slim' works"):
        sacl_fast.load_encoder(folder / "encoder_slim.safetensors")
    with pytest.raises(UserError, match="one of dense, slim works"):
        sacl_fast.load_encoder(folder, width="thin")  # type: ignore[arg-type]


def test_without_checkpoints_the_files_are_opened(run, tiny):
    for path in (run.folder / "checkpoints").iterdir():
        path.unlink()
    trained = open_trained(run.folder)
    assert trained.kind == "encoder" and trained.has_data
    assert trained.config.data == tiny.data and trained.config.views == tiny.views
    assert trained.widths == ("dense", "slim")
    x = torch.rand(3, 3, 16, 16)
    with torch.no_grad(), trained.as_width("slim") as slim:
        torch.testing.assert_close(sacl_fast.load_encoder(run.folder, width="slim")(x), slim(x))


def test_the_untrained_encoder_is_the_one_the_run_began_with(run, tiny):
    fresh, trained = fresh_encoder(tiny), open_trained(run.folder)
    first = "conv1.weight"
    assert not torch.equal(fresh.state_dict()[first], trained.encoder.state_dict()[first])
    again = replace(tiny, epochs=1, optim=replace(tiny.optim, lr=1e-30), out=f"{tiny.out}2")
    still = open_trained(train(again).folder)
    for (name, p), q in zip(fresh.named_parameters(), still.encoder.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=name)


def test_a_damaged_checkpoint_is_passed_over(run, caplog):
    newest(run.folder).write_bytes(b"damaged")
    trained = open_trained(run.folder)
    assert trained.steps == 5 and "opening the one before" in caplog.text


def test_settings_of_another_version_are_passed_over(run, tmp_path):
    state = load_checkpoint(newest(run.folder))
    state["config"]["novel"] = 1
    state["config"]["encoder"]["novel"] = {"a": 2}
    del state["config"]["engine"], state["format"]
    save_checkpoint(tmp_path / "c/step_00000006.pt", state, keep=1)
    assert open_trained(tmp_path / "c/step_00000006.pt").steps == 6


def test_what_is_no_trained_encoder_is_one_sentence(run, tmp_path, image_folder):
    state = load_checkpoint(newest(run.folder))
    del state["format"]
    state["config"]["encoder"]["name"] = "mobilenetv3_small_100"
    save_checkpoint(tmp_path / "other.pt", state, keep=1)
    state["config"]["encoder"]["name"] = "mobilnet"
    save_checkpoint(tmp_path / "unknown.pt", state, keep=1)
    (tmp_path / "text.pt").write_text("hello")
    (tmp_path / "text.safetensors").write_text("hello")
    (tmp_path / "picture.png").write_text("hello")
    for path, hint in {
        "nowhere": "nothing at .*nowhere .*a run folder, a checkpoint",
        "images": "images holds no run: no checkpoint and no encoder; a run folder",
        "other.pt": "other.pt does not hold the encoder that it names",
        "unknown.pt": "does not hold the encoder that it names: unknown encoder 'mobilnet'",
        "text.pt": "damaged or not a checkpoint",
        "text.safetensors": "is no safetensors file",
        "picture.png": "neither a checkpoint nor an encoder; a run folder",
        "run/config.yaml": "its folder .*run works",
        ".": "the run folder .*run in it works",
    }.items():
        with pytest.raises(UserError, match=hint):
            open_trained(tmp_path / path)


def test_a_checkpoint_whose_images_are_gone(run, tiny, image_folder):
    image_folder.rename(image_folder.with_name("elsewhere"))
    assert sacl_fast.load_encoder(run.folder) is not None  # needs none
    with pytest.raises(UserError, match=r"estimated from the images .* but .*does not exist"):
        sacl_fast.load_encoder(run.folder / "checkpoints/step_00000004.pt")


def test_a_config_file_beside_encoders_that_is_damaged(run):
    for path in (run.folder / "checkpoints").iterdir():
        path.unlink()
    values = yaml.safe_load((run.folder / "config.yaml").read_text())
    (run.folder / "config.yaml").write_text(yaml.safe_dump(values | {"epochs": "many"}))
    with pytest.raises(UserError, match=r"settings in .*config.yaml are not valid: epochs"):
        open_trained(run.folder)
