"""A run on images that Python gives: as one on files, and what is said where they are not given."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

import sacl_fast
from sacl_fast.config import ViewsConfig
from sacl_fast.errors import UserError
from tests.engine.runs import losses


class Photos:
    """The files of a folder, opened when they are asked for; one of them cannot be."""

    def __init__(self, root: str, broken: int = -1) -> None:
        self.paths, self.broken = sorted(Path(root).rglob("*.png")), broken
        self.targets = [int(path.parent.name == "dark") for path in self.paths]

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> Any:
        if index == self.broken:
            raise OSError("the disk is gone")
        return Image.open(self.paths[index]), self.targets[index]


@pytest.mark.parametrize("workers", [0, 2])
def test_the_same_as_on_files(tiny, workers):
    config = replace(tiny, data=replace(tiny.data, workers=workers))
    result = sacl_fast.train(config)
    other = replace(config, out=f"{tiny.out}-2")
    with pytest.raises(UserError, match=r"data.root is .*, and source= gives .* one of the two"):
        sacl_fast.train(other, source=Photos(tiny.data.root))
    other = replace(other, data=replace(config.data, root=None))
    given = sacl_fast.train(other, source=Photos(tiny.data.root))
    assert losses(other.out) == losses(tiny.out)
    assert given.knn == result.knn and given.label_free == result.label_free
    said = yaml.safe_load((given.folder / "config.yaml").read_text())["data"]
    assert said["source"] == "python" and said["root"] is None


def test_a_broken_item_is_named_and_passed_over(tiny, capsys):
    config = replace(tiny, data=replace(tiny.data, root=None, max_bad_share=0.1))
    assert sacl_fast.train(config, source=Photos(tiny.data.root, broken=7)).finished
    assert "source[7]: OSError: the disk is gone" in capsys.readouterr().out


def test_resume_and_all_else_take_them_again(tiny, tmp_path):
    images = Photos(tiny.data.root)
    config = replace(tiny, data=replace(tiny.data, root=None))
    folder = sacl_fast.train(config, source=images).folder
    whole = losses(folder)
    (folder / "encoder.safetensors").unlink()
    last = folder / "checkpoints" / "step_00000006.pt"
    last.unlink()
    again = replace(tiny, resume="auto", data=replace(tiny.data, source="python", root=None))
    with pytest.raises(UserError, match="given again, by the argument source="):
        sacl_fast.train(again)
    assert sacl_fast.train(again, source=images).finished and losses(folder) == whole
    with pytest.raises(UserError, match=r"47 images|other images"):
        (folder / "encoder.safetensors").unlink()
        last.unlink()
        sacl_fast.train(again, source=[images[i] for i in range(47)])
    middle = folder / "checkpoints" / "step_00000003.pt"
    for call in (
        lambda: sacl_fast.evaluate.knn(middle),
        lambda: sacl_fast.load_encoder(middle),
        lambda: sacl_fast.export(middle, tmp_path / "out", knn=True),
    ):
        with pytest.raises(UserError, match="given again, by the argument source="):
            call()
    result = sacl_fast.evaluate.knn(middle, source=images, val=images)
    assert [scores.name for scores in result.scores][:2] == ["dense", "slim"]
    assert sacl_fast.load_encoder(middle, source=images).training is False
    assert sacl_fast.export(middle, tmp_path / "out", source=images, knn=True).rows[1].knn


def test_a_module_is_evaluated_on_them(tiny):
    encoder = sacl_fast.load_encoder(sacl_fast.train(tiny).folder)
    images = [(np.full((9, 9, 3), 40 + 5 * i, np.uint8), "bright" if i > 20 else "dark")
              for i in range(40)]  # fmt: skip
    settings: Any = {"views": ViewsConfig(size=16), "source": images}
    result = sacl_fast.evaluate.knn(encoder, **settings, eval=replace(tiny.eval, k=3))
    assert result.scores[0].figures["top-1"].mean >= 50
    with pytest.raises(UserError, match=r"data=.* or source="):
        sacl_fast.evaluate.knn(encoder, views=ViewsConfig(size=16))
