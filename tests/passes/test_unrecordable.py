"""Passes that cannot be recorded, or never pay: they stay right, and the log says why."""

import logging
import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from sacl_fast.passes import RecordedEncoder
from sacl_fast.slim import Slicer
from tests.modules import channels_last
from tests.passes.pairs import Odd, Pair, images


def _reads(module, x):
    return x * 2 if x.mean() > 0 else x * 3


def _selects(module, x):
    return x + x[x > 0].sum()


def _counts(module, x):
    return x * module.calls


def _rebinds(module, x):
    module.seen = module.seen * 0.5 + x.detach().mean() * 0.5
    return x * module.seen


def _draws(module, x):
    return x * random.random()


def _draws_with_numpy(module, x):
    return x * np.random.rand()


def _draws_in_backward(module, x):
    return checkpoint(lambda x: nn.functional.dropout(x, 0.5), x, use_reentrant=False)


def _reshapes(module, x):
    x = x * 2
    other = x.detach()
    return x + other.unsqueeze_(0).squeeze(0)


@pytest.mark.parametrize(
    ("what", "reason"),
    [
        (_reads, "depends on values"),
        (_selects, "depends on values"),
        (_counts, "each pass"),
        (_rebinds, "each pass"),
        (_draws, "random numbers that are not PyTorch's"),
        (_draws_with_numpy, "random numbers that are not PyTorch's"),
        (_draws_in_backward, "random numbers in backward"),
        (_reshapes, "in place"),
    ],
)
def test_what_cannot_be_recorded_stays_right(what, reason, caplog):
    torch.manual_seed(0)
    pair, results = Pair(channels_last(Odd(what))), []
    with caplog.at_level(logging.INFO, logger="sacl_fast.passes.recorded"):
        for seed in range(6):
            for run, encoder in ((pair.recorded, pair.encoder), (pair.skip, pair.twin)):
                torch.manual_seed(seed)
                random.seed(seed)
                np.random.seed(seed)
                encoder.zero_grad()
                x = images() * (1 if seed % 2 else -1)
                x = x.requires_grad_()
                out = run(x)
                out.square().sum().backward()
                results.append(out)
            assert torch.equal(*results[-2:])
            pair.compare()
    (message,) = {r.message for r in caplog.records}
    assert reason in message, message
    assert len(caplog.records) == 1


@pytest.mark.parametrize(("mode", "encoder"), [("skip", "slim"), ("whole", "dense")])
def test_the_log_says_which_encoder(mode, encoder, caplog):
    recorded = RecordedEncoder(Slicer(channels_last(Odd(_reads)), 0.5), mode)
    with caplog.at_level(logging.INFO, logger="sacl_fast.passes.recorded"), torch.no_grad():
        recorded(images())
    (record,) = caplog.records
    assert record.message.startswith(f"{encoder} encoder: not recorded")


def test_passes_that_are_never_alike_are_not_recorded_for_ever(caplog):
    encoder = Odd(lambda module, x: x)
    recorded = RecordedEncoder(Slicer(encoder, 0.5))
    with caplog.at_level(logging.INFO, logger="sacl_fast.passes.recorded"), torch.no_grad():
        for size in range(20, 40):
            recorded(images(size=size))
    (record,) = caplog.records
    assert "too often" in record.message


def test_passes_that_nobody_differentiates_are_not_recorded_for_ever(monkeypatch):
    from sacl_fast.passes import recorded as module

    recorded, calls, record = (
        RecordedEncoder(Slicer(Odd(lambda module, x: x), 0.5)),
        [],
        module.record,
    )
    monkeypatch.setattr(
        module, "record", lambda *given, **named: calls.append(1) or record(*given, **named)
    )
    results = [recorded(images()) for _ in range(6)]
    assert len(calls) == 3
    for result in results:  # all at once, later
        result.sum().backward()
    recorded(images()).sum().backward()
    assert len(calls) == 3
