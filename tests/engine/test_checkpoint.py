"""Checkpoint files: what is written is what is read, and anything else is refused."""

import os
import pickle
import random
import subprocess
import sys
import zipfile

import pytest
import torch

from sacl_fast.engine.checkpoint import (
    UnusableCheckpoint,
    checkpoint_path,
    list_checkpoints,
    load_checkpoint,
    mark_best,
    save_checkpoint,
)


def state(step=8):
    generator = torch.Generator().manual_seed(step)
    return {
        "version": "0.1.0",
        "config": {"epochs": 2},
        "step": step,
        "steps_per_epoch": 4,
        "data": {"fingerprint": "0" * 32, "images": 70, "classes": 2},
        "model": {"weight": torch.randn(7, 5, generator=generator), "count": torch.tensor(3)},
        "optimizer": {"state": {}, "param_groups": []},
        "scaler": {},
        "random": [{"cpu": torch.arange(9, dtype=torch.uint8)}],
        "knn": {"knn_dense": 31.5},
        "knn_before": {},
        "best_knn": -1.0,
    }


@pytest.fixture
def saved(tmp_path):
    path = checkpoint_path(tmp_path / "checkpoints", 8)
    save_checkpoint(path, state(), keep=2)
    return path


def test_what_is_written_is_read(saved):
    loaded = load_checkpoint(saved)
    assert torch.equal(loaded["model"]["weight"], state()["model"]["weight"])
    assert {k: loaded[k] for k in ("step", "knn", "data")} == {
        k: state()[k] for k in ("step", "knn", "data")
    }
    assert torch.load(saved, weights_only=True)["step"] == 8  # a file of torch.save as any other
    assert zipfile.ZipFile(saved).testzip() is None
    assert [p.name for p in saved.parent.iterdir()] == [saved.name]


def test_every_flipped_bit_is_noticed(saved):
    whole = saved.read_bytes()
    bits = random.Random(0)
    for position in range(len(whole)):
        damaged = bytearray(whole)
        damaged[position] ^= 1 << bits.randrange(8)
        saved.write_bytes(damaged)
        with pytest.raises(UnusableCheckpoint, match="damaged"):
            load_checkpoint(saved)


def test_every_shorter_or_longer_file_is_noticed(saved):
    whole = saved.read_bytes()
    lengths = [*range(0, len(whole), 61), *range(len(whole) - 90, len(whole))]
    for content in [*(whole[:n] for n in lengths), whole + b"\n", whole + whole, whole[1:]]:
        saved.write_bytes(content)
        with pytest.raises(UnusableCheckpoint, match="damaged"):
            load_checkpoint(saved)


class Evil:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize(
    "content",
    [b"", b"hello\n", b"<html>404</html>", b"\0" * 5000, b"PK\x03\x04", b"\x80\x02}q\x00.",
     b"PK\x05\x06" + bytes(18), pickle.dumps(Evil()), pickle.dumps({"format": 1}),
     random.Random(1).randbytes(999)],
)  # fmt: skip
def test_files_that_are_something_else(tmp_path, content, monkeypatch):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "step_00000008.pt"
    path.write_bytes(content)
    with pytest.raises(UnusableCheckpoint, match=r"damaged or not a checkpoint of sacl-fast$") as e:
        load_checkpoint(path)
    assert "weights_only" not in str(e.value) and "\n" not in str(e.value)
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "content",
    [
        torch.zeros(3),
        [1],
        {"state_dict": {}},
        torch.nn.Linear(2, 2),
        {"format": 1},
        {"format": torch.zeros(2)},
        {"format": 99},
        {"format": 2, **state()},  # sealed ones only
        {"format": 1, **state(), "step": "8"},
        {"format": 1, **state(), "steps_per_epoch": 0},
        {"format": 1, **state(), "model": None},
        {"format": 1, **{k: v for k, v in state().items() if k != "optimizer"}},
        Evil(),
    ],
    ids=range(13),
)
def test_files_of_torch_that_are_something_else(tmp_path, content):
    path = tmp_path / "other.pt"
    torch.save(content, path)
    with pytest.raises(UnusableCheckpoint, match=r"^(checkpoint )?\S+other\.pt ") as error:
        load_checkpoint(path)
    assert "weights_only" not in str(error.value)


