"""Every field of every configuration class refuses what it cannot mean, whoever gives it.

The cases are made from the classes, so a new field without a rule fails here.
"""

import enum
import math
import re
from collections.abc import Iterator
from fractions import Fraction
from pathlib import Path
from typing import Annotated, Any, Literal, get_args, get_origin

import numpy as np
import pytest

from sacl_fast.checks import (
    A_PATH,
    Range,
    Rule,
    Settings,
    check,
    checked,
    counted,
    from_text,
    rules,
    shown,
)
from sacl_fast.config import Config, DataConfig, LossConfig, OptimConfig, ViewConfig, ViewsConfig
from sacl_fast.errors import UserError


def classes(root: type[Settings] = Config) -> Iterator[type[Settings]]:
    yield root
    for annotation in rules(root).values():
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            yield from classes(annotation)


CLASSES = list(dict.fromkeys(classes()))
FIELDS = [(owner, name) for owner in CLASSES for name in rules(owner)]
IDS = [f"{owner.__name__}.{name}" for owner, name in FIELDS]


def bare(annotation: Any) -> tuple[Any, list[Any]]:
    """The kind of an annotation, without None, and its rules."""
    marks: list[Any] = []
    while True:
        if get_origin(annotation) is Annotated:
            annotation, *found = get_args(annotation)
            marks += found
        elif type(None) in get_args(annotation):
            annotation = get_args(annotation)[0]
        else:
            return annotation, marks


def outside(marks: list[Any]) -> list[float]:
    """Numbers just outside the ranges."""
    found: list[float] = []
    for mark in marks:
        if isinstance(mark, Range):
            found += [mark.low if mark.above else mark.low - 1] if mark.low > -math.inf else []
            found += [mark.high if mark.below else mark.high + 1] if mark.high < math.inf else []
    return found


def wrong(annotation: Any) -> list[Any]:
    """What a field of that annotation must refuse."""
    kind, marks = bare(annotation)
    odd = [object(), {}, {"a": 1}, [[]], b"x", 1j, Fraction, ...]
    if kind is int:
        return [*odd, True, np.True_, 1.0, 2.5, "1", math.nan, math.inf, 2**64, *outside(marks)]
    if kind is float:
        numbers = [math.nan, math.inf, -math.inf, np.float32("nan"), 10**400, 1e-300, 1e300]
        return [*odd, True, np.True_, "0.5", "nan", (0.5,), *numbers, *outside(marks)]
    if kind is bool:
        return [*odd, 0, 1, 1.0, "True", "", None]
    if kind is str:
        return [*odd, 3, "", "a\0b", ["a"]] + ([] if A_PATH in marks else [Path("a")])
    if get_origin(kind) is Literal:
        typos = [text + "x" for text in get_args(kind)] + [t.upper() for t in get_args(kind)]
        return [*odd, *typos, "", None, 0, True, list(get_args(kind))]
    if get_origin(kind) is tuple:
        first, *others = get_args(kind)
        length = 1 if others == [...] else 1 + len(others)
        values = [(w, *["x"] * (length - 1)) for w in wrong(first)]
        lengths = [] if others == [...] else [(), (0.5,) * (length - 1), (0.5,) * (length + 1)]
        return [*odd, "abc", 3, 0.5, None, iter([1]), {0.1, 0.2}, *values, *lengths]
    assert issubclass(kind, Settings), f"no rule for {annotation}"
    return [*odd, None, kind, "demo", 3, LossConfig() if kind is not LossConfig else Config()]


@pytest.mark.parametrize(("owner", "name"), FIELDS, ids=IDS)
def test_every_field_refuses_what_it_cannot_mean(owner: type[Settings], name: str):
    typed = re.escape(owner.setting(name))
    cases = wrong(rules(owner)[name])
    assert len(cases) >= 8
    for value in cases:
        with pytest.raises(UserError, match=rf"^{typed}(\[0\])? is .* work") as refused:
            owner(**{name: value})
        assert len(str(refused.value)) < 400 and "\n" not in str(refused.value)


