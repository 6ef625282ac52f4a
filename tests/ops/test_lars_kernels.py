"""The kernels of LARS compile for Ampere and Hopper, without a driver and without register spills;
and how many of them a step launches."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from kernel_compilation import (
    SHARED_MEMORY,
    compile_for,
    noted_launches,
    registers_and_spills,
    source,
)
from torch import Tensor

from sacl_kernels import lars
from sacl_kernels.lars import NUMBERS, Launch, Tables

KERNELS = {"table", "norms", "update"}
SETTINGS: dict[str, Any] = dict(momentum=0.9, weight_decay=1e-4, eta=0.02)


def tensors(count: int, size: int = 12) -> list[list[Tensor]]:
    """Parameters, gradients and momenta; one value more and they are not aligned to 16 bytes."""
    return [[torch.empty(size + 1)[:size] for _ in range(count)] for _ in range(3)]


def launches(monkeypatch: pytest.MonkeyPatch, of: list[list[Tensor]], tables: Tables, **changed: Any):
    settings = {"lr": torch.empty(()), "clip": True, "grad_scale": None, "found_inf": None}
    settings |= SETTINGS | changed
    return noted_launches(
        monkeypatch, lambda: lars.update(*of, len(of[0]) // 2, **settings, tables=tables)
    )


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
        registers, spilled = registers_and_spills(compiled, tmp_path)
        print(f"{name} sm_{arch}: {registers} registers")
        if spilled:
            spilling.append(launched)
        if name != "table" and options["ALIGNED"] if "ALIGNED" in options else False:
            assert "ld.global.v4" in compiled.asm["ptx"]
    assert names == KERNELS
    assert not spilling
