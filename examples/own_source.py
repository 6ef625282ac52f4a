"""Pre-training on images that only your code can read: any object with a length and items.

    python examples/own_source.py images.npy --epochs 100

Here: an array (N, H, W, 3) of uint8, memory-mapped, so it may be larger than memory. For a data
base, a video or a bucket, change ``__getitem__``. What is a list or a data set already, such as one
of Hugging Face's, needs no class: ``sacl_fast.train(config, source=dataset["train"])``.
"""

import argparse
import os
from pathlib import Path

import numpy as np

import sacl_fast
from sacl_fast.config import Config, EncoderConfig, ViewsConfig


class NumpyImages:
    """Images of a ``.npy`` file; an item is one, or a tuple of one and its label.

    Worker processes are forked. Each opens the file itself, since what is opened before is shared
    with its position in the file (which a memory map does not have; a data base's connection does).
    """

    def __init__(self, path: Path) -> None:
        self.path, self.opened_by, self.images = path, 0, np.load(path, mmap_mode="r")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> np.ndarray:
        if self.opened_by != os.getpid():
            self.opened_by, self.images = os.getpid(), np.load(self.path, mmap_mode="r")
        return self.images[index]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", type=Path, help="a .npy file of an array (N, H, W, 3), uint8")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--size", type=int, default=224, help="side of a view, pixels")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--model", default="mobilenetv3_small_100", help="any timm model")
    given = parser.parse_args()
    config = Config(
        epochs=given.epochs,
        batch_size=given.batch_size,
        encoder=EncoderConfig(name=given.model),
        views=ViewsConfig(size=given.size),
    )
    result = sacl_fast.train(config, source=NumpyImages(given.images))
    print(result.folder / "encoder.safetensors")
