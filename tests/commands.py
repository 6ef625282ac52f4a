"""The command, called in the process of the test."""

from __future__ import annotations

import pytest

from sacl_fast.cli import main


def said(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """What a command prints that ends well."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 0, capsys.readouterr().err
    return capsys.readouterr().out


def refused(capsys: pytest.CaptureFixture[str], *args: object) -> str:
    """The one sentence with which a command refuses."""
    capsys.readouterr()
    assert main([str(arg) for arg in args]) == 2
    (line,) = [x for x in capsys.readouterr().err.splitlines() if x.startswith("sacl-fast:")]
    return line
