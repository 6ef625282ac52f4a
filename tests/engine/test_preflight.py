"""What is refused before anything is opened, and what is said of a run before it starts."""

from dataclasses import replace

import pytest

from sacl_fast.checks import counted
from sacl_fast.cli import parse_config
from sacl_fast.config import Config, DaliConfig, DataConfig, OptimConfig, ProjectorConfig
from sacl_fast.data.loading.workers import worker_count
from sacl_fast.engine.dry_run import print_dry_run
from sacl_fast.engine.preflight import check_run, remarks
from sacl_fast.engine.trainer import train
from sacl_fast.errors import UserError
from sacl_fast.machine import Memory
from sacl_fast.presets import PRESETS, get_preset


@pytest.mark.parametrize(
    ("config", "sentence"),
    [
        (Config(data=DataConfig(workers=500)), r"data\.workers is 500.*and -1 takes what suits"),
        (Config(data=DataConfig(dali=DaliConfig(readers=500))), r"data\.dali\.readers is 500"),
        (Config(data=DataConfig(dali=DaliConfig(threads=500))), r"data\.dali\.threads is 500"),
        (
            Config(projector=ProjectorConfig(hidden=65_536, out=65_536, layers=16)),
            r"projector\.hidden is 65536 and projector\.out 65536: 258 GB of weights",
        ),
        (Config(out="~no-such-user/x"), "out is ~no-such-user/x, but no home folder"),
        (Config(resume="~no-such-user/x"), "resume is ~no-such-user/x"),
        (Config(data=DataConfig(root="~no-such-user/x")), r"data\.root is ~no-such-user"),
        (Config(data=DataConfig(cache_dir="~no-such-user/x")), r"data\.cache_dir is ~no-such"),
        ({"epochs": 3}, "the configuration is {'epochs': 3}; a Config works"),
    ],
)
def test_what_this_machine_cannot_do(config, sentence, tmp_path, monkeypatch):
    if worker_count(-1) > 30:
        monkeypatch.setattr("sacl_fast.engine.preflight.worker_count", lambda given: 8)
    of_64_gb = Memory(64 * 10**9, 64 * 10**9)
    monkeypatch.setattr("sacl_fast.engine.preflight.usable_memory", lambda: of_64_gb)
    monkeypatch.chdir(tmp_path)
    for begin in (check_run, train, print_dry_run):
        with pytest.raises(UserError, match=sentence):
            begin(config)
    assert not list(tmp_path.iterdir())


def test_an_encoder_is_tried_before_data_are_looked_for(tmp_path):
    config = replace(get_preset("imagenet100"), out=str(tmp_path / "run"))
    config = replace(config, encoder=replace(config.encoder, name="resnet18.no_such_tag"))
    with pytest.raises(UserError, match="has no tag"):  # not: data.root is missing
        train(config)


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("epochs", [1, 2, 3, 9, 10, 11, 100])
def test_every_run_has_a_rate_that_falls(name, epochs):
    preset = replace(get_preset(name), epochs=epochs)
    said = [s for s in remarks(preset, 10 * preset.batch_size) if "warm-up" in s]
    if preset.optim.warmup_epochs < epochs:
        assert not said and preset.warmup_epochs == preset.optim.warmup_epochs
    else:
        assert preset.warmup_epochs == epochs / 10 and len(said) == 1
        assert f"warm-up of {counted(preset.optim.warmup_epochs, 'epoch')} " in said[0]
        assert f"using a tenth of the run, {counted(epochs / 10, 'epoch', 'g')}" in said[0]


def test_no_warm_up_stays_none():
    config = Config(epochs=1, optim=OptimConfig(warmup_epochs=0))
    assert config.warmup_epochs == 0 and not list(remarks(config, 2560))


@pytest.mark.parametrize("option", ["--optim.warmup-epochs", "--optim.warmup_epochs"])
def test_a_warm_up_that_was_asked_for_is_not_changed(option):
    assert parse_config("train", ["--epochs", "5", option, "4"]).warmup_epochs == 4
    assert parse_config("train", ["--epochs", "5", f"{option}=0"]).warmup_epochs == 0
    for given in ([option, "5"], [f"{option}=9"]):
        with pytest.raises(UserError, match=r"of 5 epochs, so that the learning rate would only"):
            parse_config("train", ["--epochs", "5", *given])


@pytest.mark.parametrize(
    ("batch", "images", "said"),
    [
        (64, 4000, ""),  # 32 left out, 0.8 %
        (64, 128, ""),
        (64, 94, "each epoch leaves out 30 of 94 images (32 %).*batch_size 47 leaves out none"),
        (64, 72, "leaves out 8 of 72 images (11 %)"),
        (64, 70, ""),  # 8.6 %
        (64, 40, "0 steps an epoch: batch_size is 64, but there are only 40.*at most 40 works"),
        (2, 3, "leaves out 1 of 3 images (33 %)"),
        (2, 1, "0 steps an epoch"),
    ],
)
def test_images_that_fill_no_batch(batch, images, said):
    sentences = list(remarks(Config(batch_size=batch), images))
    assert len(sentences) == bool(said)
    assert all(part in sentences[0] for part in said.split(".*")) if said else True


def test_a_dry_run_says_so_too(capsys):
    config = replace(get_preset("demo"), epochs=1, batch_size=64)
    config = replace(config, data=replace(config.data, limit=94))
    print_dry_run(config)
    said = capsys.readouterr().out
    assert "warning     the warm-up of 1 epoch " in said and "leaves out 30 of 94 images" in said
    print_dry_run(replace(config, data=replace(config.data, limit=40)))
    assert "0 steps an epoch" in capsys.readouterr().out


def test_a_dry_run_of_an_encoder_that_passes_parameters_between_modules(capsys):
    preset = get_preset("demo")
    print_dry_run(replace(preset, encoder=replace(preset.encoder, name="cait_xxs24_224")))
    assert "GFLOP" in capsys.readouterr().out