def test_things_that_are_no_files(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "dangling").symlink_to("nothing")
    for name in ("pipe", "dangling", "nothing", ""):
        with pytest.raises(UnusableCheckpoint, match="no checkpoint"):
            load_checkpoint(tmp_path / name)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UnusableCheckpoint, match="cannot look at"):
        load_checkpoint(tmp_path / "loop")


def test_checkpoints_without_a_seal_are_held_against_torch_s_checksums(tmp_path):
    path = tmp_path / "old.pt"
    torch.save({"format": 1, **state()}, path)
    assert load_checkpoint(path)["step"] == 8
    whole = bytearray(path.read_bytes())
    whole[whole.index(state()["model"]["weight"].numpy().tobytes()) + 17] ^= 4
    path.write_bytes(whole)
    with pytest.raises(UnusableCheckpoint, match=r"the checksum of .* is another"):
        load_checkpoint(path)


def test_only_older_ones_are_deleted(tmp_path, caplog):
    for step in (4, 99_999_999, 100_000_000, 8):  # which sorts by number
        save_checkpoint(checkpoint_path(tmp_path, step), state(step), keep=9)
    (tmp_path / "step_00000002.pt").mkdir()
    assert [p.stem for p in list_checkpoints(tmp_path)][-2:] == ["step_99999999", "step_100000000"]
    save_checkpoint(checkpoint_path(tmp_path, 12), state(12), keep=1)
    assert [p.stem for p in list_checkpoints(tmp_path)] == [
        "step_00000002", "step_00000012", "step_99999999", "step_100000000",
    ]  # fmt: skip
    assert "cannot delete the old checkpoint" in caplog.text


def test_the_best_one_stays(saved):
    for _ in range(2):
        mark_best(saved)
    assert sorted(p.name for p in saved.parent.iterdir()) == ["best.pt", saved.name]
    save_checkpoint(checkpoint_path(saved.parent, 12), state(12), keep=1)
    assert load_checkpoint(saved.parent / "best.pt")["step"] == 8


def test_the_best_one_without_hard_links(saved, monkeypatch):
    def refuse(*_):
        raise PermissionError

    monkeypatch.setattr(os, "link", refuse)
    mark_best(saved)
    assert load_checkpoint(saved.parent / "best.pt")["step"] == 8


def test_temporary_names_follow_no_links(saved, tmp_path):
    """Names that can be foretold could be links to a file of the user's."""
    victim = tmp_path / "victim"
    victim.write_text("mine")
    for name in ("step_00000012.pt.tmp", "best.pt.tmp", "step_00000012.pt", "best.pt"):
        (saved.parent / name).symlink_to(victim)
    path = checkpoint_path(saved.parent, 12)
    save_checkpoint(path, state(12), keep=2)
    mark_best(path)
    assert victim.read_text() == "mine"
    assert load_checkpoint(saved.parent / "best.pt")["step"] == 12


FULL_DISK = """
import resource, sys
from pathlib import Path
sys.path.insert(0, sys.argv[2])
from test_checkpoint import state
from sacl_fast.engine.checkpoint import save_checkpoint
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
save_checkpoint(Path(sys.argv[1]) / "step_00000012.pt", state(12), keep=1)
"""


def test_a_full_disk_is_said_and_deletes_nothing(saved):
    """A limit on a file's size stands for it; at any length, the seal's included."""
    size = saved.stat().st_size
    for limit in (0, 1, 700, size - 80, size - 1):
        options = str(saved.parent), os.path.dirname(__file__), str(limit)
        done = subprocess.run(
            [sys.executable, "-c", FULL_DISK, *options],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(p for p in sys.path if p)},
        )
        said = done.stderr.splitlines()[-1]
        assert "UserError: cannot write checkpoint" in said and "File too large" in said, said
        assert f"({saved.name} is kept and --resume auto goes on from it)" in said
        assert [p.name for p in saved.parent.iterdir()] == [saved.name]
