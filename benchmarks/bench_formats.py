"""Random reads of decoded images from the file of a cache, and from formats that could hold them.

    python benchmarks/bench_formats.py --json benchmarks/results/cache_formats_cpu.json

Images of random pixels (no row compresses, so what they show does not matter) are written in each
format. One thread reads all of them once in random order, as an array (height, width, 3), and
touches every cache line (64 bytes) of it: from memory, where the file was read before, in the time
that the processor works (all threads, user and system mode, so that other work on the machine does
not count), and from the disk, of which the system was asked to forget it, by the clock. A round
opens the file anew; rounds of all rows take turns, and of each the best counts. A format whose
package is missing is left out, which the table says.
"""

from __future__ import annotations

import argparse
import importlib
import importlib.metadata
import importlib.util
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from sacl_fast.bench.figures import write_json
from sacl_fast.caching.make import make_cache
from sacl_fast.config import DataConfig
from sacl_fast.config.cache import CacheConfig
from sacl_fast.data.images.given import GivenSource
from sacl_fast.data.images.pixel_file import PixelFile
from sacl_fast.data.images.pixel_format import START
from sacl_fast.data.images.source import Splits

Images = Sequence[np.ndarray]  # each (H, W, 3) uint8
Read = Callable[[int], np.ndarray]
_CHUNK = 2**19  # bytes, of zarr


class Format(NamedTuple):
    name: str
    write: Callable[[Path, Images], None]
    open: Callable[[Path, Images], Read]
    """What reads an image; of the images, sizes and places alone are asked for."""
    package: str | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--images", type=int, default=300)
    parser.add_argument("--sides", type=int, nargs=2, default=(320, 480), help="least, most px")
    parser.add_argument("--rounds", type=int, default=5, help="turns of every row; the best counts")
    parser.add_argument("--folder", type=Path, help="on the disk to measure (default: temporary)")
    parser.add_argument("--json", type=Path, help="write the figures here")
    own = parser.parse_args()
    images = random_images(own.images, *own.sides)
    with tempfile.TemporaryDirectory(dir=own.folder) as folder:
        result = measure(images, FORMATS, Path(folder), own.rounds)
    print_table(result)
    if own.json:
        write_json(own.json, result)


def random_images(count: int, least: int, most: int) -> Images:
    rng = np.random.default_rng(0)
    sides = rng.integers(least, most, (count, 2), endpoint=True)
    return [rng.integers(0, 256, (height, width, 3), np.uint8) for height, width in sides]


def measure(images: Images, formats: Sequence[Format], folder: Path, rounds: int) -> dict[str, Any]:
    """Images per second of each format: all rounds, and the best of them."""
    rows = {form.name: row_of(form, images, folder) for form in formats}
    there = [form for form in formats if "missing" not in rows[form.name]]
    orders = np.random.default_rng(1)
    for _ in range(rounds):
        for form in there:
            order = orders.permutation(len(images)).tolist()
            for place in ("disk", "memory"):  # which the first leaves it in
                if place == "disk":
                    forget(folder / form.name)
                read = form.open(folder / form.name, images)
                clock = time.perf_counter if place == "disk" else time.process_time
                rows[form.name][f"{place}_rounds"].append(per_second(read, order, clock))
                del read  # and the file, which would be kept in memory while it is mapped
    for row in rows.values():
        for place in ("memory", "disk"):
            if values := row.get(f"{place}_rounds"):
                row[place] = round(max(values))
    packages = sorted({form.package for form in there if form.package} | {"numpy"})
    return {
        "benchmark": "bench_formats",
        "images": len(images),
        "bytes": sum(image.nbytes for image in images),
        "kilobytes_of_an_image": [
            round(size(image.nbytes for image in images) / 1e3) for size in (min, max)
        ],
        "rounds": rounds,
        "unit": "images per second: in memory of processor time, from disk by the clock",
        "versions": {name: importlib.metadata.version(name) for name in packages},
        "rows": list(rows.values()),
    }


def row_of(form: Format, images: Images, folder: Path) -> dict[str, Any]:
    """What is known of a format before it is timed: that it holds the images, and in how much."""
    if form.package and importlib.util.find_spec(form.package) is None:
        return {"name": form.name, "missing": f"{form.package} is not installed"}
    path = folder / form.name
    form.write(path, images)
    read = form.open(path, images)
    for index in (0, len(images) // 2, len(images) - 1):
        assert np.array_equal(read(index), images[index]), (form.name, index)
    size = sum(file.stat().st_size for file in files_of(path))
    return {"name": form.name, "file_bytes": size, "memory_rounds": [], "disk_rounds": []}


def per_second(read: Read, order: Sequence[int], clock: Callable[[], float]) -> float:
    start, touched = clock(), 0
    for index in order:
        touched += int(read(index).reshape(-1)[::64].sum())
    assert touched
    return round(len(order) / (clock() - start), 1)


def forget(path: Path) -> None:
    """Have the system drop what it keeps of a file, or of a folder's files, in memory."""
    for file in files_of(path):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)


def files_of(path: Path) -> list[Path]:
    return [file for file in path.rglob("*") if file.is_file()] if path.is_dir() else [path]


def print_table(result: dict[str, Any]) -> None:
    print(f"| {result['images']} images, images/s | in memory | from disk |\n|---|---|---|")
    for row in result["rows"]:
        if "missing" in row:
            print(f"| {row['name']} | left out: {row['missing']} | |")
        else:
            print(f"| {row['name']} | {row['memory']:,} | {row['disk']:,} |")


# --- the formats ----------------------------------------------------------------------------------


def ends_of(images: Images) -> np.ndarray:
    """(N + 1,): where images begin that lie end to end."""
    return np.concatenate([[0], np.cumsum([image.nbytes for image in images])])


