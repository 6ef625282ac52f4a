"""What is built and shipped: the compiled module's account of itself, sdist, wheel, build modes."""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path
from types import ModuleType

import pytest
import yaml

from sacl_fast import _version

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def compiled() -> ModuleType:
    try:
        import torch  # noqa: F401  (the module needs its libraries)

        from sacl_fast import _C
    except ImportError as error:
        if os.environ.get("SACL_FAST_BUILD_EXT") == "1":
            pytest.fail(f"SACL_FAST_BUILD_EXT is 1 but sacl_fast._C cannot be imported: {error}")
        pytest.skip(f"sacl_fast._C is not built here ({error})")
    return _C


@pytest.fixture(scope="module")
def setup_module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("sacl_fast_setup", ROOT / "setup.py")
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the sources, without what was built in place."""
    copy = tmp_path / "tree"
    copy.mkdir()
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "LICENSE", "README.md"):
        if (ROOT / name).exists():
            shutil.copy(ROOT / name, copy)
    for name in ("sacl_fast", "kernels", "csrc"):
        ignored = shutil.ignore_patterns("__pycache__", "*.so", "*.egg-info")
        shutil.copytree(ROOT / name, copy / name, ignore=ignored)
    (copy / "tests").mkdir()
    (copy / "tests/test_nothing.py").touch()
    return copy


def run(*command: str, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command, cwd=cwd, env={**os.environ, **variables}, capture_output=True, text=True
    )


def test_build_info_is_of_this_version(compiled: ModuleType):
    info = compiled.build_info()
    assert list(info) == ["version", "cxx", "cuda", "architectures"]
    assert info["version"] == _version.__version__  # else the module is stale: install again
    assert re.fullmatch(r"(gcc|clang) \d+\.\d+\.\d+", info["cxx"])
    assert info["cuda"] is None or re.fullmatch(r"\d+\.\d+", info["cuda"])
    assert bool(info["architectures"]) == (info["cuda"] is not None)


def test_architectures_are_those_in_the_binary(compiled: ModuleType, tmp_path: Path):
    claimed = compiled.build_info()["architectures"]
    if not claimed:
        pytest.skip("sacl_fast._C has no CUDA part")
    triton = importlib.util.find_spec("triton")
    of_triton = Path(str(triton.origin)).parent / "backends/nvidia/bin" if triton else Path()
    cuobjdump = shutil.which("cuobjdump") or shutil.which("cuobjdump", path=of_triton)
    if not cuobjdump:
        pytest.skip("no cuobjdump here")
    extracted = run(cuobjdump, "-xelf", "all", str(compiled.__file__), cwd=tmp_path)
    assert extracted.returncode == 0, extracted.stderr
    # The file names of older releases lack the "a" of sm_90a; the assembler's note inside has it.
    notes = [re.search(rb"-arch (sm_\w+)", f.read_bytes()) for f in tmp_path.glob("*.cubin")]
    held = {note[1].decode() for note in notes if note}
    assert held == {name for name in claimed if name.startswith("sm_")}


def test_device_architecture_without_a_device_says_so(compiled: ModuleType):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is a device")
    with pytest.raises(RuntimeError, match=r"no kernel could run|built without CUDA"):
        compiled.device_architecture()


@pytest.mark.gpu
def test_device_architecture(compiled: ModuleType):
    if not compiled.build_info()["architectures"]:
        pytest.skip("sacl_fast._C has no CUDA part")
    import torch

    major, minor = torch.cuda.get_device_capability()
    ran = compiled.device_architecture()
    assert ran.startswith(f"sm_{major}")
    assert int(ran.removeprefix("sm_")) <= 10 * major + minor


def test_sdist_and_wheel_hold_what_they_should(tree: Path):
    """The wheel is built from the sdist, so this also shows that the sdist is enough to build."""
    built = run(
        *(sys.executable, "-m", "build", "--no-isolation", "--outdir", str(tree / "dist")),
        cwd=tree,
        SACL_FAST_BUILD_EXT="0",
    )
    assert built.returncode == 0, built.stdout + built.stderr

    name = f"sacl_fast-{_version.__version__}"
    with tarfile.open(tree / f"dist/{name}.tar.gz") as sdist:
        shipped = {member.removeprefix(f"{name}/") for member in sdist.getnames()}
    sources = {str(f.relative_to(ROOT)) for f in (ROOT / "csrc").rglob("*") if f.is_file()}
    assert sources
    assert shipped >= sources | {"setup.py", "LICENSE", "kernels/sacl_kernels/__init__.py"}

    with zipfile.ZipFile(tree / f"dist/{name}-py3-none-any.whl") as wheel:
        packed = wheel.namelist()
    assert {file.split("/")[0] for file in packed} == {
        "sacl_fast",
        "sacl_kernels",
        f"{name}.dist-info",
    }
    python = {str(f.relative_to(ROOT)) for f in (ROOT / "sacl_fast").rglob("*.py")}
    page = {str(f.relative_to(ROOT)) for f in (ROOT / "sacl_fast/looking/page").iterdir()}
    assert set(packed) >= python | page | {"sacl_fast/py.typed", "sacl_fast/_C.pyi"}


def test_an_unknown_build_mode_names_the_valid_ones(tree: Path):
    answer = run(sys.executable, "setup.py", "--version", cwd=tree, SACL_FAST_BUILD_EXT="maybe")
    assert answer.returncode != 0
    assert "SACL_FAST_BUILD_EXT is 'maybe'; auto, 0, 1 work." in answer.stderr
    assert "Traceback" not in answer.stderr


@pytest.mark.parametrize("mode", ["auto", "1"])
def test_a_failed_build(tree: Path, mode: str):
    """auto leaves the module out, a stale one too, and says so; 1 stops."""
    pytest.importorskip("pybind11")
    stale = tree / "sacl_fast/_C.cpython-311-x86_64-linux-gnu.so"
    stale.touch()
    for source in (tree / "csrc").glob("*.cpp"):
        source.write_text("#error broken on purpose\n")
    shutil.rmtree(tree / "csrc/cuda")
    build = (sys.executable, "setup.py", "build_ext", "--inplace")
    answer = run(*build, cwd=tree, SACL_FAST_BUILD_EXT=mode)
    if mode == "auto":
        assert answer.returncode == 0, answer.stderr
        assert "sacl-fast: installing without the compiled module" in answer.stderr
        assert not list((tree / "sacl_fast").glob("*.so"))
    else:
        assert answer.returncode != 0
        assert "sacl-fast: no compiled module: " in answer.stderr


@pytest.mark.parametrize("variable", ["CUDA_HOME", "CUDA_PATH", "PATH"])
def test_the_cuda_toolkit_is_found(
    setup_module: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
):
    """By its variables, or by an nvcc on the PATH that is a script and lies elsewhere."""
    toolkit, scripts = tmp_path / "toolkit", tmp_path / "scripts"
    for file in ("bin/nvcc", "lib64/libcudart_static.a"):
        (toolkit / file).parent.mkdir(parents=True)
        (toolkit / file).touch()
    scripts.mkdir()
    (scripts / "nvcc").write_text(f"#!/bin/sh\necho '#$ TOP={toolkit}/bin/..' >&2\n")
    (scripts / "nvcc").chmod(0o755)
    for name in ("CUDA_HOME", "CUDA_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv(variable, str(scripts if variable == "PATH" else toolkit))
    assert setup_module.find_cuda_toolkit() == toolkit


def test_cuda_architectures(setup_module: ModuleType):
    assert setup_module.cuda_targets("8.0;9.0a") == [
        ("compute_80", "sm_80"),
        ("compute_90a", "sm_90a"),
    ]
    assert setup_module.cuda_targets("8.6 12.0+PTX") == [
        ("compute_86", "sm_86"),
        ("compute_120", "sm_120"),
        ("compute_120", "compute_120"),
    ]
    with pytest.raises(ValueError, match="'Hopper'; numbers such as"):
        setup_module.cuda_targets("Hopper")


def versions_of_constraints() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    return dict(line.split("==") for line in lines if not line.startswith("#"))


def test_lower_bounds_are_versions_of_constraints():
    """Those of constraints.txt, to the digits that a bound has."""
    tested = versions_of_constraints()
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    for requirement in [
        *project["dependencies"],
        *extras["dali"],
        *extras["eval"],
        *extras["export"],
    ]:
        name, bound = re.fullmatch(r"([\w-]+)>=([\d.]+)", requirement).groups()
        assert f"{tested[name]}.".startswith(f"{bound}."), requirement


def test_both_sets_of_versions_name_the_same_packages():
    sets = [
        [line.split("==")[0] for line in (ROOT / name).read_text().splitlines() if "==" in line]
        for name in ("constraints.txt", "constraints-newest.txt")
    ]
    assert sets[0] == sets[1]


def test_the_tools_of_pre_commit_are_those_of_make_lint():
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    pins = [pin for hook in hooks for pin in hook["additional_dependencies"]]
    assert {pin.split("==")[0] for pin in pins} == {"ruff", "clang-format"}
    for pin in pins:
        name, version = pin.split("==")
        assert version == versions_of_constraints()[name], pin
