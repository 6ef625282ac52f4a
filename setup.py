"""Build of the compiled module sacl_fast._C from csrc/; all else is in pyproject.toml.

SACL_FAST_BUILD_EXT decides: 0 never builds it, 1 makes a failed build an error, auto (the default)
builds what it can (C++ and CUDA, C++ alone, nothing) and says what it left out and why.
The CUDA part needs a toolkit and a torch with CUDA, but no GPU; TORCH_CUDA_ARCH_LIST names the
architectures. csrc/*.cpp and csrc/cpu/*.cpp are compiled, and csrc/cuda/*.cpp and *.cu with CUDA.
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import sysconfig
from glob import glob
from pathlib import Path
from typing import Any

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.errors import BaseError, CCompilerError

MODES = ("auto", "0", "1")
DEFAULT_ARCHITECTURES = "8.0;9.0a"
HOW_TO = (
    "To build it, have a C++ compiler, run `pip install torch pybind11 ninja`, then install "
    "sacl-fast with `pip install --no-build-isolation`."
)
# What a build that cannot succeed raises: torch's (RuntimeError), setuptools', the compiler's.
BUILD_ERRORS = (
    RuntimeError,
    ValueError,
    ImportError,
    OSError,
    subprocess.SubprocessError,
    BaseError,
    CCompilerError,
)


def say(sentence: str) -> None:
    print(f"sacl-fast: {sentence}", file=sys.stderr, flush=True)


def reason_in(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".") + "; the output above tells more"


def build_mode() -> str:
    mode = os.environ.get("SACL_FAST_BUILD_EXT", "auto")
    if mode not in MODES:
        raise SystemExit(f"SACL_FAST_BUILD_EXT is {mode!r}; {', '.join(MODES)} work.")
    return mode


def find_cuda_toolkit() -> Path | None:
    """The toolkit's folder. Where PATH's nvcc is a wrapper script, only nvcc itself can tell."""
    candidates = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    if nvcc := shutil.which("nvcc"):
        dry_run = subprocess.run([nvcc, "--dryrun", "x.cu"], capture_output=True, text=True)
        candidates += re.findall(r"^#\$ TOP=(.*)$", dry_run.stderr, flags=re.MULTILINE)
        candidates.append(str(Path(nvcc).resolve().parent.parent))
    candidates += ["/usr/local/cuda", *sorted(glob("/usr/local/cuda-*"), reverse=True)]
    for candidate in filter(None, candidates):
        toolkit = Path(candidate.strip()).resolve()
        if (toolkit / "bin/nvcc").is_file() and cuda_library_folder(toolkit):
            return toolkit
    return None


def cuda_library_folder(toolkit: Path) -> Path | None:
    folders = [toolkit / "lib64", toolkit / "lib", *toolkit.glob("targets/*/lib")]
    return next((f for f in folders if (f / "libcudart_static.a").is_file()), None)


def cuda_targets(listed: str) -> list[tuple[str, str]]:
    """nvcc's (virtual, real) pairs: "8.0;9.0a" gives compute_80, sm_80 and compute_90a, sm_90a."""
    targets = []
    for entry in re.split(r"[;,\s]+", listed.strip()):
        match = re.fullmatch(r"(\d+)\.(\d[af]?)(\+PTX)?", entry)
        if not match:
            raise ValueError(
                f"TORCH_CUDA_ARCH_LIST holds {entry!r}; numbers such as 8.0, 9.0a or 9.0+PTX work"
            )
        number = match[1] + match[2]
        targets.append((f"compute_{number}", f"sm_{number}"))
        if match[3]:
            targets.append((f"compute_{number}", f"compute_{number}"))
    return list(dict.fromkeys(targets))


