"""Who was started together with whom, as the environment says it."""

from __future__ import annotations

import pytest

from sacl_fast.engine.launch import Launch, read_launch
from sacl_fast.errors import UserError

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
# What SLURM 23 gives the second of three tasks on two nodes.
SRUN = {
    "SLURM_JOB_ID": "4711",
    "SLURM_STEP_ID": "2",
    "SLURM_NTASKS": "3",
    "SLURM_STEP_NUM_TASKS": "3",
    "SLURM_PROCID": "1",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "0",
    "SLURM_STEP_NODELIST": "gpu[07-08]",
    "SLURM_STEP_TASKS_PER_NODE": "2,1",
}


def port(step: int) -> int:
    return 10_000 + (31 * 4711 + step) % 20_000


def test_torchrun():
    assert read_launch(dict(TORCHRUN)) == Launch(3, 4, 1, "10.0.0.1:29500")
    assert read_launch({}) == Launch()
    assert read_launch({"RANK": "0", "WORLD_SIZE": "1", "LOCAL_RANK": "0"}) == Launch()
    assert read_launch({"WORLD_SIZE": "1"}) == Launch()
    assert read_launch({"WORLD_SIZE": "", "RANK": ""}) == Launch()


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ({"WORLD_SIZE": "abc"}, "WORLD_SIZE is 'abc'; a whole number of 1 or more works"),
        ({"WORLD_SIZE": "0"}, "WORLD_SIZE is '0'"),
        ({"WORLD_SIZE": "-2"}, "WORLD_SIZE is '-2'"),
        ({"WORLD_SIZE": "4.0"}, "WORLD_SIZE is '4.0'"),
        ({"WORLD_SIZE": "٤"}, "WORLD_SIZE is '٤'"),
        ({"WORLD_SIZE": None}, "RANK is 3, but WORLD_SIZE is not set"),
        ({"RANK": "4"}, "RANK is 4 and WORLD_SIZE 4; ranks from 0 to 3 work"),
        ({"RANK": "x"}, "RANK is 'x'"),
        ({"RANK": None}, "RANK is not set; a whole number of 0 or more works"),
        ({"LOCAL_RANK": "first"}, "LOCAL_RANK is 'first'"),
        ({"MASTER_ADDR": None}, "MASTER_ADDR is not set, so the processes cannot find one another"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR is not set"),
        ({"MASTER_PORT": None}, "MASTER_PORT is not set; a whole number from 1 to 65535 works"),
        ({"MASTER_PORT": "70000"}, "MASTER_PORT is '70000'"),
        ({"WORLD_SIZE": "1", "RANK": "1"}, "RANK is 1 and WORLD_SIZE 1"),
    ],
)
def test_variables_that_do_not_fit(change, sentence):
    environ = {k: v for k, v in {**TORCHRUN, **change}.items() if v is not None}
    with pytest.raises(UserError) as raised:
        read_launch(environ)
    assert sentence in str(raised.value)


def test_srun():
    environ = dict(SRUN)
    assert read_launch(environ) == Launch(1, 3, 1, f"gpu07:{port(2)}")
    assert environ["RANK"] == "1" and environ["LOCAL_WORLD_SIZE"] == "2"  # for all who read them
    assert read_launch(environ).world_size == 3  # and again
    last = SRUN | {"SLURM_PROCID": "2", "SLURM_LOCALID": "0", "SLURM_NODEID": "1"}
    assert read_launch(last) == Launch(2, 3, 0, f"gpu07:{port(2)}")
    assert last["LOCAL_WORLD_SIZE"] == "1"


def test_a_step_whose_tasks_have_cores_of_their_own_does_not_share_them_out():
    environ = SRUN | {"SLURM_CPU_BIND_TYPE": "mask_cpu:"}
    read_launch(environ)
    assert "LOCAL_WORLD_SIZE" not in environ


@pytest.mark.parametrize(
    ("hosts", "first"),
    [
        ("localhost", "localhost"),
        ("a1,a2", "a1"),
        ("gpu[03-07,11],big1", "gpu03"),
        ("gpu[003,005]", "gpu003"),
        ("rack[2-3]node[10-11],x", "rack2node10"),
        ("n[1-2]-ib,m", "n1-ib"),
        ("login-1.example.org,n[1-2]", "login-1.example.org"),
    ],
)
def test_the_first_host(hosts, first):
    assert read_launch(SRUN | {"SLURM_STEP_NODELIST": hosts}).address == f"{first}:{port(2)}"


def test_what_is_given_beats_what_slurm_says():
    given = {"MASTER_ADDR": "here", "MASTER_PORT": "1234"}
    assert read_launch(SRUN | given).address == "here:1234"
    assert read_launch(SRUN | TORCHRUN) == Launch(3, 4, 1, "10.0.0.1:29500")  # srun torchrun
    assert read_launch(SRUN | {"WORLD_SIZE": "1"}) == Launch()  # a sweep: each alone


@pytest.mark.parametrize(
    "environ",
    [
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2"},  # a shell of salloc
        {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "2", "SLURM_PROCID": "0"},  # a batch script
        {**SRUN, "SLURM_STEP_NUM_TASKS": "1"},  # srun --ntasks 1 within a larger job
        {**SRUN, "SLURM_PTY_PORT": "41000"},  # srun --pty bash
    ],
)
def test_one_process_within_a_larger_slurm_job_trains_alone(environ):
    assert read_launch(environ) == Launch()


@pytest.mark.parametrize(
    ("environ", "sentence"),
    [
        ({"OMPI_COMM_WORLD_SIZE": "4"}, "an MPI launcher has started 4 processes"),
        ({"PMI_SIZE": "2"}, "an MPI launcher has started 2 processes"),
        ({**SRUN, "OMPI_COMM_WORLD_SIZE": "4"}, "an MPI launcher has started 4 processes"),
        ({**SRUN, "SLURM_STEP_NODELIST": ""}, "SLURM_STEP_NODELIST does not say where"),
        ({**SRUN, "SLURM_PROCID": "x"}, "RANK is 'x'"),
        ({**SRUN, "SLURM_NODEID": "x"}, "SLURM_NODEID is 'x'"),
    ],
)
def test_launchers_that_cannot_be_followed(environ, sentence):
    with pytest.raises(UserError) as raised:
        read_launch(environ)
    assert sentence in str(raised.value)
    assert read_launch({"OMPI_COMM_WORLD_SIZE": "4", "WORLD_SIZE": "1"}) == Launch()
