"""Every Triton kernel compiles for Ampere and Hopper, without a driver and without register spills.

The launchers run with CPU tensors and their launches are noted instead of carried out, so what is
compiled here is what they launch, with the settings they choose.
"""

import os
import re
import subprocess

import pytest
import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from sacl_fast.ops.xcorr_loss_reference import Rows, Terms
from sacl_kernels import xcorr_loss
from sacl_kernels.xcorr_loss_launch import launch_for

POINTERS = {torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16"}
CUOBJDUMP = os.path.join(os.path.dirname(triton.__file__), "backends/nvidia/bin/cuobjdump")
KERNELS = {"standardize", "gram", "combine", "finish", "correlation", "gradient", "project"}

# (N, D, embeddings, rows of this rank): the presets' sizes, one tile, all rows in one program and
# not, sizes that are no multiple of 16, 1 as a size.
SHAPES = [
    (256, 2048, 4, 256),
    (512, 8192, 4, 512),
    (1024, 2048, 2, 1024),
    (4096, 512, 4, 4096),
    (512, 2048, 4, 128),
    (200, 333, 4, 200),
    (777, 123, 4, 777),
    (777, 4100, 2, 777),
    (2, 1, 2, 1),
]


def launches(monkeypatch, shape, dtype, capability):
    """(kernel, arguments, constants and options) of value and gradient at that shape."""
    noted = []

    def note(kernel, *arguments, grid, warmup, **options):
        noted.append((kernel, arguments, options))

    monkeypatch.setattr(JITFunction, "run", note)
    N, D, count, n = shape
    batch = [torch.empty(N, D, dtype=dtype) for _ in range(count)]
    rows = Rows(0, n, None if n == N else lambda x: None)
    terms = Terms(0.9, 0.02, 0.003 if count == 4 else 0.0, False, 1e-5)
    launch = launch_for(N, D, dtype, capability)
    if N <= D:
        _, _, saved = xcorr_loss.gram_forward(batch, rows, terms, keep=True, launch=launch)
        xcorr_loss.gram_backward(torch.ones(()), saved, rows, terms, launch)
    else:
        for keep in (True, False):
            xcorr_loss.tiles(batch, rows, terms, keep=keep, launch=launch)
    return noted


def source(kernel, arguments, options):
    """What the JIT compiles for these arguments, and its options."""
    values = dict(zip(kernel.arg_names, arguments, strict=False))
    values |= {name: options.pop(name) for name in kernel.arg_names if name in options}
    signature, constants, hints = {}, {}, {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        if parameter.is_constexpr or (isinstance(value, int) and value == 1):
            signature[parameter.name] = "constexpr"
            constants[(i,)] = value
            continue
        if isinstance(value, torch.Tensor):
            signature[parameter.name] = POINTERS[value.dtype]
        else:
            signature[parameter.name] = "i32" if isinstance(value, int) else "fp32"
        if isinstance(value, torch.Tensor) or (isinstance(value, int) and value % 16 == 0):
            hints[(i,)] = [["tt.divisibility", 16]]
    return ASTSource(kernel, signature, constants, hints), options


def spilled(compiled, path) -> bool:
    """Whether a kernel keeps registers in memory."""
    path.write_bytes(compiled.asm["cubin"])
    command = [CUOBJDUMP, "--dump-resource-usage", str(path)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    usage = dict(re.findall(r"(REG|STACK|LOCAL):(\d+)", report))
    assert int(usage["REG"]) > 0
    return int(usage["STACK"]) + int(usage["LOCAL"]) > 0


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("dtype", list(POINTERS), ids=str)
def test_kernels_compile_without_spills(monkeypatch, tmp_path, dtype, arch):
    seen, names, spilling = set(), set(), []
    for shape in SHAPES:
        for kernel, arguments, options in launches(monkeypatch, shape, dtype, (arch // 10, 0)):
            name = kernel.__name__.removesuffix("_kernel")
            src, options = source(kernel, arguments, options)
            if src.hash() in seen:
                continue
            seen.add(src.hash())
            names.add(name)
            compiled = triton.compile(src, target=GPUTarget("cuda", arch, 32), options=options)
            assert compiled.metadata.shared <= (163 if arch == 80 else 227) * 1024
            if spilled(compiled, tmp_path / f"{name}.cubin"):
                spilling.append((name, shape))
    assert names == KERNELS
    assert not spilling


@pytest.mark.parametrize("d", [512, 2048, 8192])
def test_five_launches_forward_and_backward(monkeypatch, d):
    noted = launches(monkeypatch, (256, d, 4, 256), torch.bfloat16, (9, 0))
    assert len(noted) == 5, [kernel.__name__ for kernel, *_ in noted]
