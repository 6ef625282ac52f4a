"""One operator, one name: in schemas, files, Python, tests, benchmarks and `sacl-fast doctor`.

A new operator NAME is a schema in csrc/operators.cpp and the files that `files_of` lists.
"""

from __future__ import annotations

import importlib
import inspect
import re
from pathlib import Path
from typing import get_args

import pytest

from sacl_fast.ops.backend import FUSED_OPERATORS, OPERATORS, SLIM_OPERATORS
from sacl_fast.ops.batch_norm_act import ACTIVATIONS, Activation

ROOT = Path(__file__).resolve().parents[2]
CSRC = ROOT / "csrc"

# Schema -> its arguments. What the backward pass calls is NAME_backward and more.
SCHEMAS = {
    name: re.findall(r"(\w+)(?:,|$)", arguments)
    for name, arguments in re.findall(
        r'm\.def\("(\w+)\((.*?)\) ->', re.sub(r'"\s+"', "", (CSRC / "operators.cpp").read_text())
    )
}


# For fused passes on CUDA devices: on CPUs, plain PyTorch computes them, as a reference. Models do
# not call them (``passes.rules`` does), and they are measured in whole steps.
FUSED = {"norm_act", "norm_depthwise", "norm_slim_add", "norm_slim_gate", "slim_border"}
WITHOUT_KERNELS_OF_THEIR_OWN = {"norm_slim_add", "norm_slim_gate"}  # those of slim_add, slim_gate


def operator_of(schema: str) -> str:
    """``norm_act`` is nine schemas, the parts of one batch norm; ``augment`` takes images in two
    forms."""
    if schema.startswith("norm_act_"):
        return "norm_act"
    if schema == "augment_packed":
        return "augment"
    return schema.partition("_backward")[0]


COMPILED = sorted({operator_of(schema) for schema in SCHEMAS})
TRITON = ("xcorr_loss", "norm_pointwise", "lars")
ON_CPUS_ONLY = {"augment", "draw_views"}  # of schemas; augment_packed is on GPUs as well
WITHOUT_A_SCHEMA = {"lars"}  # an optimiser's update, which nothing but its step calls
WITHOUT_CUDA = {"draw_views"}  # the CPU draws
# Those that are measured where they are used, not by themselves.
MEASURED_IN = {
    "draw_views": "bench_data.py",
    "slim_add": "bench_slim.py",
    "slim_gate": "bench_slim.py",
}


def files_of(op: str) -> list[str]:
    files = [f"sacl_fast/ops/{op}.py", f"tests/ops/test_{op}.py"]
    if op not in FUSED:
        files += [f"csrc/cpu/{op}.cpp", f"benchmarks/{MEASURED_IN.get(op, f'bench_{op}.py')}"]
    if op not in WITHOUT_CUDA:
        files += [f"csrc/cuda/{op}.cpp", f"tests/cuda/test_cuda_{op}.py"]
        files += [f"csrc/cuda/{op}_kernels.cu"] if op not in WITHOUT_KERNELS_OF_THEIR_OWN else []
    return files


@pytest.mark.parametrize("op", COMPILED)
def test_an_operator_has_its_files(op: str):
    missing = [file for file in files_of(op) if not (ROOT / file).is_file()]
    assert not missing


@pytest.mark.parametrize("op", TRITON)
def test_an_operator_of_triton_has_its_files(op: str):
    files = [f"kernels/sacl_kernels/{op}.py", f"sacl_fast/ops/{op}.py"]
    files += [f"tests/ops/test_{op}.py", f"tests/ops/test_{op}_triton.py"]
    assert all((ROOT / file).is_file() for file in files)
    text = (ROOT / f"sacl_fast/ops/{op}.py").read_text()
    schema = f'"sacl_fast::{op}"' in text or f'"{op}": (' in text
    assert schema == (op not in WITHOUT_A_SCHEMA)


def names(pattern: str, prefix: str = "") -> set[str]:
    return {file.stem.removeprefix(prefix) for file in ROOT.glob(pattern)}


def strangers(found: set[str], *others: str) -> list[str]:
    """Names that are neither an operator's (and perhaps more, as `depthwise_conv_weight`) nor
    one of ``others``."""
    known = (*COMPILED, *TRITON)
    return [
        name
        for name in sorted(found - set(others))
        if not any(name == op or name.startswith(f"{op}_") for op in known)
    ]


