"""Pre-training on images that only your code can read: an image source of your own.

    python examples/own_source.py images.npy --epochs 100

Here: an array (N, H, W, 3) of uint8, memory-mapped, so it may be larger than memory. For a data
base, a video or a bucket, change ``load``, ``read`` and ``identity``. Both loaders, DALI and
torchvision, take any such source; ``sacl-fast train`` takes those that ``data.source`` names, so
the loop over the steps stands here.
"""

import argparse
import functools
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors.torch import save_model

from sacl_fast.config import Config, EncoderConfig, ViewsConfig
from sacl_fast.data.loading.open import open_view_loader
from sacl_fast.engine.distributed import process_group
from sacl_fast.engine.method import SaclXd, build_method
from sacl_fast.engine.step import TrainingStep
from sacl_fast.passes import choose_passes


class NumpySource:
    """Images of a ``.npy`` file; the protocol is ``sacl_fast.data.images.source.Source``.

    Worker processes get a copy of the source, so it keeps the path and each opens the file itself.
    """

    classes: tuple[str, ...] = ()  # no labels, which only an evaluation would use
    decoded = True  # `read` gives pixels, not the bytes of an image file

    def __init__(self, path: Path) -> None:
        self.path = path
        self.labels = np.full(len(self.images), -1)

    @functools.cached_property
    def images(self) -> np.ndarray:
        return np.load(self.path, mmap_mode="r")

    def __getstate__(self) -> dict:
        return {name: value for name, value in vars(self).items() if name != "images"}

    def __len__(self) -> int:
        return len(self.labels)

    def load(self, index: int) -> Image.Image:
        """What torchvision augments. One that cannot be read raises ``BadImage`` and is skipped."""
        return Image.fromarray(self.read(index))

    def read(self, index: int) -> np.ndarray:
        """What DALI gets."""
        return np.array(self.images[index])

    def label(self, index: int) -> int:
        return -1

    def name(self, index: int) -> str:
        """In messages."""
        return f"{self.path.name}[{index}]"

    def identity(self, index: int) -> bytes:
        """What tells the image from another one at the same index."""
        return self.images[index].tobytes()


def train(source: NumpySource, config: Config) -> tuple[SaclXd, list[float]]:
    losses: list[float] = []
    with process_group(config.device) as ranks:  # one process, or those of torchrun
        loader = open_view_loader(
            source, config, device=ranks.device, rank=ranks.rank, world_size=ranks.world_size
        )
        steps = loader.steps_per_epoch
        torch.manual_seed(config.seed)
        method = build_method(config, choose_passes(config, ranks.device, steps_per_epoch=steps))
        step = TrainingStep(method, config, ranks, steps_per_epoch=steps)
        for epoch in range(config.epochs):
            for batch in loader.epoch(epoch):
                loss, _, _ = step(batch.view_a, batch.view_b, len(losses))
                losses.append(loss.item())
            method.slicer.refresh()
            print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
        loader.close()
    return method, losses


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
    method, _ = train(NumpySource(given.images), config)
    save_model(method.encoder, "encoder.safetensors")
