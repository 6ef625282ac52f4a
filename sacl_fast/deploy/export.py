"""From a run to files that run without it: written, run again, compared, and only then kept."""

from __future__ import annotations

import contextlib
import logging
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sacl_fast.checks import check
from sacl_fast.config import Config, DataConfig
from sacl_fast.config.choices import ExportFormat
from sacl_fast.data.images.given import Given, refuse_both
from sacl_fast.data.images.root import refuse_among_images
from sacl_fast.deploy.card import model_card
from sacl_fast.deploy.check import latency, parity, rounding_of
from sacl_fast.deploy.formats import FORMATS, Content, check_packages
from sacl_fast.deploy.graph import REFUSALS, NotRunHere, Runner
from sacl_fast.deploy.images import RunImages, open_images
from sacl_fast.deploy.network import (
    Batches,
    Network,
    check_ratio,
    make_network,
    needs_images,
    read_widths,
)
from sacl_fast.deploy.result import Exported, ExportResult
from sacl_fast.errors import UserError, reason_and_remedy, reason_of
from sacl_fast.evaluation.trained import Trained, Width, open_trained
from sacl_fast.files import kind_of, user_path, whole_file
from sacl_fast.slim.export import cost

logger = logging.getLogger(__name__)

CARD = "MODEL_CARD.md"
_COMPARED = 64  # images


class NotKept(UserError):
    """Some files could not be made or did not give the encoder's features; the others are there."""

    def __init__(self, result: ExportResult) -> None:
        super().__init__(
            f"not kept: {'; '.join(result.refused)}. The other files are in {result.folder}"
        )
        self.result = result


@dataclass(frozen=True)
class _Options:
    fold_norm: bool
    int8: bool
    knn: bool


def export(
    path: str | os.PathLike[str] | Trained,
    out: str | os.PathLike[str],
    widths: Iterable[str | float] = ("dense",),
    formats: Iterable[str] = ("timm",),
    *,
    fold_norm: bool = False,
    int8: bool = False,
    knn: bool = False,
    data: DataConfig | None = None,
    source: Any = None,
    val: Any = None,
) -> ExportResult:
    """Write the encoder of a run into a new folder, at several widths and in several formats.

    Each file is loaded again and compared with the encoder on the run's images, or on random ones
    where those are not at hand.

    Args:
        path: a run folder, a checkpoint, an encoder's file, or one of these opened.
        out: the folder; there is none yet, or it is empty.
        widths: ``dense``; ``slim``, at the ratio it was trained with; a ratio in (0, 1], with
            filters chosen and batch-norm statistics estimated anew.
        formats: ``timm`` (weights as safetensors), ``onnx``, ``torch-export``; ``executorch``,
            ``litert`` and ``coreml``, of one image.
        fold_norm: graphs take images scaled to 0..1 and normalise them themselves.
        int8: each ONNX, ExecuTorch and LiteRT file in int8, too.
        knn: measure the kNN accuracy of each file, which takes labels.
        data: the images, where they are not those of the run's configuration.
        source, val: the images as ``sacl_fast.train`` takes them, in their place.

    Raises:
        NotKept: a UserError; some files could not be made, or do not give the encoder's features.
            The others are there.
        UserError: what is asked for cannot be done, or no file holds; nothing is left.
    """
    chosen = _read_formats(formats)
    ratios = read_widths([widths] if isinstance(widths, str) else widths)
    options = _Options(*(check(v, bool, n) for v, n in (
        (fold_norm, "fold_norm"), (int8, "int8"), (knn, "knn"))))  # fmt: skip
    _check_options(chosen, options)
    check_packages(chosen)
    given = Given(source, val)
    refuse_both(data, given)
    folder = _free_folder(out)
    trained = path if isinstance(path, Trained) else open_trained(path)
    for width in ratios:
        if isinstance(width, str):
            trained.check_width(width)
        elif width < 1:
            check_ratio(trained)
    config = trained.config if data is None else _with_data(trained, data)
    needed_for = (
        "--knn" if knn
        else "--int8" if int8
        else "estimating batch-norm statistics" if needs_images(trained, ratios)
        else None
    )  # fmt: skip
    if source is None:
        refuse_among_images(folder, config.data, "a folder elsewhere works")
    asked = data is not None or source is not None
    images = open_images(
        config,
        known=trained.has_data or asked,
        needed_for=needed_for,
        asked=asked,
        given=given,
        others=source is not None or not _are_same(trained, config.data),
    )
    if knn and (images is None or images.classes < 2):
        raise UserError(
            "--knn needs images of two classes or more; these have no labels or one class only"
        )
    with _new_folder(folder) as written:
        result = _Export(trained, images, options, folder, written).write(ratios, chosen)
    if result.refused:
        raise NotKept(result)
    return result


