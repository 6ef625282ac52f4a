"""W gloo ranks of n samples against one process of W * n: loss, gradients, running statistics."""

import os
import socket
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from sacl_fast.config.choices import NormGradient, SlimBatchNorm
from sacl_fast.encoders import Projector, build_encoder, output_dim
from sacl_fast.encoders.batch_norm import (
    GlobalBatchNorm,
    local_batch_norm,
    synchronize_batch_norm,
)
from sacl_fast.engine.method import SaclXd
from sacl_fast.losses import SaclXdLoss
from sacl_fast.passes import Passes
from sacl_fast.slim import Slicer

SIZE = 16


def build(
    name: str,
    batch_norm: SlimBatchNorm,
    gather: bool = False,
    passes: Passes = Passes(),  # noqa: B008 - frozen
    norm_gradient: NormGradient = "exact",
) -> SaclXd:
    """The same float64 model in every process; synchronised where there are several."""
    torch.manual_seed(0)
    encoder: nn.Module = build_encoder(name, image_size=SIZE)
    projector: nn.Module = Projector(output_dim(encoder, SIZE), hidden=24, out=40)
    for module in (encoder, projector):
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(norm.weight, 1.0, 0.2)
                nn.init.normal_(norm.bias, 0.0, 0.2)
    if dist.is_initialized():
        encoder, projector = map(synchronize_batch_norm, (encoder, projector))
    slicer = Slicer(encoder, 0.4, batch_norm=batch_norm, norm_gradient=norm_gradient)
    return SaclXd(encoder, projector, slicer, passes=passes, gather=gather).double().train()


def views(n: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    a, b = (
        torch.randn(n, 3, SIZE, SIZE, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    return a, b


def one_step(model: nn.Module, a: torch.Tensor, b: torch.Tensor, **loss) -> dict[str, Any]:
    value, parts = SaclXdLoss(**loss)(*model(a, b))
    value.backward()
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    return {
        "loss": value.detach(),
        **{f"part.{k}": v for k, v in parts._asdict().items()},
        **{f"grad.{k}": p.grad for k, p in inner.named_parameters()},
        **{f"buffer.{k}": v for k, v in inner.named_buffers()},
    }


def run_rank(rank, world_size, port, n, loss, folder, *model):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    ddp = DistributedDataParallel(build(*model), broadcast_buffers=False)
    mine = slice(rank * n, (rank + 1) * n)
    a, b = views(world_size * n)
    torch.save(one_step(ddp, a[mine], b[mine], **loss), f"{folder}/{rank}.pt")
    dist.destroy_process_group()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


@pytest.mark.parametrize(
    ("world_size", "n", "name", "batch_norm", "gather", "slim_mode", "loss"),
    [
        (2, 8, "resnet20", "shared", True, "mask", {}),
        (
            2,
            5,
            "resnet20",
            "separate",
            True,
            "mask",
            {"pairing": "cross_width", "variance": "unbiased"},
        ),
        (3, 3, "mobilenetv3_small_050", "shared", False, "mask", {"distillation": "log"}),
        (3, 14, "resnet20", "shared", True, "mask", {}),  # N > D = 40
        (2, 30, "resnet20", "shared", False, "mask", {"off_diagonal": "literal"}),
        (2, 4, "mobilenetv3_small_050", "shared", False, "skip", {}),
        (2, 4, "resnet20", "separate", True, "skip", {}),
    ],
)
def test_ranks_equal_one_process(
    tmp_path, world_size, n, name, batch_norm, gather, slim_mode, loss
):
    model = (name, batch_norm, gather, Passes(slim_mode))
    mp.spawn(run_rank, (world_size, free_port(), n, loss, str(tmp_path), *model), nprocs=world_size)
    expected = one_step(build(name, batch_norm), *views(world_size * n), **loss)
    assert_equal_to(expected, tmp_path, world_size)


@pytest.mark.parametrize("slim_mode", ["mask", "skip"])
@pytest.mark.parametrize("n", [1, 3])
def test_damped_gradients_are_by_the_variance_over_all_ranks(tmp_path, slim_mode, n):
    model = ("mobilenetv3_small_050", "shared", False, Passes(slim_mode), "damped")
    mp.spawn(run_rank, (2, free_port(), n, {}, str(tmp_path), *model), nprocs=2)
    alone, exact = (
        one_step(build("mobilenetv3_small_050", "shared", norm_gradient=g), *views(2 * n))
        for g in ("damped", "exact")
    )
    assert_equal_to(alone, tmp_path, 2)
    assert any(not torch.allclose(alone[k], exact[k]) for k in alone if k.startswith("grad."))


def assert_equal_to(expected: dict[str, torch.Tensor], folder: Path, world_size: int) -> None:
    """What each rank has saved in ``folder``."""
    largest = max(v.abs().max() for k, v in expected.items() if k.startswith("grad."))
    for rank in range(world_size):
        got = torch.load(folder / f"{rank}.pt")
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            scale = (
                largest if key.startswith("grad.") else value.double().abs().max().clamp(min=1e-3)
            )
            error = (got[key].double() - value.double()).abs().max() / scale
            assert error < 1e-6, f"{key} on rank {rank}: {error:.1e}"


def run_recorded(rank, world_size, port, synchronized):
    """Five steps of the method with its slim passes recorded, beside those of one without."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    torch.set_num_threads(1)

    def built() -> list[SaclXd]:
        kinds = [Passes("skip", recorded=recorded) for recorded in (True, False)]
        return [build("resnet20", "shared", passes=passes) for passes in kinds]

    # Unsynchronised batch norms are made before there are ranks to synchronise with.
    methods = [] if synchronized else built()
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    methods = methods or built()
    ways, skips = [], methods[0].slicer.mode
    methods[0].slicer.mode = lambda way: ways.append(way) or skips(way)  # type: ignore
    models = [DistributedDataParallel(m, broadcast_buffers=False) for m in methods]
    for step in range(5):
        a, b = (v + rank + step for v in views(4))
        ways.clear()
        for model in models:
            model.zero_grad()
            one_step(model, a, b)
        for part in ("parameters", "buffers"):
            pairs = zip(*(getattr(m, f"named_{part}")() for m in methods), strict=True)
            for (name, ours), (_, theirs) in pairs:
                if part == "parameters":
                    ours, theirs = ours.grad, theirs.grad
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)
    assert ("skip" in ways) == synchronized, ways  # whose batch norms communicate
    dist.destroy_process_group()


@pytest.mark.parametrize("synchronized", [False, True])
def test_recorded_passes_among_ranks(synchronized):
    mp.spawn(run_recorded, (2, free_port(), synchronized), nprocs=2)


def run_local(rank, world_size, port, folder):
    """Statistics of each rank's own: batch norm that is told not to communicate."""
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=world_size)
    norm = synchronize_batch_norm(nn.BatchNorm2d(3, momentum=None))
    assert isinstance(norm, GlobalBatchNorm)
    if rank == 0:  # the others do not take part: this would hang if it communicated
        with local_batch_norm(norm):
            norm(torch.arange(24.0).view(2, 3, 2, 2))
        torch.save(norm.running_mean, f"{folder}/mean.pt")
    dist.destroy_process_group()


def test_one_rank_alone_may_run_the_network(tmp_path):
    mp.spawn(run_local, (2, free_port(), str(tmp_path)), nprocs=2)
    x = torch.arange(24.0).view(2, 3, 2, 2)
    torch.testing.assert_close(torch.load(tmp_path / "mean.pt"), x.mean((0, 2, 3)))