def module_options(version: str, toolkit: Path | None) -> dict[str, Any]:
    """What to compile and how; without a toolkit the C++ part only."""
    import pybind11
    import torch
    from torch.utils.cpp_extension import include_paths

    options: dict[str, Any] = {
        "sources": sorted(map(str, [*Path("csrc").glob("*.cpp"), *Path("csrc").glob("cpu/*.cpp")])),
        "depends": sorted(map(str, [*Path("csrc").rglob("*.h"), *Path("csrc").rglob("*.inl")])),
        "include_dirs": [str(Path("csrc").resolve()), pybind11.get_include(), *include_paths()],
        # TORCH_TARGET_VERSION: only what torch keeps stable from 2.10 on
        "define_macros": [
            ("SACL_VERSION", f'"{version}"'),
            ("TORCH_TARGET_VERSION", "0x020a000000000000"),
        ],
        "extra_compile_args": {
            "cxx": ["-O3", "-g0", "-std=c++20", "-fvisibility=hidden", "-Wno-psabi"]
        },
        "extra_objects": [],
        "libraries": ["torch", "torch_cpu", "c10"],  # loaded by `import torch`, hence no path
        "library_dirs": [str(Path(torch.__file__).parent / "lib")],
        "extra_link_args": [],
    }
    if toolkit:
        targets = cuda_targets(os.environ.get("TORCH_CUDA_ARCH_LIST") or DEFAULT_ARCHITECTURES)
        held = ",".join(real for _, real in targets)
        options["sources"] += sorted(map(str, Path("csrc/cuda").glob("*.c*")))
        options["include_dirs"].append(str(toolkit / "include"))
        options["define_macros"] += [
            ("SACL_WITH_CUDA", None),
            ("SACL_CUDA_ARCHITECTURES", f'"{held}"'),
        ]
        options["extra_compile_args"]["nvcc"] = [
            "-O3",
            *(f"-gencode=arch={virtual},code={real}" for virtual, real in targets),
        ]
        # The static runtime, with its symbols kept in: the module loads where there is no toolkit
        # and no driver, and does not meet the shared runtime that torch loads.
        options["extra_objects"] = [f"{cuda_library_folder(toolkit)}/libcudart_static.a"]
        options["libraries"] += ["torch_cuda", "rt", "dl", "pthread"]
        options["extra_link_args"] = ["-Wl,--exclude-libs,ALL"]
    return options


class BuildCompiledModule(build_ext):
    """Runs torch's BuildExtension: with CUDA, else C++ only, else (auto) not at all."""

    def build_extensions(self) -> None:
        (module,) = self.extensions
        strict = build_mode() == "1"
        try:
            self.build_best(module, strict)
        except BUILD_ERRORS as error:
            if strict:
                raise SystemExit(f"sacl-fast: no compiled module: {reason_in(error)}.") from error
            for stale in Path("sacl_fast").glob("_C.*.so"):  # else it would be imported
                stale.unlink()
            module.optional = True  # nothing to copy
            reason = f"it failed to build ({reason_in(error)})"
            say(f"installing without the compiled module: {reason}. {HOW_TO}")

    def build_best(self, module: Extension, strict: bool) -> None:
        import torch

        toolkit = find_cuda_toolkit() if torch.version.cuda else None
        if toolkit:
            try:
                self.build(module, toolkit)
                return
            except BUILD_ERRORS as error:
                if strict:
                    raise
                reason = f"it failed to build ({reason_in(error)})"
        elif torch.version.cuda:
            reason = "no CUDA toolkit was found (CUDA_HOME can name its folder)"
        else:
            reason = "torch was built without CUDA"
        say(f"the compiled module goes without its CUDA part: {reason}.")
        self.build(module, None)

    def build(self, module: Extension, toolkit: Path | None) -> None:
        if toolkit:
            os.environ["CUDA_HOME"] = str(toolkit)  # before cpp_extension reads it
        # ninja is found where the environment is used without being activated
        os.environ["PATH"] += os.pathsep + sysconfig.get_path("scripts")
        from torch.utils.cpp_extension import BuildExtension

        vars(module).update(module_options(self.distribution.get_version(), toolkit))
        command = BuildExtension(self.distribution)
        for option in ("build_lib", "build_temp", "debug", "force", "parallel"):
            setattr(command, option, getattr(self, option))
        command.ensure_finalized()
        command.run()
        part = "with CUDA" if toolkit else "for the CPU"
        say(f"the compiled module is built {part}.")


def compiled_modules() -> list[Extension]:
    mode = build_mode()
    missing = [name for name in ("torch", "pybind11") if importlib.util.find_spec(name) is None]
    if mode == "0":
        return []
    if missing:
        reason = f"{' and '.join(missing)} cannot be imported where it is built"
        if {"bdist_wheel", "build", "build_ext", "develop", "editable_wheel"} & set(sys.argv):
            if mode == "1":
                raise SystemExit(f"sacl-fast: no compiled module: {reason}. {HOW_TO}")
            say(f"installing without the compiled module: {reason}. {HOW_TO}")
        return []
    return [Extension("sacl_fast._C", sources=["csrc/bindings.cpp"])]


if __name__ == "__main__":
    setup(ext_modules=compiled_modules(), cmdclass={"build_ext": BuildCompiledModule})
