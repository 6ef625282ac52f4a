"""What a source of images is, and the sources that all kinds are made of.

A source is cheap to pickle and holds no Python object per image, so worker processes share its
memory.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import NamedTuple, Protocol, cast

import numpy as np
from PIL import Image

from sacl_fast.data.images.decode import decode_rgb, read_bytes


class Source(Protocol):
    """N images by index."""

    @property
    def classes(self) -> tuple[str, ...]:
        """Class names, () without labels."""
        ...

    @property
    def labels(self) -> np.ndarray:
        """(N,) int64 positions in ``classes``, all -1 without labels."""
        ...

    def __len__(self) -> int: ...

    @property
    def decoded(self) -> bool:
        """Whether ``read`` gives pixels."""
        ...

    def load(self, index: int) -> Image.Image:
        """The image, mode RGB. BadImage where it cannot be read."""
        ...

    def read(self, index: int) -> bytes | np.ndarray:
        """The image as it is kept: an encoded file, or pixels (H, W, 3) uint8. BadImage where it
        cannot be read; whether a file holds an image is not looked at."""
        ...

    def label(self, index: int) -> int: ...

    def name(self, index: int) -> str:
        """What to call the image in messages."""
        ...

    def identity(self, index: int) -> bytes:
        """What tells the image from another in its place, at the cost of a look at the file at
        most: its name within the data set and its size, or its pixels."""
        ...


class Packed(Source, Protocol):
    """A source whose images lie as pixels in one buffer, so that no image needs a call.

    Loaders then read ``pixels`` in place of calling ``read``, which is called for an image that
    cannot be read, to say why. ``check(indices)``, where there is one, raises BadImage if one of
    those images is damaged.
    """

    @property
    def pixels(self) -> np.ndarray:
        """(bytes,) uint8; may be a memory map."""
        ...

    @property
    def placement(self) -> np.ndarray:
        """(N, 3) int64: where in ``pixels`` an image begins, its height and width; 0, 0, 0 where
        ``read`` raises BadImage."""
        ...


def as_packed(source: Source) -> Packed | None:
    """``source``, if it is packed."""
    packed = hasattr(source, "pixels") and hasattr(source, "placement")
    return cast(Packed, source) if packed else None


class Splits(NamedTuple):
    train: Source
    val: Source | None


class ArraySource:
    """Images in memory: ``images`` (N, H, W, 3) uint8, called ``title[index]``. A subclass in which
    ``read`` gives something else has to change ``pixels``, too."""

    decoded = True

    def __init__(
        self, title: str, images: np.ndarray, labels: Sequence[int] | np.ndarray, classes: tuple
    ) -> None:
        self.title, self.images, self.classes = title, images, classes
        self.labels = np.asarray(labels, np.int64) if classes else np.full(len(images), -1)

    def __len__(self) -> int:
        return len(self.images)

    def load(self, index: int) -> Image.Image:
        return Image.fromarray(self.images[index])

    def read(self, index: int) -> np.ndarray:
        return self.images[index]

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return f"{self.title}[{index}]"

    def identity(self, index: int) -> bytes:
        return self.images[index].tobytes()

    @property
    def pixels(self) -> np.ndarray:
        """(bytes,) uint8: all images, end to end."""
        return self.images.reshape(-1)

    @property
    def placement(self) -> np.ndarray:
        """(N, 3) int64: where an image lies in ``pixels``, its height and width."""
        count, height, width, channels = self.images.shape
        placement = np.empty((count, 3), np.int64)
        placement[:, 0] = np.arange(count) * (height * width * channels)
        placement[:, 1:] = height, width
        return placement


class FileSource(ABC):
    """Encoded images with ``labels`` (N,) and class names, or without. A subclass says how many
    there are, what each is called and how it is told from another.

    Images of more than ``most`` bytes are unreadable.
    """

    decoded = False

    def __init__(self, labels: np.ndarray, classes: tuple[str, ...], most: int) -> None:
        self.labels, self.classes, self.most = labels, classes, most

    @abstractmethod
    def __len__(self) -> int: ...

    @abstractmethod
    def name(self, index: int) -> str: ...

    @abstractmethod
    def identity(self, index: int) -> bytes: ...

    def load(self, index: int) -> Image.Image:
        return decode_rgb(self.read(index))

    def read(self, index: int) -> bytes:
        """The file called ``name(index)``."""
        return read_bytes(self.name(index), self.most)

    def head(self, index: int, count: int) -> bytes:
        """Its first ``count`` bytes, or all."""
        return read_bytes(self.name(index), self.most, first=count)

    def label(self, index: int) -> int:
        return int(self.labels[index])


class Subset:
    """The images of ``source`` at ``indices`` (M,)."""

    def __init__(self, source: Source, indices: np.ndarray) -> None:
        self.source, self.indices = source, indices
        self.classes, self.labels = source.classes, source.labels[indices]
        self.decoded = source.decoded

    def __len__(self) -> int:
        return len(self.indices)

    def load(self, index: int) -> Image.Image:
        return self.source.load(self.indices[index])

    def read(self, index: int) -> bytes | np.ndarray:
        return self.source.read(self.indices[index])

    def label(self, index: int) -> int:
        return int(self.labels[index])

    def name(self, index: int) -> str:
        return self.source.name(self.indices[index])

    def identity(self, index: int) -> bytes:
        return self.source.identity(self.indices[index])

    @property
    def pixels(self) -> np.ndarray:
        """Of the whole source, where it is packed; else there is no such attribute."""
        return self.source.pixels  # type: ignore[attr-defined]

    @property
    def placement(self) -> np.ndarray:
        return self.source.placement[self.indices]  # type: ignore[attr-defined]

    @property
    def check(self) -> Callable[[np.ndarray], None]:
        of_all = self.source.check  # type: ignore[attr-defined]
        return lambda indices: of_all(self.indices[indices])
