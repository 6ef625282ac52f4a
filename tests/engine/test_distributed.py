"""W gloo ranks of n samples against one process of W * n, in float64: loss, gradients, running
statistics, and weights after some steps."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
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
from sacl_fast.optim import Lars
from sacl_fast.passes import Passes
from sacl_fast.slim import Slicer
from tests.engine.ranks import in_ranks

SIZE, STEPS = 16, 3
SKIP, RECORDED = Passes("skip"), Passes("skip", recorded=True)
ALL_RECORDED = Passes("skip", dense="recorded", recorded=True)


class Case(NamedTuple):
    world_size: int
    n: int
    name: str
    batch_norm: SlimBatchNorm = "shared"
    gather: bool = True
    passes: Passes = Passes()
    loss: dict[str, Any] = {}  # noqa: RUF012 - only read
    norm_gradient: NormGradient = "exact"


V3 = "mobilenetv3_small_050"
OTHER_LOSS = {"pairing": "cross_width", "variance": "unbiased"}
CASES = [
    Case(2, 8, "resnet20"),
    Case(2, 5, "resnet20", "separate", loss=OTHER_LOSS),
    Case(2, 30, "resnet20", gather=False, loss={"off_diagonal": "literal"}),
    Case(2, 4, V3, gather=False, passes=SKIP),
    Case(2, 4, "resnet20", "separate", passes=ALL_RECORDED),
    Case(2, 1, V3, norm_gradient="damped"),
    Case(2, 3, V3, norm_gradient="damped"),
    Case(2, 1, V3, norm_gradient="damped", passes=SKIP),
    Case(2, 3, V3, norm_gradient="damped", passes=RECORDED),
    Case(3, 3, V3, gather=False, loss={"distillation": "log"}),
    Case(3, 14, "resnet20"),  # N > D = 40
    Case(2, 4, V3, passes=ALL_RECORDED),
    Case(3, 3, V3, passes=ALL_RECORDED),
]


def build(case: Case) -> SaclXd:
    """The same float64 model in every process; synchronised where there are several."""
    torch.manual_seed(0)
    encoder: nn.Module = build_encoder(case.name, image_size=SIZE)
    projector: nn.Module = Projector(output_dim(encoder, SIZE), hidden=24, out=40)
    for module in (encoder, projector):
        for norm in module.modules():
            if isinstance(norm, nn.modules.batchnorm._BatchNorm):
                nn.init.normal_(norm.weight, 1.0, 0.2)
                nn.init.normal_(norm.bias, 0.0, 0.2)
    if dist.is_initialized():
        encoder, projector = map(synchronize_batch_norm, (encoder, projector))
    slicer = Slicer(encoder, 0.4, batch_norm=case.batch_norm, norm_gradient=case.norm_gradient)
    gather = case.gather and dist.is_initialized()
    return SaclXd(encoder, projector, slicer, passes=case.passes, gather=gather).double().train()


def views(n: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(step)
    a, b = (
        torch.randn(n, 3, SIZE, SIZE, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    return a, b


def train(case: Case) -> dict[str, torch.Tensor]:
    """Some steps on this process's share: what the first gives, and what all leave."""
    method = build(case)
    model: nn.Module = method
    n, mine = case.world_size * case.n, slice(None)
    if dist.is_initialized():
        model = DistributedDataParallel(method, broadcast_buffers=False)
        mine = slice(dist.get_rank() * case.n, (dist.get_rank() + 1) * case.n)
    # Larger steps of MobileNet-V3 amplify the last digit: its gradients here are up to 1e4.
    rate = 0.2 if case.name == "resnet20" else 1e-4
    optimizer = Lars(method.parameters(), lr=rate, momentum=0.9, weight_decay=1e-4)
    found: dict[str, torch.Tensor] = {}
    for step in range(STEPS if case.n > 1 else 1):  # batch norms of two values are all but signs
        loss, parts = SaclXdLoss(**case.loss)(*model(*(v[mine] for v in views(n, step))))
        optimizer.zero_grad()
        loss.backward()
        if step == 0:
            found |= {"loss": loss.detach(), **{f"part.{k}": v for k, v in parts._asdict().items()}}
            found |= {f"grad.{k}": p.grad.clone() for k, p in method.named_parameters()}
            found |= {f"buffer.{k}": v.clone() for k, v in method.named_buffers()}
        optimizer.step()
    found |= {f"weight.{k}": p.detach() for k, p in method.named_parameters()}
    return found | {f"last buffer.{k}": v for k, v in method.named_buffers()}


