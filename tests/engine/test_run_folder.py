"""The run's folder: what happens to it while the run writes, and what is tried before it starts."""

import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

import sacl_fast
from sacl_fast.config import to_dict
from sacl_fast.engine.distributed import process_group
from sacl_fast.engine.metrics import MetricWriter
from sacl_fast.engine.run_folder import claimed_run_folder
from sacl_fast.errors import UserError
from tests.engine.runs import checkpoints, losses, with_checkpoints

tiny = pytest.fixture(with_checkpoints)


@pytest.mark.parametrize("then", ["nothing", "an empty folder"])
def test_a_folder_that_vanishes_is_said_at_the_end_and_the_state_saved(tiny, monkeypatch, then):
    write = MetricWriter.write

    def vanishing(self, kind, step, epoch, values):
        write(self, kind, step, epoch, values)
        if step == 2 and not (self.folder.parent / "renamed").exists():
            self.folder.rename(self.folder.parent / "renamed")
            if then == "an empty folder":
                self.folder.mkdir()

    monkeypatch.setattr(MetricWriter, "write", vanishing)
    tiny = replace(tiny, checkpoint=replace(tiny.checkpoint, every_steps=0))
    with pytest.raises(UserError, match=r"was removed or renamed .*after step 2 is in"):
        sacl_fast.train(tiny)
    assert checkpoints(tiny.out) == [2]
    assert list(losses(Path(tiny.out).parent / "renamed")) == [1, 2]


def test_a_folder_is_gone_with_its_files_only(tiny, tmp_path):
    with process_group("cpu") as ranks, claimed_run_folder(tiny, ranks) as claim:
        (claim.path / "config.yaml").touch()
        assert not claim.is_gone()
        (claim.path / "run.lock").unlink()  # by hand: the folder is still there
        assert not claim.is_gone()
        (claim.path / "config.yaml").rename(tmp_path / "x")
        assert claim.is_gone()


def test_the_same_folder_twice_at_once(tiny):
    with process_group("cpu") as ranks, claimed_run_folder(tiny, ranks):
        with pytest.raises(UserError, match="in use by this process already"):
            sacl_fast.train(tiny)
        assert not (Path(tiny.out) / "metrics.jsonl").exists()
    assert not Path(tiny.out).exists()
    sacl_fast.train(replace(tiny, epochs=1))
    assert not (Path(tiny.out) / "run.lock").exists()


def test_runs_of_one_second_get_folders_of_their_own(tiny, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    config = replace(tiny, out=None, preset="demo")
    with process_group("cpu") as ranks:
        with claimed_run_folder(config, ranks) as one, claimed_run_folder(config, ranks) as two:
            assert one.path != two.path
        assert not list(Path("runs/demo").iterdir())


def test_an_encoder_that_cannot_be_written_is_said_before_training(tiny, monkeypatch):
    def refuse(*_):
        raise UserError("the encoder cannot be written as safetensors: no")

    monkeypatch.setattr("sacl_fast.engine.trainer.encode_encoder", refuse)
    with pytest.raises(UserError, match="cannot be written as safetensors"):
        sacl_fast.train(tiny)
    assert not Path(tiny.out).exists()


def test_a_disk_without_room_for_a_checkpoint_is_said_before_training(tiny, monkeypatch):
    usage = shutil.disk_usage(Path(tiny.out).parent)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10_000))
    with pytest.raises(UserError, match=r"has 0\.0 MB free, and a checkpoint of this run takes"):
        sacl_fast.train(tiny)
    assert not Path(tiny.out).exists()


@pytest.mark.parametrize("trouble", ["locked", "not a checkpoint"])
def test_all_ranks_end_with_one_sentence(tiny, tmp_path, trouble):
    options = []
    if trouble == "not a checkpoint":
        (tmp_path / "x.pt").write_text("hello")
        options = ["--resume", str(tmp_path / "x.pt")]
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(tiny)))
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m sacl_fast".split()
    command = [sys.executable, *torchrun, "train", "demo", "--config", str(file), *options]
    with (
        process_group("cpu") as ranks,
        claimed_run_folder(
            tiny if trouble == "locked" else replace(tiny, out=f"{tiny.out}-2"), ranks
        ),
    ):
        done = subprocess.run(command, capture_output=True, text=True, timeout=200)
    assert done.returncode != 0
    said = [line for line in done.stderr.splitlines() if line.startswith("sacl-fast:")]
    assert len(said) == 1, done.stderr
    assert ("is in use by" if trouble == "locked" else "x.pt cannot be read") in said[0]
