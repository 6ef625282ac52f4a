"""examples/round_trip.sh on CIFAR-10: every evaluation ranks the trained encoder above the
untrained one, and the exported files give its features in PyTorch and onnxruntime."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tarfile
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from torch import Tensor

from sacl_fast.config import EvalConfig
from sacl_fast.encoders import build_encoder, read_encoder_metadata
from sacl_fast.evaluation.knn import knn_accuracy

ROOT = Path(__file__).resolve().parent.parent
IMAGES_OF_A_CLASS = 200


@pytest.fixture(scope="module")
def cifar10(data_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """``train`` and ``test`` with the first images of each class."""
    folder = tmp_path_factory.mktemp("cifar10")
    found: Counter[Path] = Counter()
    with tarfile.open(data_folder / "cifar10.tar.gz") as archive:
        for member in archive:
            path = Path(member.name)
            if member.isfile() and found[path.parent] < IMAGES_OF_A_CLASS:
                found[path.parent] += 1
                archive.extract(member, folder, filter="data")
    assert len(found) == 20
    return folder


@pytest.fixture(scope="module")
def out(cifar10: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the example leaves."""
    out = tmp_path_factory.mktemp("round_trip")
    path = os.pathsep.join((str(Path(sys.executable).parent), os.environ["PATH"]))
    done = subprocess.run(
        [
            *("bash", "examples/round_trip.sh", str(cifar10), str(out)),
            *"--device cpu --data.workers 0 --eval.every 5".split(),
        ],
        cwd=ROOT,
        env={**os.environ, "PATH": path, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:] + done.stdout[-2000:]
    return out


def result(out: Path, name: str) -> dict[str, dict]:
    """What an evaluation wrote of each encoder."""
    written = json.loads((out / "run" / name).read_text())
    return {encoder["name"]: encoder for encoder in written["encoders"]}


@pytest.mark.parametrize("method", ["knn", "linear-fast", "few-shot"])
def test_trained_above_untrained(out: Path, method: str):
    of = result(out, f"eval/{method}.json")
    for width in ("dense", "slim"):
        for name, untrained in of[f"{width}, untrained"]["figures"].items():
            if name != "top-5":
                assert of[width]["figures"][name]["mean"] > untrained["mean"], (width, name)


def test_fine_tuned(out: Path):
    (written,) = out.glob("run/finetune/*/finetune.json")
    (encoder,) = result(out, str(written.relative_to(out / "run"))).values()
    assert encoder["figures"]["top-1"]["mean"] > 25  # of 10 classes


@torch.no_grad()
@pytest.mark.parametrize("width", ["dense", "slim"])
def test_files_give_the_features_and_the_accuracy_of_the_run(out: Path, cifar10: Path, width: str):
    onnxruntime = pytest.importorskip("onnxruntime")
    said = read_encoder_metadata(out / f"files/encoder_{width}.safetensors")
    mean, std = (np.array(json.loads(said[k]), np.float32) for k in ("mean", "std"))

    def read(split: str) -> tuple[Tensor, Tensor]:
        """Normalised images (N, 3, 32, 32) and classes (N,)."""
        images, labels = [], []
        for label, folder in enumerate(sorted((cifar10 / split).iterdir())):
            for path in sorted(folder.iterdir()):
                pixels = np.asarray(Image.open(path).convert("RGB"), np.float32) / 255
                images.append(((pixels - mean) / std).transpose(2, 0, 1))
                labels.append(label)
        return torch.from_numpy(np.stack(images)), torch.tensor(labels)

    encoder = build_encoder("resnet20", width=0.5).eval()
    encoder.load_state_dict(load_file(out / f"files/encoder_{width}.safetensors"))
    (bank, bank_labels), (queries, query_labels) = read("train"), read("test")
    features = encoder(bank), encoder(queries)
    knn = EvalConfig()
    accuracy = knn_accuracy(
        *(features[0], bank_labels, features[1], query_labels),
        k=knn.k,
        temperature=knn.temperature,
        num_classes=10,
    )
    printed = result(out, "eval/knn.json")[width]["figures"]["top-1"]["mean"]
    assert accuracy == pytest.approx(printed, abs=0.1)

    by_file = {}
    for suffix in ("", "_int8"):
        session = onnxruntime.InferenceSession(out / f"files/encoder_{width}{suffix}.onnx")
        (found,) = session.run(["features"], {"images": queries[:200].numpy()})
        by_file[suffix] = torch.from_numpy(found)
    torch.testing.assert_close(by_file[""], features[1][:200], rtol=1e-3, atol=1e-4)
    assert torch.cosine_similarity(by_file["_int8"], features[1][:200]).mean() > 0.9
