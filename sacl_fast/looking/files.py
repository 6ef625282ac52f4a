"""Features as a file: ``.npz`` for numpy, ``.parquet`` for pandas, polars and the like.

==============  ==================================  =============================================
                .npz (``numpy.load``)               .parquet
==============  ==================================  =============================================
features        (N, F) float32                      a fixed-size list of float32 in each row
labels          (N,) int64, -1: none                int64, null: none
class names     ``classes`` (C,)                    ``class`` in each row
names           (N,) text                           text
split           (N,) text, ``train`` or ``val``     text
settings        ``metadata``, JSON                  ``sacl_fast`` in the schema's metadata, JSON
==============  ==================================  =============================================

A file is written whole or not at all, and some rows at a time.
"""

from __future__ import annotations

import io
import json
import zipfile
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from sacl_fast import _version
from sacl_fast.errors import UserError, reason_of
from sacl_fast.files import whole_file
from sacl_fast.looking.features import SPLITS, Features
from sacl_fast.output import plain_text

_ROWS = 4096  # of a Parquet row group
_SETTINGS = 2**24  # bytes at most


def check_writable(path: Path) -> None:
    """Raise UserError where what the kind of file needs is not installed."""
    if path.suffix == ".parquet":
        _pyarrow(path)


def write_features(found: Features, path: Path) -> None:
    """Write the features as the kind of file that the name says.

    Raises:
        UserError: it cannot be written; what was at ``path`` is as it was.
    """
    write = _write_parquet if path.suffix == ".parquet" else _write_npz
    try:
        with whole_file(path) as file:
            write(found, file, path)
    except OSError as error:
        raise UserError(
            f"cannot write {path}: {reason_of(error)}; --out names another file"
        ) from error


def said_of(path: Path) -> dict[str, Any] | None:
    """The settings in an ``.npz`` file of ours; None of any other file.

    Raises:
        OSError: it cannot be read.
    """
    try:
        with zipfile.ZipFile(path) as packed:
            if packed.getinfo("metadata.npy").file_size > _SETTINGS:
                return None
            with packed.open("metadata.npy") as member:
                said = json.loads(str(np.lib.format.read_array(member)))
    except OSError:
        raise
    except Exception:  # whatever zipfile, zlib and numpy raise on files of others
        return None
    return said if isinstance(said, dict) and "sacl_fast" in said else None


def _metadata(found: Features) -> str:
    return json.dumps({**found.settings, "sacl_fast": _version.__version__})


# --- npz ------------------------------------------------------------------------------------------


def _write_npz(found: Features, file: BinaryIO, path: Path) -> None:
    splits = np.array(SPLITS)[found.splits]
    classes = np.array(found.classes, str) if found.classes else np.zeros(0, "<U1")
    longest = max(len(found.name(i)) for i in range(len(found)))
    text = np.dtype(f"<U{max(1, longest)}")
    with zipfile.ZipFile(file, "w", zipfile.ZIP_STORED, allowZip64=True) as packed:
        _member(packed, "features", found.features.shape, np.dtype("<f4"), found.chunks())
        _member(packed, "labels", found.labels.shape, np.dtype("<i8"), iter([found.labels]))
        _member(packed, "split", splits.shape, splits.dtype, iter([splits]))
        _member(packed, "names", (len(found),), text, _names(found, text), compressed=True)
        _member(packed, "classes", classes.shape, classes.dtype, iter([classes]))
        metadata = np.array(_metadata(found))
        _member(packed, "metadata", (), metadata.dtype, iter([metadata]))


def _member(
    packed: zipfile.ZipFile,
    name: str,
    shape: tuple[int, ...],
    dtype: np.dtype[Any],
    parts: Iterator[np.ndarray],
    *,
    compressed: bool = False,
) -> None:
    entry = zipfile.ZipInfo(f"{name}.npy")
    entry.compress_type = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    head = io.BytesIO()
    described = {"descr": dtype.str, "fortran_order": False, "shape": shape}
    np.lib.format.write_array_header_2_0(head, described)
    with packed.open(entry, "w", force_zip64=True) as member:
        member.write(head.getvalue())
        for part in parts:
            member.write(np.ascontiguousarray(part, dtype).tobytes())


def _names(found: Features, text: np.dtype[Any]) -> Iterator[np.ndarray]:
    for start in range(0, len(found), _ROWS):
        rows = range(start, min(start + _ROWS, len(found)))
        yield np.array([found.name(i) for i in rows], text)


# --- Parquet --------------------------------------------------------------------------------------


def _write_parquet(found: Features, file: BinaryIO, path: Path) -> None:
    arrow, parquet = _pyarrow(path)
    dims = found.features.shape[1]
    schema = arrow.schema(
        [
            ("name", arrow.string()),
            ("split", arrow.string()),
            ("label", arrow.int64()),
            ("class", arrow.string()),
            ("feature", arrow.list_(arrow.float32(), dims)),
        ],
        metadata={"sacl_fast": _metadata(found)},
    )
    classes = [plain_text(name) for name in found.classes]
    with parquet.ParquetWriter(file, schema) as writer:
        for start in range(0, len(found), _ROWS):
            rows = range(start, min(start + _ROWS, len(found)))
            labels = [int(label) if label >= 0 else None for label in found.labels[rows]]
            numbers = arrow.array(np.array(found.features[rows.start : rows.stop]).ravel())
            columns = [
                arrow.array([plain_text(found.name(i)) for i in rows], arrow.string()),
                arrow.array([SPLITS[found.splits[i]] for i in rows], arrow.string()),
                arrow.array(labels, arrow.int64()),
                arrow.array([None if k is None else classes[k] for k in labels], arrow.string()),
                arrow.FixedSizeListArray.from_arrays(numbers, dims),
            ]
            writer.write_table(arrow.table(columns, schema=schema))


def _pyarrow(path: Path) -> tuple[Any, Any]:
    try:
        return import_module("pyarrow"), import_module("pyarrow.parquet")
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "pyarrow":
            raise
        raise UserError(
            f"{path.name} needs pyarrow, which is not installed; pip install "
            "'sacl-fast[features]' installs it, and a name in .npz works without"
        ) from None
