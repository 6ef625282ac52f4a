"""The kernels of LARS compile for Ampere and Hopper, without a driver and without register spills;
and how many of them a step launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_compilation import (
    SHARED_MEMORY,
    Launched,
    compile_for,
    noted_launches,
    registers_and_spills,
    source,
)
from torch import Tensor
from triton.compiler import ASTSource

from sacl_kernels import lars
from sacl_kernels.lars import NUMBERS, Launch, Tables

KERNELS = {"table", "norms", "update"}
SETTINGS: dict[str, Any] = dict(momentum=0.9, weight_decay=1e-4, eta=0.02)


def tensors(count: int, size: int = 12) -> list[list[Tensor]]:
    """Parameters, gradients and momenta; one value more and they are not aligned to 16 bytes."""
    return [[torch.empty(size + 1)[:size] for _ in range(count)] for _ in range(3)]


def launches(
    monkeypatch: pytest.MonkeyPatch, of: list[list[Tensor]], tables: Tables, **changed: Any
) -> list[Launched]:
    """What an update launches, of whose tensors the first half have a trust ratio."""
    settings: dict[str, Any] = {"lr": torch.empty(()), "clip": True, "grad_scale": None}
    settings |= {"found_inf": None} | SETTINGS | changed
    scaled = len(of[0]) // 2

    def run() -> None:
        lars.update(of[0], of[1], of[2], scaled, **settings, tables=tables)

    return noted_launches(monkeypatch, run)


@pytest.mark.parametrize("arch", [80, 90])
def test_kernels_compile_without_spills(monkeypatch, tmp_path, arch):
    aligned, unaligned = tensors(90), [[t[1:] for t in of] for of in tensors(3)]
    scale = {"grad_scale": torch.empty(()), "found_inf": torch.empty(())}
    noted = launches(monkeypatch, aligned, Tables())
    noted += launches(monkeypatch, aligned, Tables(), lr=0.1, clip=False)
    noted += launches(monkeypatch, unaligned, Tables(), **scale)
    seen, names, spilling = set(), set(), []
    for launched in noted:
        name = launched[0].__name__.removesuffix("_kernel")
        src, options = source(launched)
        if src.hash() in seen:
            continue
        seen.add(src.hash())
        names.add(name)
        compiled = compile_for(arch, src, options)
        assert compiled.metadata.shared <= SHARED_MEMORY[arch]
        if registers_and_spills(compiled, tmp_path)[1]:
            spilling.append(launched)
        wide = "ld.global.v4" in compiled.asm["ptx"]
        assert wide == (name != "table" and src.constants[_index(src, "ALIGNED")])
    assert names == KERNELS
    assert not spilling


def _index(src: ASTSource, name: str) -> tuple[int, ...]:
    return (src.fn.arg_names.index(name),)


def names_of(noted: list[Launched]) -> list[str]:
    return [launched[0].__name__.removesuffix("_kernel") for launched in noted]


@pytest.mark.parametrize("count", [2, 90, 400])
def test_launches_of_a_step(monkeypatch: pytest.MonkeyPatch, count: int):
    """At most 4: 2, and 1 more in which gradients lie elsewhere."""
    (params, grads, momenta), tables = tensors(count), Tables()
    kernels = ["norms", "update"]
    first = names_of(launches(monkeypatch, [params, grads, momenta], tables))
    written = -(-4 * count // NUMBERS) + -(-count // NUMBERS)
    assert first == ["table"] * written + kernels
    assert names_of(launches(monkeypatch, [params, grads, momenta], tables)) == kernels
    moved = [torch.empty_like(g) for g in grads]
    assert names_of(launches(monkeypatch, [params, moved, momenta], tables)) == ["table", *kernels]
    for of in ([params, grads, momenta], [params, moved, momenta]):
        assert names_of(launches(monkeypatch, of, tables)) == kernels


def test_nothing_has_a_trust_ratio(monkeypatch: pytest.MonkeyPatch):
    of = tensors(1)
    noted = launches(monkeypatch, of, Tables())
    assert names_of(noted)[-1] == "update" and "norms" not in names_of(noted)


def test_a_table_in_a_graph_is_the_graph_s(monkeypatch: pytest.MonkeyPatch):
    """What a launch inside a capture writes is there when the graph runs, not before; and a table
    that a graph reads is kept for it."""
    capturing = False
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    monkeypatch.setattr(lars, "_written", lambda numbers, device: torch.empty(1))
    tables, device = Tables(), torch.device("cuda")
    before = tables.of((1,), device)
    capturing = True
    inside = tables.of((2,), device)
    assert tables.of((1,), device) is before
    capturing = False
    assert tables.of((2,), device) is not inside
    for i in range(3, 30):
        tables.of((i,), device)
    assert any(table is before for table in tables._in_graphs)


def test_few_programs_add_up_few_sums():
    launch = Launch()
    for largest in (1, 8192, 8192 * 1024, 8192 * 1024 + 1, 10**9):
        size = launch.chunk_size(largest)
        assert size % launch.block == 0 and -(-largest // size) <= launch.chunks
    assert launch.chunk_size(8192 * 1024) == 8192