def run_cases(world_size: int, folder: str) -> None:
    for i, case in enumerate(CASES):
        if case.world_size == world_size:
            torch.save(train(case), f"{folder}/{i} {dist.get_rank()}.pt")


@pytest.fixture(scope="module")
def results(tmp_path_factory) -> dict[int, Path]:
    """By the number of ranks: the folder of what all cases gave."""
    folders = {n: tmp_path_factory.mktemp(f"ranks{n}") for n in (2, 3)}
    for world_size, folder in folders.items():
        in_ranks(world_size, run_cases, world_size, str(folder))
    return folders


@pytest.mark.parametrize("i", range(len(CASES)))
def test_ranks_equal_one_process(results, i):
    case = CASES[i]
    expected = train(case._replace(passes=case.passes and Passes(case.passes.mode)))
    largest = max(v.abs().max() for k, v in expected.items() if k.startswith("grad."))
    for rank in range(case.world_size):
        got = torch.load(results[case.world_size] / f"{i} {rank}.pt")
        assert got.keys() == expected.keys()
        for key, value in expected.items():
            value = value.double()
            scale = largest if key.startswith("grad.") else value.abs().max().clamp(min=1e-3)
            error = (got[key].double() - value).abs().max() / scale
            assert error < 1e-6, f"{key} on rank {rank} of {case}: {error:.1e}"


def test_the_damped_case_is_one():
    damped, exact = (
        train(Case(1, 6, V3, norm_gradient=norm_gradient)) for norm_gradient in ("damped", "exact")
    )
    assert any(not torch.allclose(damped[k], exact[k]) for k in damped if k.startswith("grad."))


def compare_recorded(synchronized: bool) -> None:
    """Five steps of the method with its slim passes recorded, beside those of one without."""
    built = [build(Case(2, 4, "resnet20", passes=passes)) for passes in (RECORDED, SKIP)]
    if not synchronized:
        for norm in (m for method in built for m in method.modules()):
            if isinstance(norm, GlobalBatchNorm):
                norm.synchronize = False
    ways, skips = [], built[0].slicer.mode
    built[0].slicer.mode = lambda way: ways.append(way) or skips(way)  # type: ignore
    models = [DistributedDataParallel(m, broadcast_buffers=False) for m in built]
    for step in range(5):
        a, b = (v + dist.get_rank() for v in views(4, step))
        ways.clear()
        for model in models:
            model.zero_grad()
            loss, _ = SaclXdLoss()(*model(a, b))
            loss.backward()
        for part in ("parameters", "buffers"):
            pairs = zip(*(getattr(m, f"named_{part}")() for m in built), strict=True)
            for (name, ours), (_, theirs) in pairs:
                if part == "parameters":
                    ours, theirs = ours.grad, theirs.grad
                torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9, msg=name)
    assert "skip" not in ways, ways  # the recording has run


def run_alone(folder: str) -> None:
    """Statistics of each rank's own: batch norm that is told not to communicate."""
    norm = synchronize_batch_norm(nn.BatchNorm2d(3, momentum=None))
    assert isinstance(norm, GlobalBatchNorm)
    if dist.get_rank() == 0:  # the others do not take part: this would hang if it communicated
        with local_batch_norm(norm):
            norm(torch.arange(24.0).view(2, 3, 2, 2))
        torch.save(norm.running_mean, f"{folder}/mean.pt")


def run_others(folder: str) -> None:
    compare_recorded(True)
    compare_recorded(False)
    run_alone(folder)


def test_recorded_passes_among_ranks_and_one_rank_alone(tmp_path):
    in_ranks(2, run_others, str(tmp_path))
    x = torch.arange(24.0).view(2, 3, 2, 2)
    torch.testing.assert_close(torch.load(tmp_path / "mean.pt"), x.mean((0, 2, 3)))
