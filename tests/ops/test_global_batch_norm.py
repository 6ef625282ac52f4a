"""Batch norm over several ranks against ``F.batch_norm`` of all their samples at once."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from sacl_fast.ops import global_batch_norm as module
from sacl_fast.ops.batch_norm import damped, put_back
from sacl_fast.ops.global_batch_norm import global_batch_norm
from tests.engine.ranks import free_port, in_ranks

LAST = torch.channels_last
EPS = 1e-5


class Case(NamedTuple):
    """Of one rank, with as many samples as the others."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float64
    memory_format: torch.memory_format = torch.contiguous_format
    affine: bool = True
    half_weights: bool = False
    mean: float = 0.0
    slice: int = 1
    """Of an input that is every so many-th row of another."""
    damped: bool = False


CASES = [
    Case((4, 3, 5, 2)),
    Case((4, 3, 5, 2), memory_format=LAST),
    Case((4, 3, 5, 2), slice=2, memory_format=LAST),
    Case((1, 7)),
    Case((5, 1)),
    Case((2, 2, 3)),
    Case((2, 3, 2, 2, 3)),
    Case((3, 4, 1, 1), memory_format=LAST),
    Case((3, 4, 2, 2), affine=False),
    Case((4, 5, 3, 3), damped=True),
    Case((4, 5, 3, 3), damped=True, affine=False, memory_format=LAST),
    Case((4, 5, 3, 3), torch.float32, damped=True, mean=1000.0, memory_format=LAST),
    Case((6, 4, 5, 5), torch.float32, mean=1000.0, memory_format=LAST),
    Case((6, 4, 5, 5), torch.bfloat16, memory_format=LAST),
    Case((6, 4, 5, 5), torch.float16),
    Case((6, 4, 5, 5), torch.bfloat16, half_weights=True),
]
# Relative to the largest value; of results in half precision, their rounding.
TOLERANCE = {
    torch.float64: 1e-9,
    torch.float32: 2e-4,  # beside a mean of 1000
    torch.bfloat16: 1e-2,
    torch.float16: 2e-3,
}


def inputs(case: Case, ranks: int) -> dict[str, Any]:
    """Those of all ranks, and what is given to the norm, in the case's type."""
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int) -> Tensor:
        return torch.randn(shape, dtype=torch.float64, generator=generator)

    n, c, *rest = case.shape
    x, dy = draw(ranks * n * case.slice, c, *rest), draw(ranks * n, c, *rest)
    x += case.mean + torch.arange(len(x)).view(-1, *[1] * (x.ndim - 1)) / len(x)
    if case.damped:
        x[:, 0] = 0.1
        x[:, 1:2] *= 1e-3  # of a variance below eps
    x = x.to(case.dtype)
    if len(case.shape) == 4:
        x = x.contiguous(memory_format=case.memory_format)
    kind = torch.float32 if case.dtype != torch.float64 else torch.float64
    kind = case.dtype if case.half_weights else kind
    weight, bias = (draw(c).to(kind) if case.affine else None for _ in range(2))
    return {"x": x[:: case.slice], "dy": dy.to(case.dtype), "weight": weight, "bias": bias}


def outcome(norm: Any, given: dict[str, Any], kind: torch.dtype) -> dict[str, Tensor]:
    x = given["x"].detach().requires_grad_()
    c = x.shape[1]
    mean, var = torch.zeros(c, dtype=kind), torch.ones(c, dtype=kind)
    affine = [None if v is None else v.clone().requires_grad_() for v in
              (given["weight"], given["bias"])]  # fmt: skip
    y = norm(x, mean, var, *affine)
    wanted = [x, *(v for v in affine if v is not None)]
    gradients = torch.autograd.grad(y, wanted, given["dy"])
    assert y.dtype == x.dtype
    return {"y": y.detach(), "mean": mean, "var": var} | dict(
        zip(("dx", "dweight", "dbias"), gradients, strict=False)
    )