@pytest.mark.parametrize(("owner", "name"), FIELDS, ids=IDS)
def test_every_number_has_a_range(owner: type[Settings], name: str):
    """A count without a lowest value, or a rate without one, is a rule that was forgotten."""

    def numbers(annotation: Any, marks: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
        kind, own = bare(annotation)
        if get_origin(kind) is tuple:
            for element in get_args(kind):
                yield from numbers(element) if element is not ... else ()
        elif kind in (int, float):
            yield (*own, *marks)

    for marks in numbers(rules(owner)[name]):
        assert any(isinstance(mark, Range) for mark in marks)


@pytest.mark.parametrize("owner", CLASSES)
def test_defaults_fit(owner: type[Settings]):
    owner()


@pytest.mark.parametrize("owner", CLASSES)
def test_settings_know_where_they_stand(owner: type[Settings]):
    def classes(root: type[Settings], path: str = "") -> Iterator[tuple[type[Settings], str]]:
        yield root, path
        for name, annotation in rules(root).items():
            if isinstance(annotation, type) and issubclass(annotation, Settings):
                yield from classes(annotation, f"{path}.{name}".lstrip("."))

    found = [path for kind, path in classes(Config) if kind is owner]
    if len(found) > 1:  # several: the last part of the name is a star
        found = list({re.sub(r"\.\w+$", ".*", path) for path in found})
    assert [f"{path}.x".lstrip(".") for path in found] == [owner.setting("x")]


def untyped(value: Any) -> Any:
    """A value of another type than a setting has."""
    return value


def test_other_libraries_numbers_become_pythons():
    seed, epochs, lr = map(untyped, (np.int64(3), np.uint8(7), np.float32(0.5)))
    config = Config(seed=seed, epochs=epochs, optim=OptimConfig(lr=lr))
    assert (config.seed, config.epochs, config.optim.lr) == (3, 7, 0.5)
    assert {type(config.seed), type(config.epochs)} == {int}
    assert type(config.optim.lr) is type(OptimConfig(lr=1).lr) is float
    assert type(OptimConfig(lr=np.float64(0.5)).lr) is float  # a subclass, which YAML cannot write
    assert OptimConfig(clip=np.False_).clip is False  # type: ignore[arg-type]
    assert OptimConfig(betas=[0.5, 0.9]).betas == (0.5, 0.9)  # type: ignore[arg-type]


def test_text_of_other_classes_becomes_pythons():
    class Name(enum.StrEnum):
        LARS = "lars"

    assert type(OptimConfig(name=Name.LARS).name) is str  # type: ignore[arg-type]
    assert type(DataConfig(root=np.str_("a")).root) is str
    assert DataConfig(root=Path("a/b")).root == "a/b"  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (
            lambda: OptimConfig(name=untyped("LARS")),
            "optim.name is 'LARS'; one of lars, adamw works (did",
        ),
        (lambda: OptimConfig(lr=untyped("0.3")), "optim.lr is '0.3', a text; a number works"),
        (
            lambda: Config(seed=2**60),
            "a value from 0 to 9,007,199,254,740,991 works, because",
        ),
        (lambda: Config(epochs=10**5000), "epochs is a number of 5,001 digits; at most"),
        (lambda: ViewConfig(crop_scale=(0.9, 0.1)), "(0.9, 0.1); the lower value first works"),
        (lambda: ViewsConfig(blur_window=4), "views.blur_window is 4; an odd number works"),
        (lambda: LossConfig(lambda_=-1), "loss.lambda is -1.0; 0 or more works"),
        (lambda: DataConfig(workers=3000), "data.workers is 3000; a value from -1 to 512 works"),
    ],
)
def test_sentences(make, sentence):
    with pytest.raises(UserError, match=re.escape(sentence)):
        make()


def test_seeds_from_the_clock_fit():
    for seed in (1_795_721_681, 1_795_721_681_316, 1_795_721_681_316_000):
        assert Config(seed=seed).seed == seed


@checked
def scaled(
    x: Any, factor: Annotated[float, Range(0)] = 1.0, *rest: int, how: Literal["up"] = "up", **more
) -> Any:
    return x, factor, rest, how, more


def test_arguments_are_checked():
    assert scaled("x", untyped(np.float32(2)), 3, how="up", z=1) == ("x", 2.0, (3,), "up", {"z": 1})
    with pytest.raises(UserError, match=r"^scaled: factor is -1.0; 0 or more works"):
        scaled(1, -1)
    with pytest.raises(UserError, match=r"^scaled: how is 'down'; one of up works"):
        scaled(1, how="down")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="scaled"):
        scaled()  # type: ignore[call-arg]


def test_unions_take_either():
    kind = Annotated[float, Range(0, 1)] | list
    assert check(0.5, kind, "x") == 0.5 and check([1], kind, "x") == [1]
    with pytest.raises(UserError, match="a list works"):
        check("a", kind, "x")


def test_rules_of_ones_own():
    even = Annotated[int, Rule(lambda n: n % 2 == 0, "an even number works")]
    assert check(4, even, "n") == 4
    with pytest.raises(UserError, match="n is 3; an even number works"):
        check(3, even, "n")


def test_whatever_is_given_can_be_shown():
    endless: list[Any] = []
    endless.append(endless)

    class Mute:
        def __repr__(self) -> str:
            raise RuntimeError

    given = ["x" * 10**6, endless, Mute(), 10**9999, {i: endless for i in range(9)}, np.zeros(9999)]
    assert all(0 < len(shown(value)) <= 400 for value in given)


def test_text_of_files():
    assert from_text(["1e-3", "x"], tuple[float, float]) == [0.001, "x"]
    assert from_text("no", bool) is False and from_text("maybe", bool) == "maybe"
    count_or_none = Annotated[int, Range(0)] | None  # pyright: ignore[reportOperatorIssue]
    assert from_text("3", count_or_none) == 3 and from_text(None, int) is None
    assert from_text("1.5", int) == "1.5" and from_text("9" * 5000, int) == "9" * 5000


@pytest.mark.parametrize(
    ("said", "is_"),
    [
        (counted(1, "image"), "1 image"),
        (counted(0, "epoch"), "0 epochs"),
        (counted(2000, "training image"), "2,000 training images"),
        (counted(3, "class"), "3 classes"),
        (counted(1.0, "epoch", "g"), "1 epoch"),
        (counted(0.5, "more epoch", ".3g"), "0.5 more epochs"),
    ],
)
def test_so_many_of_something(said: str, is_: str):
    assert said == is_
