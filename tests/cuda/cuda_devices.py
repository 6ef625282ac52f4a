"""What the CUDA operators' tests run on: a GPU, or the same sources compiled for the CPU (simt.h).

Emulated, the operators are ``torch.ops.sacl_emulated.*`` and take tensors of the CPU. All memory
they are given or allocate ends where a page that is not there begins.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import shutil
import subprocess
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parents[2]
HERE = ROOT / "tests/cuda"
SOURCES = [
    *sorted((ROOT / "csrc/cuda").glob("*_kernels.cu")),
    *sorted((ROOT / "csrc/cuda").glob("*.cpp")),
    ROOT / "csrc/operators.cpp",
    HERE / "simt.cpp",
]
# Of the largest value: sums are in fp32, results are rounded to their type.
TOLERANCES = {torch.float32: 5e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
DTYPES = list(TOLERANCES)


class Device(NamedTuple):
    """Where operators run: the namespace they are in, and how a tensor gets there."""

    name: str
    ops: Any

    def put(self, tensor: Tensor | None) -> Tensor | None:
        """A copy of the tensor on the device, with the same strides."""
        if tensor is None or self.name == "cuda":
            return None if tensor is None else tensor.to("cuda")
        return _guarded(tensor)


@cache
def emulator() -> ctypes.CDLL:
    """The library of the emulated operators, compiled if need be, loaded."""
    compiler = shutil.which(os.environ.get("CXX", "g++"))
    if not compiler:
        pytest.skip("no C++ compiler here")
    from torch.utils.cpp_extension import include_paths

    flags = "-O1 -std=c++20 -fPIC -fvisibility=hidden -Wno-psabi -DSACL_EMULATED".split()
    flags += ["-Dsacl_fast=sacl_emulated", "-DTORCH_TARGET_VERSION=0x020b000000000000"]
    flags += [f"-I{path}" for path in (ROOT / "csrc", HERE, *include_paths())]
    files = [*SOURCES, *HERE.glob("*.h"), *(ROOT / "csrc").rglob("*.h")]
    text = b"".join(f.read_bytes() for f in files) + repr((flags, torch.__version__)).encode()
    folder = ROOT / "build" / f"emulated-{hashlib.sha256(text).hexdigest()[:16]}"
    library = folder / "operators.so"
    if not library.exists():
        folder.mkdir(parents=True, exist_ok=True)
        own = folder / str(os.getpid())  # of this process: others may be at it too
        objects = []
        for source in SOURCES:
            objects.append(f"{own}-{source.name}.o")
            subprocess.run(
                [compiler, *flags, "-x", "c++", "-c", str(source), "-o", objects[-1]], check=True
            )
        torch_libraries = Path(torch.__file__).parent / "lib"
        link = [compiler, "-shared", *objects, f"-L{torch_libraries}", "-ltorch_cpu", "-lc10"]
        subprocess.run([*link, "-o", f"{own}.so"], check=True)
        os.replace(f"{own}.so", library)
        for file in objects:
            os.unlink(file)
    torch.ops.load_library(str(library))
    loaded = ctypes.CDLL(str(library))
    loaded.sacl_simt_allocate.restype = ctypes.c_void_p
    loaded.sacl_simt_allocate.argtypes = [ctypes.c_size_t]
    return loaded


def _guarded(tensor: Tensor) -> Tensor:
    """A copy that ends where a page that is not there begins (and is never given back)."""
    extent = 1 + sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))
    if not tensor.numel():
        return tensor.clone()
    size = extent * tensor.element_size()
    memory = (ctypes.c_char * size).from_address(emulator().sacl_simt_allocate(size))
    flat = torch.frombuffer(memory, dtype=tensor.dtype, count=extent)
    return flat.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


def both(argument: str = "device") -> pytest.MarkDecorator:
    """Runs a test emulated and, where there is one, on a GPU."""
    return pytest.mark.parametrize(
        argument, ["emulated", pytest.param("cuda", marks=pytest.mark.gpu)], indirect=True
    )


def get_device(name: str) -> Device:
    if name == "emulated":
        emulator()
        return Device(name, torch.ops.sacl_emulated)
    from sacl_fast.ops import compiled

    obstacle = compiled.obstacle() or compiled.cuda_obstacle(torch.device("cuda"))
    if obstacle:
        pytest.fail(obstacle)
    return Device(name, torch.ops.sacl_fast)


def images(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed + sum(shape))
    x = torch.randn(shape, generator=generator)
    return x.to(dtype).contiguous(memory_format=torch.channels_last)


def assert_near(got: Tensor, exact: Tensor, dtype: torch.dtype, slack: float = 1) -> None:
    """Equal up to the type's rounding, relative to the largest value."""
    assert got.shape == exact.shape, (got.shape, exact.shape)
    if not exact.numel():
        return
    scale = exact.abs().max().clamp(min=1e-3)
    error = ((got.detach().cpu().double() - exact) / scale).abs().max().item()
    assert error < slack * TOLERANCES[dtype], error  # not if NaN
