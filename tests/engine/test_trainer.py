"""A whole run: what it leaves behind, that it can be repeated, stopped, killed and resumed."""

import fcntl
import json
import os
import pty
import select
import signal
import subprocess
import sys
import termios
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

import sacl_fast
from sacl_fast.config import Config, to_dict
from sacl_fast.encoders import build_encoder
from sacl_fast.engine.checkpoint import list_checkpoints, load_checkpoint
from sacl_fast.engine.diagnosis import NonFiniteLoss
from sacl_fast.engine.distributed import process_group
from sacl_fast.engine.metrics import read_metrics
from sacl_fast.engine.run_folder import claimed_run_folder
from sacl_fast.engine.trainer import Run
from sacl_fast.errors import UserError
from sacl_fast.slim import Slicer


def losses(folder: str | Path) -> dict[int, float]:
    rows = read_metrics(Path(folder) / "metrics.jsonl")
    return {row["step"]: row["loss"] for row in rows if row["kind"] == "train"}


def command(config: Config, *options: str, prefix: tuple[str, ...] = ()) -> list[str]:
    """The command line that runs ``config`` in a process of its own."""
    file = Path(config.out or ".").with_suffix(".yaml")
    file.write_text(yaml.safe_dump(to_dict(config)))
    start = prefix or (sys.executable, "-m", "sacl_fast")
    return [*start, "train", "demo", "--config", str(file), *options]


