"""SACL-XD in a plain PyTorch loop: the whole method on a page.

    python examples/loss_in_plain_pytorch.py ~/photos --epochs 100

A folder with a folder of images for each class (``torchvision.datasets.ImageFolder``; the classes
are not used), a timm encoder, a projector, and four passes: the dense and the slim encoder on
either view. ``sacl-fast train`` does the same with faster views, schedules, evaluation and resume.
"""

import argparse

import timm
import torch
from safetensors.torch import save_model
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from sacl_fast.encoders import Projector
from sacl_fast.losses import SaclXdLoss
from sacl_fast.optim import Lars
from sacl_fast.slim import Slicer


class TwoViews:
    """An image, augmented twice at random."""

    def __init__(self, size: int) -> None:
        self.view = T.Compose(
            [
                T.RandomResizedCrop(size),
                T.RandomHorizontalFlip(),
                T.RandomApply([T.ColorJitter(0.4, 0.4, 0.2, 0.1)], p=0.8),
                T.RandomGrayscale(p=0.2),
                T.ToTensor(),
                T.Normalize(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225)),
            ]
        )

    def __call__(self, image):
        return self.view(image), self.view(image)


def train(images: str, epochs: int, size: int, batch_size: int, model: str, workers: int):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    encoder = timm.create_model(model, num_classes=0).to(device)
    projector = Projector(encoder(torch.zeros(2, 3, size, size, device=device)).shape[1]).to(device)
    slicer = Slicer(encoder, ratio=0.5)  # the slim encoder keeps half of each layer's filters
    criterion = SaclXdLoss(alpha=0.95)
    parameters = [*encoder.parameters(), *projector.parameters()]
    optimizer = Lars(parameters, lr=0.3 * batch_size / 256, weight_decay=1e-4)
    loader = torch.utils.data.DataLoader(
        ImageFolder(images, TwoViews(size)),
        batch_size=batch_size,
        shuffle=True,
        drop_last=True,
        num_workers=workers,
    )

    def embed(x, mode):  # (N, 3, H, W) -> (N, D)
        with slicer.mode(mode):
            return projector(encoder(x))

    losses = []
    for epoch in range(epochs):
        for (view_a, view_b), _ in loader:
            a, b = view_a.to(device), view_b.to(device)
            z1, z2 = embed(a, "dense"), embed(b, "mask")
            with torch.no_grad():  # what each encoder is to agree with, on the other view
                z1_t, z2_t = embed(b, "dense"), embed(a, "mask")
            loss, _ = criterion(z1, z2, z1_t, z2_t)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        slicer.refresh()  # the strongest filters of the weights as they are now
        print(f"epoch {epoch + 1}: loss {losses[-1]:.3f}")
    return encoder, losses


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", help="a folder with a folder of images for each class")
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--size", type=int, default=224, help="side of a view, pixels")
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--model", default="mobilenetv3_small_100", help="any timm model")
    parser.add_argument("--workers", type=int, default=4)
    encoder, _ = train(**vars(parser.parse_args()))
    save_model(encoder, "encoder.safetensors")
