"""cuDNN tries its algorithms within a run on a GPU, and nowhere else."""

from contextlib import contextmanager
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

import sacl_fast
from sacl_fast.engine import trainer
from sacl_fast.engine.convolutions import tried_algorithms


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize(("kind", "within"), [("cuda", True), ("cpu", False)])
def test_within_and_after(monkeypatch, kind, within, before):
    monkeypatch.setattr(torch.backends.cudnn, "benchmark", before)
    with tried_algorithms(torch.device(kind)):
        assert torch.backends.cudnn.benchmark is (within or before)
    assert torch.backends.cudnn.benchmark is before
    with pytest.raises(OSError), tried_algorithms(torch.device(kind)):
        raise OSError
    assert torch.backends.cudnn.benchmark is before


@pytest.mark.usefixtures("full_precision")
def test_where_precision_was_set_by_its_new_name():
    with tried_algorithms(torch.device("cuda")):
        assert torch.backends.cudnn.benchmark


class RunOnAGpu:
    """Notes the setting that its parts would meet; trains nothing."""

    seen: list[bool]

    def __init__(self, *_):
        self.seen.append(torch.backends.cudnn.benchmark)

    def train(self):
        self.seen.append(torch.backends.cudnn.benchmark)
        return SimpleNamespace(steps=0)

    def close(self):
        pass


def test_a_run_on_a_gpu_tries_and_leaves_torch_as_it_was(tiny, monkeypatch):
    monkeypatch.setattr(RunOnAGpu, "seen", [], raising=False)
    monkeypatch.setattr(trainer, "Run", RunOnAGpu)
    process_group = trainer.process_group

    @contextmanager
    def on_a_gpu(device):
        with process_group("cpu") as ranks:
            ranks.device = torch.device("cuda", 0)
            yield ranks

    monkeypatch.setattr(trainer, "process_group", on_a_gpu)
    sacl_fast.train(replace(tiny, epochs=1))
    assert RunOnAGpu.seen == [True, True]
    assert torch.backends.cudnn.benchmark is False
