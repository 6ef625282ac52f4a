"""A batch computed in parts: the mean of the parts' gradients, one update."""

from __future__ import annotations

import copy
import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

import sacl_fast
from sacl_fast.config import Config, EncoderConfig, EngineConfig, ProjectorConfig, SlimConfig
from sacl_fast.data.views.tables import CIFAR
from sacl_fast.engine.description import describe
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.metrics import read_metrics
from sacl_fast.engine.preflight import check_run
from sacl_fast.engine.step import TrainingStep
from sacl_fast.errors import UserError
from sacl_fast.passes import RecordedEncoder, passes_of

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
CONFIG = Config(
    batch_size=12,
    views=CIFAR,
    encoder=EncoderConfig(name="resnet20", width=0.25),
    projector=ProjectorConfig(hidden=16, out=24),
    slim=SlimConfig(mode="mask"),
    engine=EngineConfig(accumulate=3),
    device="cpu",
)


def step_of(config: Config, ranks: Ranks = ALONE, *, exact: bool = True) -> TrainingStep:
    torch.manual_seed(0)
    passes = passes_of(
        "eager" if config.engine.plan == "auto" else config.engine.plan,
        config,
        CPU,
        steps_per_epoch=100,
    )
    method = build_method(config, passes)
    return TrainingStep(method.double() if exact else method, config, ranks, steps_per_epoch=100)


def views(n: int = 12, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = torch.randn(2, n, 3, 32, 32, generator=generator, dtype=dtype)
    last = torch.channels_last
    return a.contiguous(memory_format=last), b.contiguous(memory_format=last)


def test_gradients_are_the_mean_of_those_of_the_parts():
    step, plain = step_of(CONFIG), step_of(replace(CONFIG, engine=EngineConfig()))
    a, b = views()
    expected: dict[str, Tensor] = {}
    losses, z1 = [], torch.empty(0)
    for part_a, part_b in zip(a.chunk(3), b.chunk(3), strict=True):
        loss, _, z1 = plain.gradients(part_a, part_b)
        losses.append(loss)
        for name, p in plain.method.named_parameters():
            expected[name] = expected.get(name, 0) + p.grad / 3
    reading = step(a, b, 7)
    torch.testing.assert_close(reading.loss, torch.stack(losses).mean())
    torch.testing.assert_close(sum(reading.parts), reading.loss)
    torch.testing.assert_close(reading.z1, z1)
    for name, p in step.method.named_parameters():
        torch.testing.assert_close(p.grad, expected[name], msg=name)
    for (name, own), other in zip(step.method.named_buffers(), plain.method.buffers(), strict=True):
        torch.testing.assert_close(own, other, msg=name)  # updated by each part


@pytest.mark.parametrize("plan", ["eager", "dense+skip", "fused"])
def test_recorded_passes_know_every_part(plan):
    """All parts are of one kind, so that two recordings serve any number of them."""
    config = replace(CONFIG, slim=SlimConfig(), engine=EngineConfig(plan=plan, accumulate=6))
    if plan == "eager":
        config = replace(config, slim=SlimConfig(mode="skip"))
    try:
        step = step_of(config, exact=False)
    except UserError as error:
        pytest.skip(str(error))
    plain = step_of(replace(CONFIG, engine=EngineConfig(accumulate=6)), exact=False)
    a, b = views(48, torch.float32)
    for i in range(3):
        loss, *_ = step(a, b, i)
        torch.testing.assert_close(loss, plain(a, b, i)[0], rtol=1e-2, atol=1e-2)
    encoder = step.method.slim_encoder
    assert isinstance(encoder, RecordedEncoder)
    assert [kind.confirmed is not None for kind in encoder._kinds.values()] == [True, True]


def test_the_loss_is_scaled_in_each_part_and_its_gradient_once():
    step, plain = step_of(CONFIG), step_of(CONFIG)
    step.scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
    for i in range(2):
        torch.testing.assert_close(step(*views(), i + 1), plain(*views(), i + 1))
    torch.testing.assert_close(
        list(step.method.parameters()), list(plain.method.parameters()), rtol=1e-9, atol=1e-12
    )


def test_parts_are_not_copied():
    (a, _), seen = views(), []
    step = step_of(CONFIG)
    step.method.encoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    step(a, a, 0)
    assert {x.data_ptr() for x in seen} == {part.data_ptr() for part in a.chunk(3)}
    assert all(x.is_contiguous(memory_format=torch.channels_last) for x in seen)


@pytest.mark.parametrize(
    ("batch", "parts", "processes", "works"),
    [(16, 3, 1, 2), (16, 16, 1, 8), (24, 4, 4, 3), (2, 2, 1, 1), (7, 7, 1, 1)],
)
def test_what_does_not_fall_into_parts(monkeypatch, batch, parts, processes, works):
    with pytest.raises(UserError, match=f"engine.accumulate {works} works"):
        config = Config(batch_size=batch, engine=EngineConfig(accumulate=parts))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        monkeypatch.setenv("RANK", "0")
        monkeypatch.setenv("LOCAL_RANK", "0")
        monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
        monkeypatch.setenv("MASTER_PORT", "1")
        check_run(config)


def test_a_run_in_parts(tiny):
    """Steps, schedule and metrics are counted in updates."""
    config = replace(tiny, engine=EngineConfig(accumulate=2), eval=replace(tiny.eval, every=0))
    result = sacl_fast.train(config)
    rows = [r for r in read_metrics(result.folder / "metrics.jsonl") if r["kind"] == "train"]
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert any(
        "mean of 2 parts of 8" in line
        for line in describe(config, Ranks(0, 1, CPU), step_of(config, exact=False), 3)
    )


def run_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    a, b = views()
    step = step_of(CONFIG, Ranks(rank, 2, CPU))
    # A part of the union is the same part of both ranks.
    share_a, share_b = (torch.cat([p.chunk(2)[rank] for p in view.chunk(3)]) for view in (a, b))
    loss, *_ = step(share_a, share_b, 0)
    state = {"loss": loss, **{n: p.detach() for n, p in step.method.named_parameters()}}
    torch.save(state | dict(step.method.named_buffers()), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def test_two_ranks_equal_one(tmp_path: Path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run_rank, (port, str(tmp_path)), nprocs=2)
    step = step_of(CONFIG)
    loss, *_ = step(*views(), 0)
    expected = copy.deepcopy(dict(step.method.named_parameters()))
    for rank in range(2):
        found = torch.load(tmp_path / f"{rank}.pt")
        torch.testing.assert_close(found["loss"], loss)
        for name, p in expected.items():
            torch.testing.assert_close(found[name], p.detach(), msg=name)
        for name, buffer in step.method.named_buffers():
            torch.testing.assert_close(found[name], buffer, msg=name)
