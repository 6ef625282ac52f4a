"""``examples/slurm.sh``, with commands of SLURM's names that start two processes here."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from sacl_fast.config import Config, to_dict
from sacl_fast.engine.metrics import read_metrics
from tests.engine.ranks import free_port

SCRIPT = Path(__file__).resolve().parent.parent / "examples" / "slurm.sh"

SRUN = """#!/bin/bash
# Two tasks on this machine, with the variables that SLURM 23 sets.
while [[ "$1" == --* ]]; do shift; done
export SLURM_STEP_ID=0 SLURM_STEP_NUM_TASKS=2 SLURM_STEP_NODELIST=localhost SLURM_NODEID=0
export SLURM_STEP_TASKS_PER_NODE=2
SLURM_PROCID=0 SLURM_LOCALID=0 "$@" & first=$!
SLURM_PROCID=1 SLURM_LOCALID=1 "$@" & second=$!
wait $first; one=$?
wait $second; two=$?
exit $((one > two ? one : two))
"""


@pytest.fixture
def start(tmp_path: Path):
    commands = tmp_path / "bin"
    commands.mkdir()

    def run(*arguments: str, **given: str) -> subprocess.CompletedProcess[str]:
        scripts = {
            "srun": SRUN,
            "scontrol": f'#!/bin/bash\necho "$@" > {tmp_path}/scontrol\n',
            "sacl-fast": f'#!/bin/bash\nexec {sys.executable} -m sacl_fast "$@"\n',
        }
        for name, text in (scripts | given).items():
            (commands / name).write_text(text)
            (commands / name).chmod(0o755)
        environ = {
            "PATH": f"{commands}:{os.environ['PATH']}",
            "PYTHONPATH": os.pathsep.join(sys.path),
            "SLURM_JOB_ID": "4711",
            "MASTER_PORT": str(free_port()),
            "OMP_NUM_THREADS": "1",
        }
        command = ["bash", str(SCRIPT), *arguments]
        return subprocess.run(
            command, capture_output=True, text=True, timeout=300, cwd=tmp_path,
            env=os.environ | environ,
        )  # fmt: skip

    return run


def test_two_tasks_are_one_run(tiny: Config, tmp_path: Path, start):
    subprocess.run(["bash", "-n", str(SCRIPT)], check=True)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(to_dict(tiny)))
    done = start("demo", "--config", str(file), "--epochs", "1")
    assert done.returncode == 0, done.stderr
    folder = tmp_path / "runs/slurm-4711"
    rows = [row for row in read_metrics(folder / "metrics.jsonl") if row["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3]
    assert "float32 on CPU x 2 processes" in done.stdout
    assert not (tmp_path / "scontrol").exists()


@pytest.mark.parametrize(("status", "requeued"), [(138, True), (2, False), (143, False)])
def test_a_job_out_of_time_is_queued_again(tmp_path: Path, start, status, requeued):
    done = start("demo", srun=f"#!/bin/bash\nexit {status}\n")
    assert done.returncode == status
    assert (tmp_path / "scontrol").exists() == requeued
