"""Each list of words stands once, in ``config/choices.py``."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
CHOICES = Path("sacl_fast/config/choices.py")


def lists_of_words(source: str) -> list[tuple[int, frozenset[str]]]:
    """Line and words of each ``Literal`` that has two words or more."""
    found = []
    for node in ast.walk(ast.parse(source)):
        match node:
            case ast.Subscript(value=ast.Name(id="Literal") | ast.Attribute(attr="Literal")):
                parts = node.slice.elts if isinstance(node.slice, ast.Tuple) else [node.slice]
                words = frozenset(
                    part.value
                    for part in parts
                    if isinstance(part, ast.Constant) and isinstance(part.value, str)
                )
                if len(words) > 1:
                    found.append((node.lineno, words))
    return found


def repeated(source: str, path: Path, choices: str) -> list[str]:
    """A line for each ``Literal`` in `source` all of whose words are of one in `choices`."""
    listed = [words for _, words in lists_of_words(choices)]
    return [
        f"{path}:{line}: {', '.join(sorted(words))}: a choice of {CHOICES}, or a part of one; "
        "import it, or give the part a name there"
        for line, words in lists_of_words(source)
        if any(words <= known for known in listed)
    ]


def test_no_module_repeats_a_choice():
    choices = (ROOT / CHOICES).read_text()
    files = sorted(f for f in (ROOT / "sacl_fast").rglob("*.py") if f != ROOT / CHOICES)
    assert len(files) > 10 and len(lists_of_words(choices)) > 10
    found = [line for f in files for line in repeated(f.read_text(), f.relative_to(ROOT), choices)]
    assert not found, "\n" + "\n".join(found)


def test_no_choice_is_listed_twice():
    listed = [words for _, words in lists_of_words((ROOT / CHOICES).read_text())]
    assert not [words for i, words in enumerate(listed) if words in listed[:i]]


def test_a_repetition_is_reported():
    choices = 'Mode = Literal["mask", "skip"]\nModeSetting = Literal["auto", Mode]\n'
    choices += 'Backend = Literal["auto", "torch", "cpu"]\n'
    copy = 'import typing\nMode = typing.Literal["skip", "mask"]'
    (report,) = repeated(copy, Path("sacl_fast/x.py"), choices)
    assert report.startswith("sacl_fast/x.py:2: mask, skip:")
    part = 'def f(backend: Literal["torch", "cpu"] = "cpu"): ...'
    (report,) = repeated(part, Path("sacl_fast/x.py"), choices)
    assert report.startswith("sacl_fast/x.py:1: cpu, torch:")
    for own in ('Literal["dense", Mode]', 'Literal["read", "write"]', 'Literal["auto", "gram"]'):
        assert not repeated(own, Path("sacl_fast/x.py"), choices)