def of_ranks(folder: str, cases: list[Case]) -> None:
    rank, ranks = dist.get_rank(), dist.get_world_size()
    for i, case in enumerate(cases):
        given = inputs(case, ranks)
        n = case.shape[0]
        own = {**given, **{k: given[k][rank * n : (rank + 1) * n] for k in ("x", "dy")}}
        kind = torch.float64 if case.dtype == torch.float64 else torch.float32

        def norm(x: Tensor, *rest: Any, damped: bool = case.damped) -> Tensor:
            rm, rv, weight, bias = rest
            return global_batch_norm(x, rm, rv, weight, bias, 0.3, EPS, damped)

        torch.save(outcome(norm, own, kind), f"{folder}/{i} {rank}.pt")


def of_one(case: Case, ranks: int) -> dict[str, Tensor]:
    given = {k: v if v is None else v.double() for k, v in inputs(case, ranks).items()}

    def norm(x: Tensor, *rest: Any) -> Tensor:
        rm, rv, weight, bias = rest
        values, taken = damped(x, EPS) if case.damped else (x, x.new_zeros(x.shape[1]))
        y = F.batch_norm(values, rm, rv, weight, bias, True, 0.3, EPS)
        put_back(rm, taken, 0.3)
        return y

    return outcome(norm, given, torch.float64)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> str:
    folder = str(tmp_path_factory.mktemp("ranks"))
    in_ranks(3, of_ranks, folder, CASES)
    return folder


@pytest.mark.parametrize("i", range(len(CASES)))
def test_ranks_equal_one_norm(folder, i):
    check(CASES[i], folder, i)


def check(case: Case, folder: str, i: int) -> None:
    ranks = 3
    expected = of_one(case, ranks)
    found = [torch.load(f"{folder}/{i} {rank}.pt") for rank in range(ranks)]
    tolerance = TOLERANCE[case.dtype]
    for name, value in expected.items():
        own = [f[name].double() for f in found]
        if name in ("y", "dx"):
            got = torch.cat(own)
        elif name in ("dweight", "dbias"):  # of the ranks' own samples; DDP averages
            got = torch.stack(own).sum(0)
        else:
            assert all(torch.equal(own[0], other) for other in own)
            got = own[0]
        largest = value.abs().max().clamp(min=1e-3)
        assert (got - value).abs().max() / largest < tolerance, (case, name)
    if case.damped:
        largest = expected["dx"].abs().max()
        assert all(f["dx"][:, 0].abs().max() < 1e-9 * largest for f in found), "of a constant"
        assert all((f["y"][:, 0] == f["y"][0, 0, 0, 0]).all() for f in found)
        if case.affine:
            bias = inputs(case, ranks)["bias"][0]
            assert all((f["y"][:, 0] == bias).all() for f in found), "not its bias"
    if case.memory_format is LAST and case.slice == 1:
        assert all(f["y"].is_contiguous(memory_format=LAST) for f in found)


@pytest.fixture
def one_rank() -> Any:
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("gloo", init_method=address, rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_only_the_input_and_vectors_are_kept(one_rank):
    x = torch.randn(4, 3, 8, 8, dtype=torch.bfloat16, requires_grad=True)
    weight, bias = (torch.ones(3, requires_grad=True) for _ in range(2))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        global_batch_norm(x, None, None, weight, bias, 0.1, EPS)
    assert sorted(t.numel() for t in kept) == [3, 3, 3, x.numel()]
    assert any(t.data_ptr() == x.data_ptr() for t in kept)


def test_the_collectives_are_operators(one_rank):
    x = torch.randn(5)
    for name in ("all_gather", "all_reduce"):
        torch.library.opcheck(getattr(torch.ops.sacl_fast, name).default, (x,))
        assert torch.equal(getattr(torch.ops.sacl_fast, name)(x), x)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_it_is_compiled_whole(one_rank, backend):
    x = torch.randn(4, 3, 5, 5, requires_grad=True)
    weight, bias = torch.randn(2, 3).requires_grad_().unbind()
    results = []
    for norm in (global_batch_norm, torch.compile(global_batch_norm, backend=backend)):
        running = torch.zeros(3), torch.ones(3)
        y = norm(x, *running, weight, bias, 0.3, EPS)
        gradients = torch.autograd.grad(y.square().sum(), (x, weight, bias), retain_graph=True)
        results.append((y, *gradients, *running))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs)


