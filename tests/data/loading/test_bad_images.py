"""Unreadable images: who is named, who is summed up, and when there are too many."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from sacl_fast.data.images.source import ArraySource, Subset
from sacl_fast.data.loading.bad_images import BadImages
from sacl_fast.errors import UserError


def source(count: int) -> ArraySource:
    return ArraySource("x", np.zeros((count, 1, 1, 3), np.uint8), [0] * count, ())


def found(*indices: int) -> list[tuple[int, str]]:
    return [(index, "no such file") for index in indices]


def test_the_first_are_named_and_the_rest_summed_up(caplog: pytest.LogCaptureFixture) -> None:
    bad = BadImages(source(10_000), 0.5)
    for start in range(0, 3000, 50):
        bad.add(found(*range(start, start + 50)))
        bad.add(found(*range(start)))  # again, in a later epoch
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines[:5] == [
        f"skipped unreadable image x[{i}]: no such file ({i + 1} of 10000)" for i in range(5)
    ]
    assert [int(line.split()[1]) for line in lines[5:]] == [
        10, 20, 40, 80, 160, 320, 640, 1280, 2560,
    ]  # fmt: skip
    assert lines[5] == ("skipped 10 unreadable images of 10000 so far, the last x[9]: no such file")
    assert len(bad.reasons) == 3000


def test_an_image_is_named_by_the_first_of_all_readers_that_meets_it(caplog) -> None:
    whole = source(100)
    held_out, rest = Subset(whole, np.arange(10, 20)), Subset(whole, np.arange(90))
    readers = [BadImages(s, 0.5) for s in (whole, held_out, Subset(rest, np.arange(5, 15)))]
    readers[0].add(found(11, 12))
    readers[1].add(found(1, 2, 3))  # 11, 12, 13
    readers[2].add(found(0, 6, 9))  # 5, 11, 14
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"skipped unreadable image x[{i}]" for i in (11, 12, 13, 5, 14)
    ]
    assert [len(bad.reasons) for bad in readers] == [2, 3, 3]
    BadImages(source(100), 0.5).add(found(11))  # another source
    assert "x[11]" in caplog.records[-1].getMessage() and len(caplog.records) == 6


@pytest.mark.parametrize(("share", "most"), [(0.0, 0), (0.1, 10), (0.105, 10), (1.0, 99)])
def test_of_all_images_the_share_is_exact(share: float, most: int) -> None:
    bad = BadImages(source(100), share)
    bad.add(found(*range(most)))
    with pytest.raises(UserError, match=rf"{most + 1} of 100 images are unreadable"):
        bad.add(found(most))


@pytest.mark.parametrize(
    ("sample", "share", "most"),
    [
        (60, 0.1, 20),
        (60, 0.0, 0),
        (10, 0.1, 8),
        (1000, 0.1, 151),
        (50_000, 0.1, 5_300),
        (3, 0.9, 2),
    ],
)
def test_of_a_sample_as_many_may_be_as_chance_explains(
    sample: int, share: float, most: int
) -> None:
    bad = BadImages(source(100_000), share, sample=sample)
    bad.add(found(*range(most)))
    more = max(1, most // 10)
    with pytest.raises(UserError, match=rf"of {sample:,} images are unreadable, .*is {share:g}\)"):
        bad.add(found(*range(most, most + more)))


def test_what_chance_explains_is_a_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of samples of 60 images of which a tenth may be bad, none in 10,000 is refused."""
    bad_of_sample = np.random.default_rng(0).binomial(60, 0.1, 10_000)
    monkeypatch.setattr(logging.getLogger("sacl_fast"), "level", logging.ERROR)
    worst = int(bad_of_sample.max())
    BadImages(source(1000), 0.1, sample=60).add(found(*range(worst)))
    assert worst > 12  # twice as many as the share


def test_a_list_of_which_half_is_missing_fails_early() -> None:
    bad = BadImages(source(100_000), 0.1)
    rng = np.random.default_rng(0)
    with pytest.raises(UserError, match=r"\d+ of the first \d+ images drawn are unreadable"):
        for _ in range(3):
            drawn = rng.choice(100_000, 32)
            missed = [int(index) for index in drawn if index % 2]
            bad.add(found(*missed))
            bad.drew(32, len(missed))


def test_neighbours_are_no_sample() -> None:
    """A folder that is gone is found at once, where the readable one after it is looked for."""
    bad = BadImages(source(10_000), 0.1)
    bad.add(found(*range(900)))
    bad.drew(32, 2)
    for _ in range(300):
        bad.drew(32, 3)
