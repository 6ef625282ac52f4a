"""Triton kernels compiled without a driver: what a launcher launches, and what it takes of a GPU.

A launcher runs with tensors that need no memory, and its launches are noted instead of carried out,
so what is compiled is what it launches, with the settings it chooses.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.runtime.jit import JITFunction

POINTERS = {
    torch.float32: "*fp32",
    torch.bfloat16: "*bf16",
    torch.float16: "*fp16",
    torch.int64: "*i64",
}
SHARED_MEMORY = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a program can have
_CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")

Launched = tuple[Any, tuple[Any, ...], dict[str, Any]]  # kernel, arguments, constants and options


def noted_launches(monkeypatch: pytest.MonkeyPatch, run: Callable[[], object]) -> list[Launched]:
    """What ``run`` launches."""
    noted = []

    def note(kernel, *arguments, grid, warmup, **options):
        assert options["enable_fp_fusion"], "Triton's default changes with its version"
        noted.append((kernel, arguments, options))

    monkeypatch.setattr(JITFunction, "run", note)
    run()
    return noted


def source(launched: Launched) -> tuple[ASTSource, dict[str, Any]]:
    """What the JIT compiles for these arguments, and its options."""
    kernel, arguments, options = launched
    options = dict(options)
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        specialized = not parameter.do_not_specialize
        is_one = isinstance(value, int) and value == 1 and specialized
        if parameter.is_constexpr or value is None or is_one:
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, tuple):  # of whole numbers above 2**32, all multiples of 16
            signature[parameter.name] = ("i64",) * len(value)
            hints |= {(i, j): [["tt.divisibility", 16]] for j in range(len(value))}
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        sixteenth = isinstance(value, int) and value % 16 == 0 and specialized
        if isinstance(value, torch.Tensor) or sixteenth:
            hints[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, hints), options


def compile_for(arch: int, src: ASTSource, options: dict[str, Any]) -> CompiledKernel:
    return triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)


def registers_and_spills(compiled: CompiledKernel, folder: Path) -> tuple[int, int]:
    """Registers of a thread, and bytes of them that are kept in memory."""
    path = folder / "kernel.cubin"
    path.write_bytes(compiled.asm["cubin"])
    command = [_CUOBJDUMP, "--dump-resource-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = {name: int(count) for name, count in re.findall(r"(REG|STACK|LOCAL):(\d+)", report)}
    assert usage["REG"] > 0
    return usage["REG"], usage["STACK"] + usage["LOCAL"]