class _Export:
    """One call of ``export``, and what its files have in common."""

    def __init__(
        self,
        trained: Trained,
        images: RunImages | None,
        options: _Options,
        folder: Path,
        written: Path,
    ) -> None:
        self.trained, self.images, self.options = trained, images, options
        self.folder, self.written = folder, written
        self.batches: Batches | None = images.training_batches if images is not None else None
        self.refused: list[str] = []
        if images is not None:
            self.compared = images.some(_COMPARED)
            whose = "the images given" if images.others else "the run's images"
            self.compared_with = f"{len(self.compared)} of {whose}"
        else:
            size, generator = trained.size, torch.Generator().manual_seed(0)
            self.compared = torch.randn(8, 3, size, size, generator=generator)
            self.compared_with = f"{len(self.compared)} random images"
        self.views = trained.config.views

    def write(
        self, widths: Iterable[Width | float], formats: Iterable[ExportFormat]
    ) -> ExportResult:
        rows = [self._in_torch()]
        for width in widths:
            network = make_network(self.trained, width, self.batches)
            with torch.no_grad():
                features = network.reference(self.compared)
            for name in formats:
                rows += self._file(network, name, features)
        if len(rows) == 1:
            raise UserError(f"nothing was exported: {'; '.join(self.refused)}")
        result = ExportResult(
            self.folder,
            tuple(rows),
            self.compared_with,
            torch.get_num_threads(),
            tuple(self.refused),
        )
        card = model_card(self.trained, result, fold_norm=self.options.fold_norm)
        self._write(CARD, card.encode())
        return result

    def _in_torch(self) -> Exported:
        """The full-size encoder in PyTorch, for the others to be held against."""
        width = self.trained.widths[0]
        encoder = self.trained.encoder
        if self.batches is not None or not needs_images(self.trained, (width,)):
            encoder = make_network(self.trained, width, self.batches).reference
        return Exported(
            name=f"{width}, in PyTorch",
            width=width,
            format="torch",
            size=sum(value.nbytes for value in encoder.state_dict().values()),
            milliseconds=latency(encoder, self.compared[:1]),
            knn=self._knn(encoder),
            **cost(encoder, self.trained.size)._asdict(),
        )

    def _file(self, network: Network, name: ExportFormat, features: Tensor) -> Iterator[Exported]:
        """The file of a network in one format and, where that is asked for, in int8."""
        form = FORMATS[name]
        file = f"encoder_{network.width}{form.suffix}"
        folded = self.options.fold_norm and form.is_graph
        if self._made(file, lambda: form.content(network, folded)):
            yield from self._kept(network, name, file, features, folded)
        whole, to_int8 = self.written / file, form.int8
        if self.options.int8 and to_int8 is not None and whole.exists():
            assert self.batches is not None
            batches = (self._as_taken(images, folded) for images in self.batches())
            smaller = f"encoder_{network.width}_int8{form.suffix}"
            if self._made(smaller, lambda: to_int8(network, folded, whole, batches)):
                yield from self._kept(network, name, smaller, features, folded, int8=True)

    def _made(self, file: str, content: Callable[[], Content]) -> bool:
        """Write a file, unless it cannot be made."""
        logger.info("writing %s", file)
        try:
            made = content()
        except UserError as error:
            self.refused.append(f"{file}: {error}")
            return False
        self._write(file, made)
        return True

    def _kept(
        self,
        network: Network,
        name: ExportFormat,
        file: str,
        features: Tensor,
        folded: bool,
        *,
        int8: bool = False,
    ) -> Iterator[Exported]:
        """The row of a file that holds; one that does not is removed."""
        logger.info("running %s, and comparing its features", file)
        written = self.written / file
        about = {
            "name": file,
            "width": network.width,
            "format": f"{name} int8" if int8 else name,
            "size": _size(written),
            **cost(network.module, network.size)._asdict(),
        }

        def run(images: Tensor) -> Tensor:
            return load(self._as_taken(images, folded))

        rounding = None
        try:
            load = FORMATS[name].load(written)
            found = parity(run, self.compared, features)
            if not int8 and found.obstacle() is not None:
                rounding = rounding_of(network.reference, self.compared, features)
        except NotRunHere as needed:
            yield Exported(**about, milliseconds=None, not_run=str(needed))
            return
        except REFUSALS as error:
            known = isinstance(error, UserError)
            self._refuse(file, f": {error if known else f'it cannot be run: {reason_of(error)}'}")
            return
        if (obstacle := found.obstacle(int8=int8, rounding=rounding)) is not None:
            self._refuse(file, f", whose features differ from the encoder's by {obstacle}")
            return
        yield Exported(
            **about,
            milliseconds=latency(load, self._as_taken(self.compared[:1], folded)),
            parity=found,
            rounding=None if rounding is None else rounding.difference,
            knn=self._knn(run),
        )

    def _refuse(self, file: str, why: str) -> None:
        written = self.written / file
        written.unlink() if written.is_file() else shutil.rmtree(written)
        self.refused.append(f"{file}{why}")

    def _as_taken(self, images: Tensor, folded: bool) -> Tensor:
        """Normalised images as a file takes them."""
        if not folded:
            return images
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in (self.views.mean, self.views.std))
        return images * std + mean

    def _knn(self, run: Runner) -> float | None:
        if not self.options.knn or self.images is None:
            return None
        return self.images.knn(run)

    def _write(self, name: str, content: Content) -> None:
        files = {"": content} if isinstance(content, bytes) else content
        try:
            for part, data in files.items():
                path = self.written / name / part
                path.parent.mkdir(parents=True, exist_ok=True)
                with whole_file(path) as file:
                    file.write(data)
        except OSError as error:
            raise UserError(
                f"cannot write {self.folder / name}: {reason_and_remedy(error)}"
            ) from error