class _Kernels:
    """torch's kernels for synchronised batch norm, which exist for GPUs only, as they compute:
    written by their use in ``torch.nn.SyncBatchNorm``."""

    def batch_norm_stats(self, x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        flat = x.transpose(0, 1).flatten(1)
        return flat.mean(1), (flat.var(1, unbiased=False) + eps).rsqrt()

    def batch_norm_gather_stats_with_counts(
        self, x: Tensor, means: Tensor, rstds: Tensor, running_mean: Any, running_var: Any,
        momentum: float, eps: float, counts: Tensor,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        assert counts.dtype == running_mean.dtype and counts.shape == means.shape[:1]
        n, share = counts.sum(), (counts / counts.sum()).unsqueeze(1)
        mean = (share * means).sum(0)
        var = (share * (1 / rstds.square() - eps + (means - mean).square())).sum(0)
        running_mean.lerp_(mean, momentum)
        running_var.lerp_(var * n / (n - 1), momentum)
        return mean, (var + eps).rsqrt()

    def batch_norm_elemt(
        self, x: Tensor, weight: Any, bias: Any, mean: Tensor, rstd: Tensor, eps: float
    ) -> Tensor:
        return F.batch_norm(x, mean, 1 / rstd.square() - eps, weight, bias, False, 0.0, eps)

    def batch_norm_backward_reduce(
        self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Any, *wanted: bool
    ) -> tuple[Tensor, ...]:
        flat, grad = (t.transpose(0, 1).flatten(1) for t in (x, dy))
        sum_dy, sum_dy_x = grad.sum(1), (grad * (flat - mean.unsqueeze(1))).sum(1)
        return sum_dy, sum_dy_x, sum_dy_x * rstd, sum_dy

    def batch_norm_backward_elemt(
        self, dy: Tensor, x: Tensor, mean: Tensor, rstd: Tensor, weight: Any,
        sum_dy: Tensor, sum_dy_x: Tensor, counts: Tensor,
    ) -> Tensor:  # fmt: skip
        assert counts.dtype == torch.int32
        n, shape = counts.sum(), (1, -1, 1, 1)
        centred = x - mean.view(shape)
        dx = dy - (sum_dy / n).view(shape) - centred * (rstd.square() * sum_dy_x / n).view(shape)
        return dx * (rstd if weight is None else rstd * weight).view(shape)


KERNEL_CASES = [case for case in CASES if case.dtype == torch.float64 and len(case.shape) == 4]


def of_kernels(folder: str) -> None:
    kernels = _Kernels()
    for name in (n for n in dir(kernels) if n.startswith("batch_norm")):
        setattr(torch, name, getattr(kernels, name))
    module._by_kernels = lambda x: True
    of_ranks(folder, KERNEL_CASES)


def test_how_torch_s_kernels_are_called(tmp_path):
    in_ranks(3, of_kernels, str(tmp_path))
    for i, case in enumerate(KERNEL_CASES):
        check(case, str(tmp_path), i)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, LAST])
def test_one_rank_on_a_gpu_is_an_ordinary_norm(dtype, memory_format):
    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("nccl", init_method=address, rank=0, world_size=1)
    try:
        x = torch.randn(8, 6, 7, 5, device="cuda", dtype=dtype) + 3
        x = x.contiguous(memory_format=memory_format).requires_grad_()
        kind = torch.float64 if dtype == torch.float64 else torch.float32
        weight, bias = (torch.randn(6, device="cuda", dtype=kind, requires_grad=True) for _ in "wb")
        dy = torch.randn_like(x)
        results = []
        for norm in (global_batch_norm, F.batch_norm):
            running = torch.zeros(6, device="cuda", dtype=kind), torch.ones_like(weight).detach()
            more: Any = (0.3, EPS) if norm is global_batch_norm else (True, 0.3, EPS)
            torch.cuda.set_sync_debug_mode("error")
            y = norm(x, *running, weight, bias, *more)
            gradients = torch.autograd.grad(y, (x, weight, bias), dy)
            torch.cuda.set_sync_debug_mode("default")
            results.append((y, *gradients, *running))
        for ours, theirs in zip(*results, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=2e-2, atol=2e-2)
    finally:
        torch.cuda.set_sync_debug_mode("default")
        dist.destroy_process_group()