def test_no_file_has_another_name():
    shared = {"kernels", "isa_avx2", "isa_avx512", "isa_baseline"}
    benchmarks = {"ceilings", "data", "formats", "learning", "memory", "plans", "slim", "step"}
    benchmarks |= {"traffic"}
    assert not strangers(names("csrc/cpu/*.cpp"), *shared)
    assert not strangers(names("csrc/cpu/*_kernels.inl"))
    assert not strangers(names("csrc/cuda/*.cpp"))
    assert not strangers(names("csrc/cuda/*.cu"), "device", "build_info")
    assert not strangers(names("kernels/sacl_kernels/*.py"), "__init__", "options")
    about_cuda = {"code", "graph", "self_check", "skip"}
    assert not strangers(names("tests/cuda/test_cuda_*.py", "test_cuda_"), *about_cuda)
    assert not strangers(names("benchmarks/bench_*.py", "bench_"), *benchmarks)
    assert not strangers(names("benchmarks/tune_*.py", "tune_"))
    about_all = {"backend", "compiled", "global_batch_norm", "names", "slim_channels"}
    assert not strangers(names("tests/ops/test_*.py", "test_"), *about_all)
    plain = {
        "__init__",
        "backend",
        "compiled",
        "self_check",
        "self_check_process",
    }  # and what has no backend but PyTorch
    plain |= {
        "batch_norm",
        "collectives",
        "global_batch_norm",
        "slim_batch_norm",
        "slim_channels",
        "slim_conv",
    }
    assert not strangers(names("sacl_fast/ops/*.py"), *plain)


@pytest.mark.parametrize("folder", ["cpu", "cuda"])
def test_a_file_implements_its_own_schemas_and_all_of_them(folder: str):
    implemented = []
    for file in (CSRC / folder).glob("*.cpp"):
        own = re.findall(r'm\.impl\("(\w+)"', file.read_text())
        assert {operator_of(schema) for schema in own} <= {file.stem}
        implemented += own
    without = ON_CPUS_ONLY if folder == "cuda" else {s for s in SCHEMAS if operator_of(s) in FUSED}
    assert sorted(implemented) == sorted({*SCHEMAS} - without)


@pytest.mark.parametrize("op", sorted({*COMPILED} - FUSED))
def test_the_public_function_has_the_names_of_the_schema(op: str):
    function = getattr(importlib.import_module(f"sacl_fast.ops.{op}"), op)
    parameters = inspect.signature(function).parameters
    lists = [name for name in SCHEMAS[op] if name.endswith("_index")]
    assert set(lists) <= set(parameters)
    assert not {"map", "rest", "offset"} & set(SCHEMAS[op]) - set(parameters)


def test_index_lists_are_called_index_and_maps_map():
    arguments = {name for names in SCHEMAS.values() for name in names}
    assert {"kept_index", "in_index", "a_index", "map_index", "map"} <= arguments
    assert not arguments & {"index", "kept", "zeroed", "source", "shared", "places"}


def test_doctor_and_resolve_know_each_operator_by_its_name():
    called = set(COMPILED) - FUSED
    assert set(OPERATORS) == {*called, "xcorr_loss", "lars"}
    assert set(SLIM_OPERATORS) == called - {"augment", "draw_views"}
    assert set(FUSED_OPERATORS) == {*FUSED, "norm_pointwise"}
    for op, backends in OPERATORS.items():
        assert ("cpu" in backends) == (op in called)
        assert ("cuda" in backends) == (op in called and op not in WITHOUT_CUDA)


def test_place_is_no_name_in_csrc():
    """A pixel, a channel's number, a position in a list: each is called that."""
    for file in CSRC.rglob("*.*"):
        text = re.sub(r"in[ -]place", "", file.read_text())
        assert not re.search(r"\b_?[Pp]laces?(_\w*)?\b", text), file


def test_the_activations_of_python_are_those_of_csrc_in_their_order():
    rows = re.findall(r"\bROW\((\w+)\)", (CSRC / "activation_list.h").read_text())
    assert [name.lower() for name in rows] == list(ACTIVATIONS)
    assert list(get_args(Activation)) == list(ACTIVATIONS)
