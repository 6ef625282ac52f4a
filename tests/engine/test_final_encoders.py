"""What a finished run leaves to be used: the dense and the slim encoder, as they were evaluated."""

from dataclasses import replace

import numpy as np
import pytest
import safetensors.torch
import torch

from sacl_fast.data.images.open import open_sources
from sacl_fast.encoders import build_encoder, load_encoder, read_encoder_metadata
from sacl_fast.engine.distributed import Ranks
from sacl_fast.engine.evaluator import Evaluator
from sacl_fast.engine.trainer import train
from sacl_fast.evaluation.features import extract_features
from sacl_fast.evaluation.knn import knn_accuracy
from sacl_fast.slim import Slicer
from sacl_fast.slim.export import compact, load_compact


def accuracy(encoder, config) -> float:
    """kNN accuracy in percent of an encoder as it is, on the images of the run's evaluation."""
    splits = open_sources(config.data, config.seed)
    device = torch.device("cpu")
    images = Evaluator(splits, config, Ranks(0, 1, device), None)
    bank, queries = (
        extract_features(encoder, loader, device=device, amp_dtype=None)
        for loader in (images.bank, images.queries)
    )
    settings = {"k": config.eval.k, "temperature": config.eval.temperature}
    return knn_accuracy(*bank, *queries, **settings, num_classes=2)


@pytest.mark.parametrize("batch_norm", ["shared", "separate"])
def test_encoders_score_what_the_run_printed(tiny, batch_norm):
    config = replace(tiny, slim=replace(tiny.slim, batch_norm=batch_norm))
    result = train(config)
    dense = load_encoder(result.folder / "encoder.safetensors")
    path = result.folder / "encoder_slim.safetensors"
    assert accuracy(dense, config) == pytest.approx(result.knn["knn_dense"])
    for slim in (load_encoder(path), load_compact(path)):
        assert accuracy(slim, config) == pytest.approx(result.knn["knn_slim"])
    assert float(read_encoder_metadata(path)["slim_ratio"]) == config.slim.ratio


def test_the_last_checkpoint_knows_the_slim_encoder_s_statistics(tiny):
    config = replace(tiny, data=replace(tiny.data, labels="none"))  # nothing is evaluated
    folder = train(config).folder
    saved = sorted((folder / "checkpoints").glob("step_*.pt"))
    model = torch.load(saved[-1], weights_only=True)["model"]
    options = {"width": config.encoder.width, "image_size": config.views.size}
    encoder = build_encoder(config.encoder.name, **options)
    slicer = Slicer(encoder, config.slim.ratio)
    for module, prefix in ((encoder, "encoder."), (slicer, "slicer.")):
        own = {k.removeprefix(prefix): v for k, v in model.items() if k.startswith(prefix)}
        module.load_state_dict(own)
    x = torch.from_numpy(np.random.default_rng(0).normal(size=(3, 3, 16, 16))).float()
    with torch.no_grad():
        ours = compact(encoder, slicer.masks)(x)
        theirs = load_compact(folder / "encoder_slim.safetensors")(x)
    torch.testing.assert_close(ours, theirs)


def test_one_file_where_both_encoders_are_one(tiny):
    folder = train(replace(tiny, slim=replace(tiny.slim, ratio=1.0))).folder
    assert [p.name for p in folder.glob("encoder*")] == ["encoder.safetensors"]


def test_a_file_that_does_not_say_what_it_is(tmp_path):
    path = tmp_path / "encoder.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path)
    with pytest.raises(ValueError, match="does not say which encoder it holds"):
        load_encoder(path)
    named = {"encoder": "resnet20", "width": "1.0", "stem": "imagenet", "image_size": "32"}
    safetensors.torch.save_file({"weight": torch.zeros(2)}, path, named)
    with pytest.raises(ValueError, match="does not hold the encoder that it names"):
        load_compact(path)


@pytest.mark.parametrize("content", [b"", b"junk", None])
def test_a_damaged_encoder_of_a_finished_run_is_made_anew(tiny, content):
    path = train(tiny).folder / "encoder.safetensors"
    whole = safetensors.torch.load(path.read_bytes())
    metadata = read_encoder_metadata(path)
    if content is None:
        path.unlink()
    else:
        path.write_bytes(content)
    train(replace(tiny, resume="auto"))
    assert read_encoder_metadata(path) == metadata
    again = safetensors.torch.load_file(path)
    assert all(torch.equal(tensor, again[name]) for name, tensor in whole.items())
