"""Who may import whom. The tables below are the rule; the tree is held against them."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path, PurePath
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parent.parent

# Parts of sacl_fast. "data.views" is a room with a rule of its own where it has a row, and else one
# module of a part. A part may always import itself.
COMMON = ("errors", "files", "output", "machine", "checks", "config", "_version")
METHOD = ("ops", "losses", "slim", "encoders", "optim")
RUN = (*METHOD, "passes", "precision", "data", "engine", "evaluation", "presets")
COMMANDS = ("transfer", "looking", "deploy", "caching", "bench")

OURS: dict[str, tuple[str, ...]] = {
    "_version": (),
    "errors": (),
    "files": (),
    "output": (),
    "machine": (),
    "checks": (),
    "config": (),
    "precision": (),
    "presets": ("data.views.tables",),
    "ops": (),
    "losses": METHOD,
    "slim": METHOD,
    "encoders": METHOD,
    "optim": METHOD,
    "passes": ("ops", "slim", "precision"),
    "data": (),
    "data.images": (),
    "data.views": (),
    "data.loading": ("data.images", "data.views", "precision"),
    "verification": ("ops", "data.views"),
    "engine": RUN,
    "evaluation": RUN,
    "transfer": RUN,
    "looking": RUN,
    "evaluate": (*RUN, "transfer", "looking"),
    "deploy": RUN,
    "caching": ("data", "engine", "evaluation"),
    "bench": RUN,
    "options": (),
    "cli": ("presets", "options"),
    "__init__": ("presets",),
    "__main__": ("cli",),
    "sacl_kernels": (),
    "benchmarks": (*RUN, *COMMANDS, "options", "cli", "sacl_kernels", "_C"),
    "examples": (*RUN, "transfer", "looking", "deploy"),
    "tests": (
        *RUN,
        "verification",
        "transfer",
        "looking",
        "deploy",
        "caching",
        "bench",
        "options",
        "cli",
        "sacl_kernels",
        "_C",
    ),
}

# Besides those, inside functions.
OURS_LAZILY: dict[str, tuple[str, ...]] = {
    "ops": ("sacl_kernels", "_C"),
    "data.views": ("ops",),
    "cli": (*RUN, *COMMANDS, "sacl_kernels", "_C"),
    "__init__": (*RUN, "transfer", "looking", "evaluate", "deploy"),
}

# The only packages of others; a part that is not named here may import any.
OTHERS: dict[str, tuple[str, ...]] = {
    "_version": (),
    "errors": (),
    "files": (),
    "output": (),
    "machine": (),
    "checks": (),
    "config": ("tyro", "yaml"),
    "presets": ("tyro", "yaml"),
    "cli": ("tyro", "rich"),
    "__init__": (),
    "__main__": (),
    "sacl_kernels": ("torch", "triton"),
}
ANY_OTHERS_LAZILY = ("cli", "__init__")

DALI, DALI_MODULE = "nvidia.dali", PurePath("sacl_fast/data/views/dali_pipeline.py")


class Import(NamedTuple):
    name: str  # "sacl_fast.ops.resolve" for `from sacl_fast.ops import resolve`
    line: int
    lazy: bool  # inside a function, or for the type checker only


def imports(source: str, path: PurePath) -> Iterator[Import]:
    """Every import statement, and `import_module("...")`, with relative names made absolute."""
    package = [part for part in path.parts[:-1] if part != "kernels"]

    def walk(node: ast.AST, lazy: bool) -> Iterator[Import]:
        match node:
            case ast.Import(names=names):
                yield from (Import(alias.name, node.lineno, lazy) for alias in names)
            case ast.ImportFrom(module=module, names=names, level=level):
                parents = package[: len(package) - level + 1] if level else []
                base = ".".join([*parents, *([module] if module else [])])
                yield from (Import(f"{base}.{alias.name}", node.lineno, lazy) for alias in names)
            case ast.Call(
                func=ast.Name(id="import_module" | "__import__")
                | ast.Attribute(attr="import_module"),
                args=[ast.Constant(value=str(name)), *_],
            ):
                yield Import(name, node.lineno, lazy)
        inner = lazy or isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
        if isinstance(node, ast.If):
            inner = inner or ast.unparse(node.test) in ("TYPE_CHECKING", "typing.TYPE_CHECKING")
        for child in ast.iter_child_nodes(node):
            yield from walk(child, inner)

    yield from walk(ast.parse(source), lazy=False)


def part_of(path: PurePath) -> str:
    """The key of the tables: "ops" for sacl_fast/ops/xcorr_loss.py, "data.views" for
    sacl_fast/data/views/draw.py."""
    parts = path.with_suffix("").parts
    if parts[0] not in ("sacl_fast", "kernels"):
        return parts[0]
    room = ".".join(parts[1:3])
    return room if room in OURS else parts[1]


def within(name: str, allowed: tuple[str, ...]) -> bool:
    return any(name == prefix or name.startswith(f"{prefix}.") for prefix in allowed)


def violations(source: str, path: PurePath) -> list[str]:
    """A line for each import of `source`, a file at `path` in the tree, that the tables forbid."""
    part = part_of(path)
    if part not in OURS:
        return [f"{path}: {part} has no rule in {Path(__file__).name}"]
    found = []
    for name, line, lazy in imports(source, path):
        top = name.partition(".")[0]
        if top in ("sacl_fast", "sacl_kernels", "benchmarks", "tests"):
            ours = name.removeprefix("sacl_fast.")
            if ours == "sacl_fast" or ours.startswith("__"):  # its version
                allowed = part != "sacl_kernels"
            else:
                common = () if part == "sacl_kernels" else COMMON
                lazily = OURS_LAZILY.get(part, ()) if lazy else ()
                allowed = within(ours, (part, *common, *OURS[part], *lazily))
        elif within(name, (DALI,)):
            allowed = path == DALI_MODULE or part in ("benchmarks", "tests")
        else:
            unrestricted = part not in OTHERS or (lazy and part in ANY_OTHERS_LAZILY)
            allowed = unrestricted or top in sys.stdlib_module_names or top in OTHERS[part]
        if not allowed:
            where = "inside a function" if lazy else "at module level"
            found.append(f"{path}:{line}: {part} may not import {name} {where}")
    return found


def test_the_tree_keeps_the_layers():
    folders = ("sacl_fast", "kernels", "benchmarks", "examples", "tests")
    files = sorted(file for folder in folders for file in (ROOT / folder).rglob("*.py"))
    assert len(files) > 10
    found = [v for f in files for v in violations(f.read_text(), f.relative_to(ROOT))]
    assert not found, "\n" + "\n".join(found)


def circles(sources: dict[PurePath, str]) -> list[str]:
    """Modules that import one another when they are loaded, a line for each group of them."""
    path_of = {_module(path): path for path in sources}

    def imported(module: str) -> Iterator[str]:
        path = path_of[module]
        for name, _, lazy in imports(sources[path], path):
            while name and name not in path_of:  # `from module import name`
                name = name.rpartition(".")[0]
            if name and not lazy:
                yield name

    imported_by = {module: sorted({*imported(module)} - {module}) for module in path_of}

    def reached(start: str) -> set[str]:
        found, ahead = set(), [start]
        while ahead:
            new = [module for module in imported_by[ahead.pop()] if module not in found]
            found.update(new)
            ahead += new
        return found

    reach = {module: reached(module) for module in path_of}
    groups = {
        tuple(sorted({other for other in reach[module] if module in reach[other]}))
        for module in path_of
        if module in reach[module]
    }
    return [" <-> ".join(group) for group in sorted(groups)]


def _module(path: PurePath) -> str:
    parts = path.with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def test_no_modules_import_one_another():
    files = sorted((ROOT / "sacl_fast").rglob("*.py"))
    assert len(files) > 10
    found = circles({file.relative_to(ROOT): file.read_text() for file in files})
    assert not found, "\n" + "\n".join(found)


def test_a_circle_is_reported():
    sources = {
        "sacl_fast/__init__.py": "",
        "sacl_fast/slim/__init__.py": "from sacl_fast.slim.slicer import Slicer",
        "sacl_fast/slim/slicer.py": "from sacl_fast.slim import rules\nfrom . import tensor",
        "sacl_fast/slim/rules.py": "def f():\n    from sacl_fast.slim import slicer",
        "sacl_fast/slim/tensor.py": "import sacl_fast.losses",
        "sacl_fast/losses.py": "from sacl_fast.slim import Slicer",
    }
    (report,) = circles({PurePath(path): source for path, source in sources.items()})
    names = ("losses", "slim", "slim.slicer", "slim.tensor")
    assert report == " <-> ".join(f"sacl_fast.{name}" for name in names)
    del sources["sacl_fast/losses.py"]
    assert not circles({PurePath(path): source for path, source in sources.items()})


@pytest.mark.parametrize(
    ("path", "source", "named"),
    [
        ("kernels/sacl_kernels/x.py", "from sacl_fast.errors import UserError", "sacl_fast.errors"),
        ("kernels/sacl_kernels/x.py", "def f():\n    import numpy", "numpy"),
        ("sacl_fast/ops/x.py", "from sacl_kernels import x", "sacl_kernels.x"),
        ("sacl_fast/ops/x.py", "from sacl_fast import _C", "sacl_fast._C"),
        ("sacl_fast/ops/x.py", "from .. import losses", "sacl_fast.losses"),
        ("sacl_fast/losses.py", "import sacl_fast.engine.trainer", "sacl_fast.engine.trainer"),
        ("sacl_fast/losses.py", "def f():\n    from sacl_fast import _C", "sacl_fast._C"),
        ("sacl_fast/slim/x.py", "def f():\n    from sacl_fast.data import views", "sacl_fast.data"),
        ("sacl_fast/slim/x.py", "from sacl_fast.passes import RecordedEncoder", "sacl_fast.passes"),
        ("sacl_fast/passes/x.py", "from sacl_fast.encoders import Projector", "sacl_fast.encoders"),
        ("sacl_fast/encoders/x.py", "from ..evaluation.knn import knn", "sacl_fast.evaluation"),
        ("sacl_fast/optim/x.py", "from sacl_fast.cli import main", "sacl_fast.cli"),
        ("sacl_fast/data/views/x.py", "from sacl_fast.ops import backend", "sacl_fast.ops"),
        ("sacl_fast/data/images/x.py", "from sacl_fast.data.views.draw import f", "views.draw"),
        ("sacl_fast/data/images/x.py", "from ..loading import workers", "data.loading.workers"),
        ("sacl_fast/data/views/x.py", "from sacl_fast.data import images", "data.images"),
        ("sacl_fast/data/views/x.py", "def f():\n    from .. import loading", "data.loading"),
        ("sacl_fast/presets.py", "from sacl_fast.data.views import draw", "data.views.draw"),
        ("sacl_fast/data/views/tables.py", "import nvidia.dali.fn as fn", "nvidia.dali"),
        ("sacl_fast/data/loading/x.py", "def f():\n    from nvidia import dali", "nvidia.dali"),
        (
            "sacl_fast/data/images/x.py",
            "import importlib\nimportlib.import_module('nvidia.dali')",
            "dali",
        ),
        ("sacl_fast/engine/x.py", "from sacl_fast import cli", "sacl_fast.cli"),
        ("sacl_fast/engine/x.py", "from benchmarks import harness", "benchmarks.harness"),
        ("sacl_fast/cli.py", "from sacl_fast.engine import train", "sacl_fast.engine"),
        ("sacl_fast/cli.py", "import torch", "torch"),
        ("sacl_fast/config/run.py", "def f():\n    import torch", "torch"),
        ("sacl_fast/presets.py", "from torch import nn", "torch.nn"),
        ("sacl_fast/__init__.py", "from sacl_fast.losses import SaclXd", "sacl_fast.losses"),
        ("tests/test_x.py", "from benchmarks import harness", "benchmarks"),
        ("benchmarks/bench_x.py", "import tests.tolerances", "tests.tolerances"),
        ("sacl_fast/novel.py", "", "no rule"),
    ],
)
def test_a_violation_is_reported(path: str, source: str, named: str):
    (report,) = violations(source, PurePath(path))
    assert path in report
    assert named in report


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("kernels/sacl_kernels/x.py", "import math, torch\nimport triton.language as tl"),
        ("kernels/sacl_kernels/x.py", "from sacl_kernels.layout import Launch\nfrom . import y"),
        ("sacl_fast/ops/x.py", "def f():\n    from sacl_kernels import x\n    from .. import _C"),
        ("sacl_fast/losses.py", "import torch\nfrom sacl_fast import __version__, ops"),
        ("sacl_fast/data/views/dali_pipeline.py", "from nvidia.dali import fn, pipeline_def"),
        ("sacl_fast/data/views/x.py", "def f():\n    from sacl_fast.ops.augment import augment"),
        ("sacl_fast/data/views/x.py", "import numpy\nfrom .tables import VIEWS"),
        ("sacl_fast/data/loading/x.py", "from ..images.open import f\nfrom ..views import draw"),
        ("sacl_fast/cli.py", "import tyro\ndef main():\n    from sacl_fast.engine import train"),
        (
            "sacl_fast/cli.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import torch",
        ),
        ("tests/ops/test_x.py", "from tests.tolerances import TOLERANCES"),
    ],
)
def test_what_is_allowed_is_not_reported(path: str, source: str):
    assert violations(source, PurePath(path)) == []


@pytest.mark.parametrize("module", ["config", "presets", "cli"])
def test_the_command_line_answers_without_torch(module: str):
    """Held at run time too, since a package's __init__ can bring torch in by a side door."""
    code = f"import sys, sacl_fast.{module}; sys.exit('torch' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


def test_files_stay_short_or_say_why():
    """A file of more than 400 lines holds two subjects, or its first lines say why it does not."""
    kinds = ("*.py", "*.cpp", "*.cu", "*.h", "*.inl")
    folders = ("sacl_fast", "kernels", "csrc", "benchmarks", "examples", "tests")
    files = [f for folder in folders for kind in kinds for f in (ROOT / folder).rglob(kind)]
    assert len(files) > 200
    long = [f for f in files if f.read_text().count("\n") > 400]
    unexplained = [f for f in long if "400 lines" not in "\n".join(f.read_text().split("\n")[:20])]
    assert not unexplained, [str(f.relative_to(ROOT)) for f in unexplained]
