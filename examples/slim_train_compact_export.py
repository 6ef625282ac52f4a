"""A classifier of half the filters, from training to a file that is deployed.

    python examples/slim_train_compact_export.py ~/photos --weights encoder.safetensors

A timm model, with the weights of a pre-trained encoder where there are some, is trained together
with its slim half on labelled images (a folder for each class). ``compact`` makes the slim half an
ordinary smaller module without sacl-fast in it, which goes to ONNX, or where that is not installed
to a ``torch.export`` program.
"""

import argparse
import importlib.util
from pathlib import Path

import timm
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torchvision import transforms as T
from torchvision.datasets import ImageFolder

from sacl_fast.passes import RecordedEncoder
from sacl_fast.slim import Slicer
from sacl_fast.slim.export import compact, cost

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def train(classifier, slicer: Slicer, loader, epochs: int) -> None:
    """Cross-entropy of the dense and the slim classifier, which share their weights."""
    slim = RecordedEncoder(slicer)  # computes the kept filters only
    optimizer = torch.optim.AdamW(classifier.parameters(), lr=1e-3)
    log = []
    for epoch in range(epochs):
        for images, labels in loader:
            dense_loss = F.cross_entropy(classifier(images), labels)
            slim_loss = F.cross_entropy(slim(images), labels)
            optimizer.zero_grad()
            (dense_loss + slim_loss).backward()
            optimizer.step()
            log.append((dense_loss.item(), slim_loss.item()))
        print(f"epoch {epoch + 1}: loss {log[-1][0]:.3f} dense, {log[-1][1]:.3f} slim")


def export(small: torch.nn.Module, size: int, path: Path) -> Path:
    """Images (N, 3, size, size) to logits, for any N."""
    example = torch.zeros(2, 3, size, size)
    n = torch.export.Dim("n", min=1)
    if has_onnx():
        path = path.with_suffix(".onnx")
        torch.onnx.export(small, (example,), path, dynamo=True, dynamic_shapes=({0: n},))
    else:
        path = path.with_suffix(".pt2")
        torch.export.save(torch.export.export(small, (example,), dynamic_shapes=({0: n},)), path)
    return path


def has_onnx() -> bool:
    return all(importlib.util.find_spec(name) for name in ("onnx", "onnxscript"))


def main(
    images: str, out: Path, model: str, weights: str | None, epochs: int, size: int, batch_size: int
) -> Path:
    transform = T.Compose([T.Resize((size, size)), T.ToTensor(), T.Normalize(MEAN, STD)])
    folder = ImageFolder(images, transform)
    loader = torch.utils.data.DataLoader(folder, batch_size, shuffle=True, drop_last=True)
    classifier = timm.create_model(model, num_classes=len(folder.classes))
    if weights:
        classifier.load_state_dict(load_file(weights), strict=False)  # all but the last layer
    slicer = Slicer(classifier, ratio=0.5)
    train(classifier, slicer, loader, epochs)

    slicer.refresh()  # the strongest filters of the trained weights
    slicer.recalibrate(images for images, _ in loader)  # batch-norm statistics of the slim half
    small = compact(classifier, slicer.masks)
    print("parameters and FLOPs of an image:", cost(classifier, size), "->", cost(small, size))
    return export(small, size, out)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("images", help="a folder with a folder of images for each class")
    parser.add_argument("--out", type=Path, default=Path("slim_classifier"))
    parser.add_argument("--model", default="mobilenetv3_small_100", help="any timm model")
    parser.add_argument("--weights", help="encoder.safetensors of a run, or another example's")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--batch-size", type=int, default=64)
    print("wrote", main(**vars(parser.parse_args())))