def write_cache(path: Path, images: Images) -> None:
    config = CacheConfig(data=DataConfig(workers=0))
    make_cache(Splits(GivenSource(images, "images"), None), path, config, quiet=True)


def open_map(path: Path, _: Images) -> Read:
    source = PixelFile(path)

    def read(index: int) -> np.ndarray:
        offset, height, width = source.placement[index].tolist()
        return source.pixels[offset : offset + height * width * 3].reshape(height, width, 3)

    return read


def open_by_calls(path: Path, _: Images) -> Read:
    """The same file, by a call of the system for each image."""
    placement, file = PixelFile(path).placement, path.open("rb", buffering=0)

    def read(index: int) -> np.ndarray:
        offset, height, width = placement[index].tolist()
        pixels = np.empty((height, width, 3), np.uint8)
        got = os.preadv(file.fileno(), [pixels.reshape(-1).data], START + offset)
        assert got == pixels.nbytes
        return pixels

    return read


def write_safetensors(path: Path, images: Images) -> None:
    from safetensors.numpy import save_file

    save_file({f"{index:08}": image for index, image in enumerate(images)}, path)


def open_safetensors(path: Path, _: Images) -> Read:
    from safetensors import safe_open

    file = safe_open(path, "numpy")
    return lambda index: file.get_tensor(f"{index:08}")


def arrow_batches(images: Images, at_once: int) -> Iterator[Any]:
    """Record batches of a column of bytes; sizes are known without."""
    import pyarrow

    for start in range(0, len(images), at_once):
        some = [image.tobytes() for image in images[start : start + at_once]]
        yield pyarrow.record_batch([pyarrow.array(some, pyarrow.large_binary())], ["pixels"])


def write_arrow(at_once: int) -> Callable[[Path, Images], None]:
    def write(path: Path, images: Images) -> None:
        import pyarrow

        schema = pyarrow.schema([("pixels", pyarrow.large_binary())])
        with pyarrow.ipc.new_file(str(path), schema) as file:
            for batch in arrow_batches(images, at_once):
                file.write(batch)

    return write


def open_arrow(at_once: int) -> Callable[[Path, Images], Read]:
    def open_file(path: Path, images: Images) -> Read:
        import pyarrow

        file = pyarrow.ipc.open_file(pyarrow.memory_map(str(path)))

        def read(index: int) -> np.ndarray:
            column = file.get_batch(index // at_once).column(0)
            return from_bytes(column[index % at_once].as_buffer(), images[index].shape)

        return read

    return open_file


def write_parquet(at_once: int) -> Callable[[Path, Images], None]:
    def write(path: Path, images: Images) -> None:
        import pyarrow
        from pyarrow import parquet

        schema = pyarrow.schema([("pixels", pyarrow.large_binary())])
        options: Any = {"compression": "none", "use_dictionary": False, "write_statistics": False}
        with parquet.ParquetWriter(path, schema, **options) as file:
            for batch in arrow_batches(images, at_once):
                file.write_batch(batch, row_group_size=at_once)

    return write


def open_parquet(at_once: int) -> Callable[[Path, Images], Read]:
    def open_file(path: Path, images: Images) -> Read:
        from pyarrow import parquet

        file = parquet.ParquetFile(path, memory_map=True)

        def read(index: int) -> np.ndarray:
            column = file.read_row_group(index // at_once, use_threads=False).column(0)
            return from_bytes(column[index % at_once].as_buffer(), images[index].shape)

        return read

    return open_file


def write_hdf5(path: Path, images: Images) -> None:
    h5py = importlib.import_module("h5py")
    ends = ends_of(images)
    with h5py.File(path, "w") as file:
        pixels = file.create_dataset("pixels", (int(ends[-1]),), "u1")
        for image, start in zip(images, ends.tolist(), strict=False):
            pixels[start : start + image.nbytes] = image.reshape(-1)


def open_hdf5(path: Path, images: Images) -> Read:
    return open_slices(importlib.import_module("h5py").File(path)["pixels"], images)


def write_zarr(path: Path, images: Images) -> None:
    zarr = importlib.import_module("zarr")
    whole = np.concatenate([image.reshape(-1) for image in images])
    chunks = (min(_CHUNK, len(whole)),)
    zarr.create_array(str(path), data=whole, chunks=chunks, compressors=None)


def open_zarr(path: Path, images: Images) -> Read:
    return open_slices(importlib.import_module("zarr").open_array(str(path), mode="r"), images)


def open_slices(pixels: Any, images: Images) -> Read:
    """Of one array of bytes, images end to end."""
    ends = ends_of(images).tolist()
    return lambda index: pixels[ends[index] : ends[index + 1]].reshape(images[index].shape)


def from_bytes(buffer: Any, shape: tuple[int, ...]) -> np.ndarray:
    return np.frombuffer(buffer, np.uint8).reshape(shape)


FORMATS = (
    Format("memory map", write_cache, open_map),
    Format("the same file by preadv", write_cache, open_by_calls),
    Format("safetensors, a tensor an image", write_safetensors, open_safetensors, "safetensors"),
    Format("Arrow IPC, a batch an image", write_arrow(1), open_arrow(1), "pyarrow"),
    Format("Arrow IPC, 32 images a batch", write_arrow(32), open_arrow(32), "pyarrow"),
    Format("Parquet, a row group an image", write_parquet(1), open_parquet(1), "pyarrow"),
    Format("Parquet, 32 images a row group", write_parquet(32), open_parquet(32), "pyarrow"),
    Format("HDF5, one array of bytes", write_hdf5, open_hdf5, "h5py"),
    Format("zarr, chunks of 512 KB", write_zarr, open_zarr, "zarr"),
)


if __name__ == "__main__":
    main()
