"""What the compiler says of every kernel in the compiled module."""

import importlib.util
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch  # noqa: F401  (before the module, which needs its libraries)
from cuda_devices import ROOT

USAGE = re.compile(r"Function (\w+):\s*REG:(\d+) STACK:(\d+) SHARED:(\d+) LOCAL:(\d+)")


def cuobjdump() -> str | None:
    triton = importlib.util.find_spec("triton")
    of_triton = Path(str(triton.origin)).parent / "backends/nvidia/bin" if triton else Path()
    return shutil.which("cuobjdump") or shutil.which("cuobjdump", path=of_triton)


def test_no_kernel_has_a_stack_or_local_memory():
    """Spilled registers lie on the stack, so there are none of them either."""
    try:
        from sacl_fast import _C
    except ImportError as error:
        pytest.skip(f"sacl_fast._C is not built here ({error})")
    architectures = _C.build_info()["architectures"]
    if not architectures:
        pytest.skip("sacl_fast._C has no CUDA part")
    built = Path(str(_C.__file__)).stat().st_mtime
    newer = [f.name for f in (ROOT / "csrc").rglob("*.[chi]*") if f.stat().st_mtime > built]
    assert not newer, f"{newer} changed since sacl_fast._C was built: build it again"
    if not (tool := cuobjdump()):
        pytest.skip("no cuobjdump here")
    command = [tool, "--dump-resource-usage", str(_C.__file__)]
    report = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    kernels = USAGE.findall(report)
    files = [f for f in (ROOT / "csrc/cuda").iterdir() if f.suffix in (".cu", ".h")]
    sources = "".join(f.read_text() for f in files)
    named = set(
        re.findall(r"__global__ void[^(]*?(?:__launch_bounds__\([^)]*\)\s*)?(\w+)\(", sources)
    )
    assert len(named) > 20
    for name in named:  # each was compiled for each architecture
        count = sum(f"{len(name)}{name}" in kernel for kernel, *_ in kernels)
        assert count and count % len(architectures) == 0, (name, count)
    heavy = [kernel for kernel, _, stack, _, local in kernels if int(stack) or int(local)]
    assert not heavy, heavy