def _read_formats(formats: Iterable[str]) -> tuple[ExportFormat, ...]:
    given = [formats] if isinstance(formats, str) else list(formats)
    named = ["timm" if name == "safetensors" else name for name in given]
    if not named:
        raise UserError(f"no format is given; {', '.join(FORMATS)} work")
    return tuple(dict.fromkeys(check(name, ExportFormat, "format") for name in named))


def _check_options(formats: Iterable[ExportFormat], options: _Options) -> None:
    if options.fold_norm and not any(FORMATS[name].is_graph for name in formats):
        graphs = ", ".join(name for name, form in FORMATS.items() if form.is_graph)
        raise UserError(
            f"--fold-norm is of graphs, and format timm holds weights alone; {graphs} work"
        )
    if options.int8 and not any(FORMATS[name].int8 for name in formats):
        smaller = ", ".join(name for name, form in FORMATS.items() if form.int8)
        raise UserError(f"--int8 is of the formats {smaller}, and not of {', '.join(formats)}")


def _size(path: Path) -> int:
    """Bytes of a file, or of all files in a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def _are_same(trained: Trained, data: DataConfig) -> bool:
    """Whether they are the images that it was trained on, as far as their names tell."""
    own = trained.config.data
    return trained.has_data and (data.source, data.root) == (own.source, own.root)


def _with_data(trained: Trained, data: DataConfig) -> Config:
    return replace(trained.config, data=data)


def _free_folder(out: str | os.PathLike[str]) -> Path:
    folder = Path(os.path.abspath(user_path(out, "OUT")))
    kind = kind_of(folder)
    try:
        if kind is not None and (kind != "folder" or any(folder.iterdir())):
            raise UserError(f"{folder} exists; the name of a new folder works")
    except OSError as error:
        raise UserError(f"cannot look into {folder}: {reason_and_remedy(error)}") from None
    return folder


@contextlib.contextmanager
def _new_folder(folder: Path) -> Iterator[Path]:
    """A folder that appears as ``folder`` with all that was written into it, or not at all."""
    temporary = folder.with_name(f".{folder.name[:40]}.{secrets.token_hex(8)}.tmp")
    try:
        temporary.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make folder {folder}: {reason_and_remedy(error)}") from None
    try:
        yield temporary
        try:
            os.rename(temporary, folder)
        except OSError as error:
            raise UserError(f"cannot make folder {folder}: {reason_and_remedy(error)}") from None
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
