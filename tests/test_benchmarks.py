"""What the benchmarks write: a re-measured row changes one line of a file of results."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import bench_formats
import pytest

from sacl_fast.bench.figures import one_row_a_line, write_json

RESULTS = sorted((Path(__file__).resolve().parent.parent / "benchmarks/results").glob("*.json"))


def result(row_of_two: float) -> dict[str, Any]:
    return {
        "benchmark": "bench_x",
        "sizes": [1, 2],
        "rows": [{"n": 1, "ms": {"p20": 0.1, "p50": 0.2}}, {"n": 2, "ms": {"p20": row_of_two}}],
        "means": {"forward": {"p20": 1.5}, "backward": None},
        "nothing": [],
        "no more": {},
    }


def test_a_field_and_a_row_have_a_line_each():
    assert one_row_a_line(result(0.3)).splitlines() == [
        "{",
        '  "benchmark": "bench_x",',
        '  "sizes": [1, 2],',
        '  "rows": [',
        '    {"n": 1, "ms": {"p20": 0.1, "p50": 0.2}},',
        '    {"n": 2, "ms": {"p20": 0.3}}',
        "  ],",
        '  "means": {',
        '    "forward": {"p20": 1.5},',
        '    "backward": null',
        "  },",
        '  "nothing": [],',
        '  "no more": {}',
        "}",
    ]


def test_a_row_that_is_measured_anew_changes_its_line_alone():
    before, after = (one_row_a_line(result(ms)).splitlines() for ms in (0.3, 0.4))
    assert [new for old, new in zip(before, after, strict=True) if old != new] == [
        '    {"n": 2, "ms": {"p20": 0.4}}'
    ]


def test_what_is_written_is_read_again(tmp_path: Path):
    path = tmp_path / "new folder/result.json"
    write_json(path, {**result(0.3), "json": path})
    read = json.loads(path.read_text())
    assert {name: read[name] for name in result(0.3)} == result(0.3)
    assert read["json"] == str(path)
    assert read["processor"] and read["threads"] > 0 and read["environment"]["torch"]


def test_formats_hold_the_images_that_are_read_from_them(tmp_path: Path):
    """``row_of`` reads some back; a format without its package is left out, which is told."""
    images = bench_formats.random_images(5, 3, 40)
    none = bench_formats.FORMATS[0]._replace(name="none", package="no_such_package")
    result = bench_formats.measure(images, [*bench_formats.FORMATS, none], tmp_path, rounds=1)
    *rows, missing = result["rows"]
    assert missing == {"name": "none", "missing": "no_such_package is not installed"}
    assert {row["name"] for row in rows if "memory" in row} >= {"memory map"}
    pixels = sum(image.nbytes for image in images)
    assert all(row["file_bytes"] >= pixels and row["disk"] > 0 for row in rows if "disk" in row)


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.stem)
def test_results_have_one_row_a_line(path: Path):
    text = path.read_text()
    assert text == one_row_a_line(json.loads(text))
