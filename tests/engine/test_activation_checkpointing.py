"""Steps with activation checkpointing are those without, in every plan that can have it."""

from __future__ import annotations

import os
import socket
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor

from sacl_fast.config import Config, EncoderConfig, EngineConfig, ProjectorConfig, SlimConfig
from sacl_fast.data.views.tables import CIFAR
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.method import build_method
from sacl_fast.engine.step import TrainingStep
from sacl_fast.errors import UserError
from sacl_fast.passes import RecordedEncoder, passes_of, plan_obstacle

CPU = torch.device("cpu")
ALONE = Ranks(0, 1, CPU)
CONFIG = Config(
    batch_size=8,
    views=CIFAR,
    encoder=EncoderConfig(name="mobilenetv3_small_100", width=0.5),
    projector=ProjectorConfig(hidden=16, out=24),
    device="cpu",
)


def trained(
    config: Config, ranks: Ranks = ALONE, *, steps: int = 4
) -> tuple[dict[str, Tensor], TrainingStep]:
    """The losses of some steps, and the model after them."""
    torch.manual_seed(0)
    plan = "eager" if config.engine.plan == "auto" else config.engine.plan
    method = build_method(config, passes_of(plan, config, CPU, steps_per_epoch=100))
    step = TrainingStep(method, config, ranks, steps_per_epoch=100)
    generator = torch.Generator().manual_seed(1)
    losses = []
    for i in range(steps):
        views = torch.randn(2, 8, 3, 32, 32, generator=generator)
        share = slice(8 // ranks.world_size * ranks.rank, 8 // ranks.world_size * (ranks.rank + 1))
        a, b = (v[share].contiguous(memory_format=torch.channels_last) for v in views)
        losses.append(step(a, b, i + 1).loss)
    state = {name: value for name, value in method.state_dict().items() if torch.is_tensor(value)}
    return {"loss": torch.stack(losses), **state}, step


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert all(torch.equal(found[name], value) for name, value in expected.items())


@pytest.mark.parametrize(
    ("plan", "mode", "accumulate"),
    [("eager", "mask", 2), ("eager", "skip", 1), ("dense+mask", "mask", 1)],
)
def test_the_same_steps(plan, mode, accumulate):
    engine = EngineConfig(plan=plan, accumulate=accumulate)
    config = replace(CONFIG, engine=engine, slim=SlimConfig(mode=mode))
    own = replace(config, engine=replace(engine, activation_checkpointing=True))
    found, step = trained(own)
    assert step.method.slicer.checkpointing
    assert_same(found, trained(config)[0])


def test_a_recording_computes_again_too(caplog):
    """But for what draws random numbers in backward, which is not recorded, and that is said."""
    engine = EngineConfig(plan="dense+skip", activation_checkpointing=True)
    config = replace(CONFIG, engine=engine)
    step = trained(config)[1]
    encoders = step.method.dense_encoder, step.method.slim_encoder
    for encoder in encoders:
        assert isinstance(encoder, RecordedEncoder)
        assert all(kind.confirmed for kind in encoder._kinds.values())
    kept = 0

    def note(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += 0 if tensor.requires_grad else tensor.nbytes
        return tensor

    a = torch.randn(8, 3, 32, 32).contiguous(memory_format=torch.channels_last)
    sizes = []
    for each in (step, trained(replace(config, engine=EngineConfig(plan="dense+skip")))[1]):
        kept = 0
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            each.method.dense_encoder(a)
        sizes.append(kept)
    assert sizes[0] < sizes[1] / 2
    with caplog.at_level("INFO", "sacl_fast"):
        drop = replace(config.encoder, name="resnet20", drop_path=0.2)
        trained(replace(config, encoder=drop), steps=2)
    assert "draws random numbers in backward" in caplog.text


@pytest.mark.parametrize("plan", ["compile", "fused"])
def test_plans_that_cannot(plan):
    config = replace(CONFIG, engine=EngineConfig(plan=plan, activation_checkpointing=True))
    assert plan_obstacle(plan, config, CPU)
    with pytest.raises(UserError, match="eager, dense\\+mask, dense\\+skip"):
        passes_of(plan, config, CPU, steps_per_epoch=100)


def run_rank(rank: int, port: int, folder: str) -> None:
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=2)
    for checkpointing in (False, True):
        engine = EngineConfig(activation_checkpointing=checkpointing)
        config = replace(CONFIG, engine=engine, slim=SlimConfig(mode="skip"))
        state, _ = trained(config, Ranks(rank, 2, CPU), steps=2)
        torch.save(state, f"{folder}/{rank}_{checkpointing}.pt")
    dist.destroy_process_group()


def test_norms_over_ranks_are_computed_again_together(tmp_path: Path):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(run_rank, (port, str(tmp_path)), nprocs=2)
    for rank in range(2):
        expected, found = (torch.load(tmp_path / f"{rank}_{on}.pt") for on in (False, True))
        assert_same(found, expected)
