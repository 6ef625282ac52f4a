"""Configuration files from anywhere: each ends in a configuration or in one short sentence."""

import os
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from sacl_fast.cli import parse_config
from sacl_fast.config import Config, DataConfig, OptimConfig, to_dict
from sacl_fast.config.file import layered, read_config_file
from sacl_fast.errors import UserError
from sacl_fast.presets import get_preset


def read(tmp_path: Path, text: str | bytes) -> Config:
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    return layered(get_preset("demo"), read_config_file(file))


def bomb(merging: bool) -> str:
    """Nine to the power of seven values in 400 bytes, or as many merged mappings."""
    lines = ["a: &a {x: 1}" if merging else "a: &a [x,x,x,x,x,x,x,x,x]"]
    for before, name in zip("abcdefgh", "bcdefghi", strict=True):
        many = ",".join([f"*{before}"] * 9)
        lines.append(f"{name}: &{name} " + (f"{{<<: [{many}]}}" if merging else f"[{many}]"))
    return "\n".join(lines)


BAD = {
    "empty": ("", "no configuration"),
    "comment": ("# nothing", "no configuration"),
    "list": ("[1, 2]", "no configuration"),
    "text": ("epochs", "no configuration"),
    "twice": ("epochs: 3\nepochs: 4", "the key 'epochs' is there twice (line 2, column 1)"),
    "twice_below": ("optim: {lr: 1, lr: 2}", "the key 'lr' is there twice"),
    "twice_spelt": ("batch_size: 3\nbatch-size: 4", "batch_size is there twice"),
    "itself": ("&a [*a]", "no configuration"),
    "itself_as_value": ("optim: &a {lr: *a}", "optim.lr is {'lr': {'lr': {...}}}; a number"),
    "itself_as_tuple": (
        "optim: {betas: &a [*a, *a]}",
        "optim.betas[0] is [[[...]",
    ),
    "itself_as_section": ("optim: &a\n  name: adamw\n  optim: *a", "unknown setting optim.optim"),
    "deep": ("[" * 5000, "nested too deep"),
    "deep_closed": ("a: " + "[" * 5000 + "]" * 5000, "nested too deep"),
    "bomb": (bomb(False), "unknown setting a"),
    "bomb_as_value": (bomb(False) + "\noptim: {betas: *i}", "unknown setting a"),
    "merge_bomb": (bomb(True), "unknown setting a"),
    "utf-8": (b"out: \xff\xfe\xfa", "is not YAML"),
    "latin-1": ("out: caf\xe9".encode("latin-1"), "is not YAML"),
    "zero": (b"epochs: 3\0", "is not YAML"),
    "binary": (bytes(range(256)), "is not YAML"),
    "tab": ("optim:\n\tlr: 3", "(line 2, column 1)"),
    "colon": ("epochs: 3: 4", "is not YAML"),
    "open": ("optim: {lr: 3", "is not YAML"),
    "two_documents": ("epochs: 3\n---\nepochs: 4", "is not YAML"),
    "alias_of_nothing": ("epochs: *e", "undefined alias"),
    "python": ("epochs: !!python/object/apply:os.getpid []", "is not YAML"),
    "set": ("optim: !!set {a, b}", "is not YAML"),
    "key_is_list": ("[a]: 3", "is not YAML"),
    "key_is_number": ("3: 4", "unknown setting 3"),
    "key_is_null": ("~: 4", "unknown setting None"),
    "unknown": ("epoch: 3", "unknown setting epoch; did you mean epochs"),
    "unknown_below": (
        "data: {dali: {thread: 3}}",
        "unknown setting data.dali.thread; did you mean",
    ),
    "long_key": ("x" * 5000 + ": 3", "is not YAML"),
    "section_is_number": ("optim: 3", "optim is '3'; settings below it work, such as name, lr"),
    "section_is_list": ("optim: [lr]", "optim is ['lr']; settings below"),
    "setting_is_section": ("epochs: {a: 1}", "epochs is {'a': '1'}; a whole number works"),
    "number_is_list": ("epochs: [1]", "epochs is ['1']; a whole number works"),
    "number_is_null": ("epochs:", "epochs is None; a whole number works"),
    "number_is_word": ("epochs: many", "epochs is 'many', a text; a whole number works"),
    "number_is_flag": ("epochs: true", "epochs is 'true', a text; a whole number works"),
    "nan": ("optim: {lr: .nan}", "optim.lr is '.nan'"),
    "inf": ("optim: {lr: inf}", "optim.lr is inf; a finite number works"),
    "huge": ("epochs: " + "9" * 5000, "a whole number works"),
    "flag": ("channels_last: perhaps", "channels_last is 'perhaps'; True or False works"),
    "choice": ("device: gpu", "device is 'gpu'; one of auto, cpu, cuda, mps works"),
    "view": ("views: {b: {crop_scale: [1, 0.5]}}", "views.b.crop_scale is (1.0, 0.5); the lower"),
    "length": ("optim: {betas: [0.9]}", "optim.betas is (0.9,); 2 values work"),
    "lengthy": ("optim: {betas: [0.9, 0.9, 0.9]}", "optim.betas is (0.9, 0.9, 0.9); 2 values"),
    "preset_is_list": ("preset: [demo]", "preset is ['demo']; a text works"),
    "preset_is_path": ("preset: ../../demo", "a name without '/' works"),
    "empty_path": ("out: ''", "out is empty"),
    "both": ("eval: {k: 30, bank: 20}", "eval.k is 30, but eval.bank has 20"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_files_get_one_short_sentence(tmp_path, case):
    text, hint = BAD[case]
    with pytest.raises(UserError) as refused:
        read(tmp_path, text)
    said = str(refused.value).replace(str(tmp_path), "")
    assert hint in said and len(said) < 500 and "\n" not in said


@pytest.mark.parametrize("kind", ["folder", "absent", "endless", "large", "loop", "long", "nobody"])
def test_what_is_no_file(tmp_path, kind):
    given = {"absent": "none.yaml", "endless": "/dev/zero", "long": "x" * 300}.get(kind, kind)
    path = str(tmp_path / given) if kind != "nobody" else "~no-such-user/c.yaml"
    if kind == "folder":
        os.mkdir(path)
    elif kind == "large":
        Path(path).write_text("# " + "x" * 2_000_000)
    elif kind == "loop":
        os.symlink(path, path)
    with pytest.raises(UserError) as refused:
        parse_config("train", ["--config", path])
    assert len(str(refused.value)) < 600 and "\n" not in str(refused.value)


GOOD = {
    "yaml_1.1_float": ("optim: {lr: 1e-3}", Config(optim=OptimConfig(lr=1e-3))),
    "whole_float": ("optim: {lr: 1}", Config(optim=OptimConfig(lr=1.0))),
    "quoted": ("optim: {lr: '0.5'}", Config(optim=OptimConfig(lr=0.5))),
    "dashes": ("batch-size: 12", Config(batch_size=12)),
    "octal_folder": ("data: {root: 010}", Config(data=DataConfig(root="010"))),
    "dated_folder": ("data: {root: 2019-01-01}", Config(data=DataConfig(root="2019-01-01"))),
    "null": ("data: {root: null}", Config()),
    "heading": ("data:\noptim:\n  # lr: 3", Config()),
    "flags": ("optim: {clip: no}\nchannels_last: False", None),
    "bom": (b"\xef\xbb\xbfepochs: 7\r\n", Config(epochs=7)),
    "utf-16": ("epochs: 7".encode("utf-16"), Config(epochs=7)),
    "merge": ("views:\n  a: &a {blur: 0.5, flip: 0.1}\n  b: {<<: *a, blur: 0.2}", None),
    "letters": ("out: häuser/日本", Config(out="häuser/日本")),
}


@pytest.mark.parametrize("case", GOOD)
def test_good_files(tmp_path, case):
    text, expected = GOOD[case]
    file = tmp_path / "c.yaml"
    file.write_bytes(text if isinstance(text, bytes) else text.encode())
    config = layered(Config(), read_config_file(file))
    if case == "merge":
        assert (config.views.a.blur, config.views.b.blur, config.views.b.flip) == (0.5, 0.2, 0.1)
    elif case == "flags":
        assert (config.optim.clip, config.channels_last) == (False, False)
    else:
        assert config == expected


def test_a_pipe_is_read(tmp_path):
    reading, writing = os.pipe()
    os.write(writing, b"epochs: 7")
    os.close(writing)
    assert read_config_file(Path(f"/dev/fd/{reading}")) == {"epochs": "7"}
    os.close(reading)


@pytest.mark.parametrize("name", ["cifar10", "of_my_own"])
def test_a_runs_configuration_keeps_its_presets_name(tmp_path, name):
    preset = replace(get_preset("cifar10"), preset=name)
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(to_dict(preset)))
    assert parse_config("train", ["--config", str(tmp_path / "config.yaml")]) == preset


def test_a_file_that_names_a_preset_starts_from_it(tmp_path):
    (tmp_path / "c.yaml").write_text("preset: cifar10\nepochs: 7")
    config = parse_config("train", ["--config", str(tmp_path / "c.yaml")])
    assert config == replace(get_preset("cifar10"), epochs=7)


def test_home_folders(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "c.yaml").write_text("epochs: 7")
    assert parse_config("train", ["--config", "~/c.yaml"]).epochs == 7
    assert parse_config("train", ["--config=~/c.yaml"]).epochs == 7
