"""The files that ``examples/round_trip.sh`` exports, without sacl-fast: in timm and ONNX Runtime.

    python examples/exported_files.py OUT/files IMAGES

IMAGES holds train/CLASS/*.jpg and test/CLASS/*.jpg of the size that the encoder was trained on.
Each file classifies the test images by their nearest training images (weighted kNN, as ``sacl-fast
eval knn``). The table has the accuracy, and for how many images a graph finds the class that the
weights of its width find in timm.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
import onnxruntime
import safetensors
import timm
import torch
from PIL import Image

Features = Callable[[np.ndarray], np.ndarray]  # images (N, 3, S, S) -> (N, F), both float32


def in_timm(path: Path) -> tuple[Features, Mapping[str, str]]:
    """An encoder's weights, or a fine-tuned classifier's; and what the file says of itself."""
    with safetensors.safe_open(path, framework="np") as file:
        said = file.metadata()
    count = len(json.loads(said.get("classes", "[]")))
    model = timm.create_model(said["encoder"], num_classes=count, checkpoint_path=str(path)).eval()

    @torch.no_grad()
    def features(images: np.ndarray) -> np.ndarray:
        return model(torch.from_numpy(images)).numpy()

    return features, said


def in_onnxruntime(path: Path) -> tuple[Features, Mapping[str, str]]:
    """A graph, and what the file says of itself."""
    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])

    def features(images: np.ndarray) -> np.ndarray:
        return np.asarray(session.run(["features"], {"images": images})[0])

    return features, session.get_modelmeta().custom_metadata_map


def read(folder: Path) -> tuple[np.ndarray, np.ndarray]:
    """Pixels (N, S, S, 3) and the numbers of their classes (N,)."""
    of_class = [sorted(path.glob("*.jpg")) for path in sorted(folder.iterdir())]
    pixels = [np.asarray(Image.open(path).convert("RGB")) for paths in of_class for path in paths]
    return np.stack(pixels), np.repeat(np.arange(len(of_class)), [len(p) for p in of_class])


def encode(features: Features, pixels: np.ndarray, said: Mapping[str, str]) -> np.ndarray:
    """Features (N, F) of length 1."""
    mean, std = (np.array(json.loads(said[name]), np.float32) for name in ("mean", "std"))
    parts = []
    for start in range(0, len(pixels), 250):
        images = (pixels[start : start + 250] / np.float32(255) - mean) / std
        parts.append(features(np.ascontiguousarray(images.transpose(0, 3, 1, 2))))
    found = np.concatenate(parts)
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def classify(
    bank: np.ndarray,
    labels: np.ndarray,
    queries: np.ndarray,
    neighbours: int = 20,
    temperature: float = 0.07,
) -> np.ndarray:
    """Classes (Q,) of the ``queries`` (Q, F), by votes of the nearest of ``bank`` (N, F)."""
    similarity = queries @ bank.T  # (Q, N)
    nearest = np.argpartition(-similarity, neighbours)[:, :neighbours]
    weights = np.exp(np.take_along_axis(similarity, nearest, 1) / temperature)
    votes = (weights[:, :, None] * np.eye(labels.max() + 1)[labels[nearest]]).sum(axis=1)
    return votes.argmax(axis=1)


def classes_by_file(files: Path, images: Path) -> tuple[dict[str, np.ndarray], np.ndarray]:
    """For each file the classes (Q,) that it finds for the test images; and the right ones."""
    (bank, bank_labels), (queries, labels) = (read(images / split) for split in ("train", "test"))
    found = {}
    for path in sorted(files.glob("*.safetensors")) + sorted(files.glob("*.onnx")):
        load = in_timm if path.suffix == ".safetensors" else in_onnxruntime
        features, said = load(path)
        of_bank, of_queries = (encode(features, pixels, said) for pixels in (bank, queries))
        found[path.name] = classify(of_bank, bank_labels, of_queries)
    return found, labels


def main(files: Path, images: Path) -> None:
    found, labels = classes_by_file(files, images)
    if not found:
        sys.exit(f"no .safetensors and no .onnx in {files}")
    print(f"{'file':28} accuracy  as in timm")
    for name, classes in found.items():
        width = name.removesuffix(".safetensors").removesuffix(".onnx").removesuffix("_int8")
        in_timm = found[f"{width}.safetensors"]
        accuracy, same = 100 * np.mean(classes == labels), 100 * np.mean(classes == in_timm)
        print(f"{name:28} {accuracy:6.2f} %  {same:7.2f} %")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit("usage: python examples/exported_files.py OUT/files IMAGES")
    main(Path(sys.argv[1]), Path(sys.argv[2]))