def run(arguments: list[str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(arguments, capture_output=True, text=True, timeout=300)


def test_a_run_leaves_what_it_promises(tiny):
    result = sacl_fast.train(tiny)
    folder = result.folder
    assert result.finished and result.steps == 6 and set(result.knn) == {"knn_dense", "knn_slim"}
    for name in ("config.yaml", "environment.json", "curves.png", "views.png"):
        assert (folder / name).stat().st_size > 100
    rows = read_metrics(folder / "metrics.jsonl")
    assert [r["step"] for r in rows if r["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [r["epoch"] for r in rows if r["kind"] == "knn"] == [0, 1, 2]
    for row in [r for r in rows if r["kind"] == "train"]:
        parts = row["on_diagonal"] + row["off_diagonal"] + row["distillation"]
        assert row["loss"] == pytest.approx(parts)
    assert yaml.safe_load((folder / "config.yaml").read_text()) == to_dict(tiny)
    assert "torch" in json.loads((folder / "environment.json").read_text())
    encoder = build_encoder("resnet20", width=0.25, image_size=16)
    encoder.load_state_dict(load_file(folder / "encoder.safetensors"))


def test_runs_repeat_bit_for_bit_for_any_number_of_workers(tiny):
    sacl_fast.train(tiny)
    again = replace(tiny, out=f"{tiny.out}-2", data=replace(tiny.data, workers=2))
    sacl_fast.train(again)
    assert losses(tiny.out) == losses(again.out)
    other = replace(tiny, out=f"{tiny.out}-3", seed=1, epochs=1)
    sacl_fast.train(other)
    assert losses(other.out)[1] != losses(tiny.out)[1]


def test_evaluating_does_not_touch_training(tiny):
    sacl_fast.train(tiny)
    blind = replace(tiny, out=f"{tiny.out}-2", data=replace(tiny.data, labels="none"))
    assert sacl_fast.train(blind).knn == {}
    assert losses(tiny.out) == losses(blind.out)


def test_killed_in_mid_epoch_and_resumed(tiny):
    """SIGKILL: nothing is said, nothing is saved; the last checkpoint is in the epoch's middle."""
    tiny = replace(
        tiny,
        epochs=15,
        data=replace(tiny.data, workers=1),
        eval=replace(tiny.eval, every=7),
        checkpoint=replace(tiny.checkpoint, every_steps=2),
        slim=replace(tiny.slim, batch_norm="separate", refresh_steps=2, warmup_epochs=1),
    )
    sacl_fast.train(replace(tiny, out=f"{tiny.out}-whole"))
    expected = losses(f"{tiny.out}-whole")

    process = subprocess.Popen(command(tiny), stdout=subprocess.DEVNULL)
    folder = Path(tiny.out)
    deadline = time.monotonic() + 200
    while not any(int(p.stem[5:]) % 3 for p in list_checkpoints(folder / "checkpoints")):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.01)
    process.kill()
    process.wait()
    assert len(losses(folder)) < len(expected)

    result = run(command(tiny, "--resume", "auto"))
    assert result.returncode == 0, result.stderr
    assert losses(folder) == expected


@pytest.fixture(scope="module")
def whole() -> dict[int, float]:
    """The losses of the run that no signal interrupts, trained once."""
    return {}


@pytest.mark.parametrize(
    "number", [signal.SIGINT, signal.SIGTERM, signal.SIGUSR1], ids=lambda s: s.name
)
def test_signals_write_a_checkpoint_and_exit_cleanly(tiny, number, whole):
    """The signal goes to the whole process group, workers included, as a scheduler sends it."""
    tiny = replace(
        tiny, epochs=20, data=replace(tiny.data, workers=2), eval=replace(tiny.eval, every=0)
    )
    folder = Path(tiny.out)
    process = subprocess.Popen(
        command(tiny), text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        start_new_session=True,
    )  # fmt: skip
    deadline = time.monotonic() + 200
    while not (folder / "metrics.jsonl").exists() or not losses(folder):
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.killpg(process.pid, number)
    output, _ = process.communicate(timeout=120)
    ctrl_c = number == signal.SIGINT  # of which it dies, so that a shell's loop ends as well
    assert process.returncode == (-number if ctrl_c else 128 + number), output
    assert "Traceback" not in output and number.name in output and "--resume auto" in output
    done = max(losses(folder))
    (newest,) = list_checkpoints(folder / "checkpoints")[-1:]
    assert load_checkpoint(newest)["step"] == done < 60

    resumed = sacl_fast.train(replace(tiny, resume="auto"))
    assert resumed.finished and resumed.steps == 60
    if not whole:
        whole |= losses(sacl_fast.train(replace(tiny, out=f"{tiny.out}-whole")).folder)
    assert losses(folder) == whole


def in_a_terminal(arguments: list[str]) -> tuple[subprocess.Popen[bytes], int]:
    """A process whose terminal it is, and the other end of that."""
    master, slave = pty.openpty()
    process = subprocess.Popen(
        arguments,
        stdin=slave,
        stdout=slave,
        stderr=slave,
        start_new_session=True,
        preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),
        env=os.environ | {"TERM": "xterm"},
    )
    os.close(slave)
    return process, master


def read_until(master: int, sign: str) -> str:
    said = b""
    deadline = time.monotonic() + 200
    while sign.encode() not in said:
        assert time.monotonic() < deadline, said.decode()
        if select.select([master], [], [], 0.1)[0]:
            try:
                said += os.read(master, 65536)
            except OSError:  # its process has ended
                raise AssertionError(said.decode()) from None
    return said.decode()


def test_a_run_outlives_its_terminal(tiny):
    """Which sends SIGHUP to everything in it, workers included, and can be written no more."""
    tiny = replace(tiny, data=replace(tiny.data, workers=1), eval=replace(tiny.eval, every=0))
    process, master = in_a_terminal(command(tiny))
    read_until(master, "on-diagonal")
    os.close(master)
    assert process.wait(timeout=200) == 0
    assert len(losses(tiny.out)) == 6 and (Path(tiny.out) / "encoder.safetensors").exists()


def test_ctrl_c_in_a_terminal(tiny):
    tiny = replace(tiny, epochs=10_000, eval=replace(tiny.eval, every=0))
    process, master = in_a_terminal(command(tiny))
    read_until(master, "on-diagonal")
    os.write(master, b"\x03")
    said = read_until(master, "goes on from there")
    assert process.wait(timeout=100) == -signal.SIGINT
    assert "again ends at once" in said and "stopped by SIGINT after step" in said
    assert "Traceback" not in said
    os.close(master)


def test_a_stop_at_the_end_of_an_epoch_leaves_its_evaluation_to_the_next_start(tiny):
    with process_group("cpu") as ranks, claimed_run_folder(tiny, ranks) as claim:
        run_ = Run(tiny, ranks, claim)
        evaluate = run_.evaluator.evaluate

        def stopped(method):
            if run_.steps_done == 6:
                run_.stop.ask(signal.SIGTERM)
            return evaluate(method)

        run_.evaluator.evaluate = stopped
        result = run_.train()
        run_.close()
    assert (result.finished, result.steps, result.stopped_by) == (False, 6, signal.SIGTERM)
    assert not (result.folder / "encoder.safetensors").exists()
    resumed = sacl_fast.train(replace(tiny, resume="auto"))
    assert resumed.finished
    rows = read_metrics(result.folder / "metrics.jsonl")
    assert [r["epoch"] for r in rows if r["kind"] == "knn"] == [0, 1, 2]
    whole = sacl_fast.train(replace(tiny, out=f"{tiny.out}-whole"))
    assert resumed.knn == whole.knn and losses(result.folder) == losses(whole.folder)


def test_a_stop_before_the_first_step_has_nothing_to_save(tiny, capsys):
    with process_group("cpu") as ranks, claimed_run_folder(tiny, ranks) as claim:
        run_ = Run(tiny, ranks, claim)
        run_.stop.ask(signal.SIGINT)
        result = run_.train()
        run_.close()
    assert (result.finished, result.steps) == (False, 0)
    assert "stopped by SIGINT before the first step" in capsys.readouterr().out
    assert not list_checkpoints(result.folder / "checkpoints")
    assert sacl_fast.train(replace(tiny, resume="auto")).finished


def test_two_processes_by_torchrun_equal_one(tiny):
    """To fp32's rounding, which later steps amplify: a ReLU's input next to 0 may fall to the other
    side, and does for one number of threads here. test_distributed.py has the exact comparison."""
    tiny = replace(
        tiny,
        epochs=1,
        encoder=replace(tiny.encoder, drop_path=0.0),
        optim=replace(tiny.optim, lr=0.1),
    )
    sacl_fast.train(tiny)
    both = replace(tiny, out=f"{tiny.out}-2")
    torchrun = "-m torch.distributed.run --standalone --nproc-per-node 2 -m sacl_fast".split()
    result = run(command(both, prefix=(sys.executable, *torchrun)))
    assert result.returncode == 0, result.stderr
    assert losses(both.out) == pytest.approx(losses(tiny.out), rel=0.1)
    assert losses(both.out)[1] == pytest.approx(losses(tiny.out)[1], rel=1e-5)
    assert result.stdout.count("kNN accuracy, dense encoder") == 1  # rank 0 alone speaks
    assert "UserWarning" not in result.stderr


def test_masks_follow_the_schedule(tiny):
    tiny = replace(tiny, epochs=3, slim=replace(tiny.slim, warmup_epochs=1))
    tiny = replace(tiny, checkpoint=replace(tiny.checkpoint, keep=3))
    sacl_fast.train(tiny)
    states = [load_checkpoint(p) for p in list_checkpoints(Path(tiny.out) / "checkpoints")]
    assert [s["step"] for s in states] == [3, 6, 9]
    for state in states:  # chosen at the end of the epoch, from the weights as saved
        weight = state["model"]["encoder.layer3.0.conv1.weight"]
        mask = state["model"]["slicer.layer3/0/conv1"]
        norms = weight.abs().flatten(1).sum(1)
        assert mask.sum() == len(mask) // 2
        assert norms[mask].min() >= norms[~mask].max()


def test_only_the_last_and_the_best_checkpoints_are_kept(tiny):
    tiny = replace(tiny, epochs=4, checkpoint=replace(tiny.checkpoint, keep=2))
    sacl_fast.train(tiny)
    folder = Path(tiny.out) / "checkpoints"
    rows = [r for r in read_metrics(Path(tiny.out) / "metrics.jsonl") if r["kind"] == "knn"]
    assert sorted(p.name for p in folder.iterdir()) == [
        "best.pt", "step_00000009.pt", "step_00000012.pt",
    ]  # fmt: skip
    assert load_checkpoint(folder / "best.pt")["best_knn"] == max(r["knn_dense"] for r in rows)


def test_a_loss_that_is_not_finite_stops_the_run(tiny):
    tiny = replace(tiny, optim=replace(tiny.optim, lr=1e30, clip=False, warmup_epochs=0), epochs=3)
    with pytest.raises(NonFiniteLoss, match=r"not finite at step \d+ .*lr"):
        sacl_fast.train(tiny)
    rows = read_metrics(Path(tiny.out) / "metrics.jsonl")
    assert any(r["kind"] == "event" and "not finite" in r["message"] for r in rows)
    for path in list_checkpoints(Path(tiny.out) / "checkpoints"):
        state = load_checkpoint(path)
        assert all(
            torch.isfinite(v).all() for v in state["model"].values() if v.is_floating_point()
        )


def test_weights_that_are_not_finite_are_never_saved(tiny):
    """The loss of the step that broke them was still finite."""
    with process_group("cpu") as ranks, claimed_run_folder(tiny, ranks) as claim:
        run_ = Run(tiny, ranks, claim)
        run_._save()
        with torch.no_grad():
            run_.method.projector.get_parameter("0.weight")[0, 0] = float("inf")
        run_.steps_done = 1
        with pytest.raises(NonFiniteLoss, match=r"at step 2 .*step_00000000\.pt is from before"):
            run_._save()
        run_.console.close()
        run_.close()
    assert [p.name for p in list_checkpoints(Path(tiny.out) / "checkpoints")] == [
        "step_00000000.pt"
    ]


def test_an_encoder_that_does_not_fit_leaves_nothing(tmp_path):
    code = (
        "import resource, sys, torch; from pathlib import Path\n"
        "from sacl_fast.encoders.file import save_encoder\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))\n"
        "save_encoder(Path(sys.argv[1]), {'weight': torch.zeros(10_000)}, {})"
    )
    result = run([sys.executable, "-c", code, str(tmp_path / "encoder.safetensors")])
    assert "UserError: cannot write encoder" in result.stderr
    assert not list(tmp_path.iterdir())


def test_resuming_another_architecture_names_the_differences(tiny):
    sacl_fast.train(replace(tiny, epochs=1))
    other = replace(tiny, resume="auto", encoder=replace(tiny.encoder, width=0.5))
    with pytest.raises(UserError, match=r"encoder.width is 0.5 here and 0.25 there"):
        sacl_fast.train(other)
    with pytest.raises(UserError, match=r"3 steps an epoch there, 6 here"):
        sacl_fast.train(replace(tiny, resume="auto", batch_size=8))


def test_a_damaged_checkpoint_falls_back_to_the_one_before(tiny, caplog):
    sacl_fast.train(replace(tiny, epochs=3))
    whole = losses(tiny.out)
    newest = list_checkpoints(Path(tiny.out) / "checkpoints")[-1]
    newest.write_bytes(newest.read_bytes()[:1000])
    resumed = replace(tiny, epochs=3, resume="auto")
    assert sacl_fast.train(resumed).finished
    assert "damaged" in caplog.text and "trying the one before" in caplog.text
    assert losses(tiny.out) == whole
    with pytest.raises(UserError, match="damaged or not a checkpoint"):
        newest.write_bytes(b"nonsense")
        sacl_fast.train(replace(tiny, out=f"{tiny.out}-3", resume=str(newest)))


def test_resuming_another_runs_checkpoint_starts_from_it(tiny):
    sacl_fast.train(replace(tiny, epochs=1))
    checkpoint = list_checkpoints(Path(tiny.out) / "checkpoints")[-1]
    result = sacl_fast.train(replace(tiny, out=f"{tiny.out}-2", resume=str(checkpoint)))
    assert result.finished and list(losses(result.folder)) == [4, 5, 6]


def test_resumed_between_recorded_slim_passes(tiny, monkeypatch):
    """Which the run that goes on records anew, where the other one had them already."""
    ways, mode = [], Slicer.mode

    def noted(slicer, way):
        ways.append(way)
        return mode(slicer, way)

    monkeypatch.setattr(Slicer, "mode", noted)
    tiny = replace(
        tiny,
        epochs=5,
        encoder=replace(tiny.encoder, name="mobilenetv3_small_050", width=1.0),
        slim=replace(tiny.slim, mode="skip", refresh_steps=1000),
        eval=replace(tiny.eval, every=0),
        checkpoint=replace(tiny.checkpoint, every_steps=8, keep=10),
    )
    whole = sacl_fast.train(tiny)
    assert ways.count("skip") < 0.5 * ways.count("dense")
    (middle,) = (
        path
        for path in list_checkpoints(whole.folder / "checkpoints")
        if path.stem[5:].endswith("8")
    )
    resumed = sacl_fast.train(replace(tiny, out=f"{tiny.out}-2", resume=str(middle)))
    rest = losses(resumed.folder)
    assert list(rest) == list(range(9, 16))
    assert rest.items() <= losses(whole.folder).items()


def test_a_full_disk_loses_nothing(tiny):
    """The file size limit stands for it: metrics fit below, checkpoints do not."""
    code = (
        "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (90_000, 90_000));"
        "from sacl_fast.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    tiny = replace(tiny, projector=replace(tiny.projector, hidden=128))
    result = run(command(tiny, prefix=(sys.executable, "-c", code)))
    assert result.returncode == 2, result.stderr
    assert "cannot write checkpoint" in result.stderr and "Traceback" not in result.stderr
    assert losses(tiny.out).keys() == {1, 2, 3}
    assert not list((Path(tiny.out) / "checkpoints").iterdir())  # no half-written file
