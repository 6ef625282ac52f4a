"""One way to check every value that users give: its kind, its choice, that it is finite, its range.

The rule of a value is its annotation, so that a value without a rule cannot be declared::

    lr: Positive = 0.3                          # Annotated[float, Range(0, above=True)]
    name: Literal["lars", "adamw"] = "lars"
    betas: tuple[BelowOne, BelowOne] = (0.9, 0.999)

Classes of settings derive from ``Settings``, public functions and constructors are ``@checked``,
and ``check`` is both for a single value. What does not fit is a ``UserError`` that names the
setting, what was given and what works. No torch here, since the command line does without it.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import math
import numbers
import os
import re
import reprlib
import types
from collections.abc import Callable
from typing import (
    Annotated,
    Any,
    ClassVar,
    Literal,
    ParamSpec,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
)

from sacl_fast.errors import UserError, nearest

_P = ParamSpec("_P")
_R = TypeVar("_R")

# --- what an annotation can say besides the kind -------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, both included, or only those ``above`` and ``below``."""

    low: float = -math.inf
    high: float = math.inf
    _: dataclasses.KW_ONLY
    above: bool = False
    below: bool = False
    because: str = ""
    """Why, where that helps: the end of the sentence."""

    def holds(self, value: float) -> bool:
        low = value > self.low if self.above else value >= self.low
        return low and (value < self.high if self.below else value <= self.high)

    @property
    def works(self) -> str:
        verb = f"works, because {self.because}" if self.because else "works"
        low, high = (f"{end:,}" if abs(end) >= 1e5 else f"{end:g}" for end in (self.low, self.high))
        if self.high == math.inf:
            return f"{f'a value above {low}' if self.above else f'{low} or more'} {verb}"
        if self.low == -math.inf:
            return f"{'a value below' if self.below else 'at most'} {high} {verb}"
        if self.above:
            return f"a value above {low} and {'below' if self.below else 'at most'} {high} {verb}"
        return f"a value from {low} to {'below ' if self.below else ''}{high} {verb}"


@dataclasses.dataclass(frozen=True)
class Rule:
    """Whatever ``holds`` says; ``works`` is the sentence's end, such as "an odd number works"."""

    holds: Callable[[Any], bool]
    works: str


def _is_pattern(text: str) -> bool:
    with contextlib.suppress(re.error, RecursionError, OverflowError):
        re.compile(text)
        return True
    return False


Positive = Annotated[float, Range(0, above=True)]
NotNegative = Annotated[float, Range(0)]
Probability = Annotated[float, Range(0, 1)]
BelowOne = Annotated[float, Range(0, 1, below=True)]
Ratio = Annotated[float, Range(0, 1, above=True)]
Count = Annotated[int, Range(1)]
CountOrZero = Annotated[int, Range(0)]
Pattern = Annotated[str, Rule(_is_pattern, "a regular expression works")]
Rising = Rule(lambda pair: pair[0] <= pair[1], "the lower value first works")
A_PATH = Rule(lambda text: True, "a path works")
"""Marks text that is a path: an object such as ``pathlib.Path`` works too."""

# Of every whole number that has no range of its own, and of every other number, which torch
# takes in single precision.
_LARGEST_COUNT = 2**31 - 1
_SMALLEST, _LARGEST = 1.1754943508222875e-38, 3.4028234663852886e38


# --- one value -----------------------------------------------------------------------------------


def check(value: Any, annotation: Any, name: str) -> Any:
    """``value`` as the annotation's kind (an int, say, where numpy's was given).

    Args:
        annotation: a number's type, ``bool``, ``str``, a ``Literal``, a tuple of those, a class,
            each perhaps with ``Range`` and ``Rule`` in an ``Annotated``, or ``None`` besides.
            Anything else is not looked at.
        name: of the setting, as users type it.

    Raises:
        UserError: the value does not fit.
    """
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        rules = [rule for rule in args[1:] if isinstance(rule, (Range, Rule))]
        if A_PATH in rules and isinstance(value, os.PathLike):
            value = os.fspath(value)
        return _hold(check(value, _with_range(args[0], rules), name), rules, name)
    if origin in (Union, types.UnionType):
        return _check_union(value, args, name)
    if origin is Literal:
        return _check_choice(value, args, name)
    if origin is tuple:
        return _check_tuple(value, args, name)
    if annotation in _KINDS:
        return _KINDS[annotation](value, name)
    if origin is not None or annotation is Any or not isinstance(annotation, type):
        return value
    if not isinstance(value, annotation):
        an = "an" if annotation.__name__[0] in "AEIOU" else "a"
        raise _wrong(name, value, f"{an} {annotation.__name__} works")
    return value


def shown(value: Any) -> str:
    """A value for a sentence, whatever it is: never more than some 100 characters."""
    if isinstance(value, int) and not isinstance(value, bool) and value.bit_length() > 300:
        return f"a number of {int(value.bit_length() * math.log10(2)) + 1:,} digits"
    return _REPR.repr(value)


def counted(count: float, noun: str, form: str = ",") -> str:
    """So many of something, for a sentence: ``1 image``, ``2,000 images``, ``3 classes``."""
    many = f"{noun}es" if noun.endswith("s") else f"{noun}s"
    return f"{count:{form}} {noun if count == 1 else many}"


_REPR = reprlib.Repr()
_REPR.maxlevel, _REPR.maxstring, _REPR.maxother = 2, 100, 80
_REPR.maxlist = _REPR.maxtuple = _REPR.maxdict = _REPR.maxset = 4


def _wrong(name: str, value: Any, works: str) -> UserError:
    said = shown(value)
    if isinstance(value, str) and name and "number" in works:
        said += ", a text"
    return UserError(f"{name} is {said}; {works}")


def _with_range(kind: Any, rules: list[Range | Rule]) -> Any:
    """``int``, or the kind of whole number that has bounds of its own."""
    bounded = any(isinstance(rule, Range) and rule.high < math.inf for rule in rules)
    return _BoundedInt if kind is int and bounded else kind


class _BoundedInt:
    """Marks an ``int`` whose range says how large it may be."""


def _hold(value: Any, rules: list[Range | Rule], name: str) -> Any:
    for rule in rules:
        if not rule.holds(value):
            raise _wrong(name, value, rule.works)
    return value


def _whole(value: Any, name: str) -> int:
    # numpy's integers are registered as Integral; a bool is one too, and no number of anything.
    if isinstance(value, bool) or not isinstance(value, numbers.Integral):
        raise _wrong(name, value, "a whole number works")
    return int(value)


def _count(value: Any, name: str) -> int:
    whole = _whole(value, name)
    if abs(whole) > _LARGEST_COUNT:
        raise _wrong(name, whole, f"at most {_LARGEST_COUNT:,} works")
    return whole


def _number(value: Any, name: str) -> float:
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise _wrong(name, value, "a number works")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise _wrong(name, value, "a finite number works")
    if number and not _SMALLEST <= abs(number) <= _LARGEST:
        works = "0, or a size from 1.2e-38 to 3.4e38 (single precision) works"
        raise _wrong(name, value, works)
    return number


def _flag(value: Any, name: str) -> bool:
    kind = type(value)
    if kind is not bool and (kind.__module__, kind.__name__.strip("_")) != ("numpy", "bool"):
        raise _wrong(name, value, "True or False works")
    return bool(value)


def _text(value: Any, name: str) -> str:
    if not isinstance(value, str):
        raise _wrong(name, value, "a text works")
    if not value:
        raise UserError(f"{name} is empty; a text of one character or more works")
    if "\0" in value:
        raise _wrong(name, value, "a text without a zero byte works")
    return str.__str__(value)  # numpy's, and members of an enumeration, are subclasses


_KINDS: dict[Any, Callable[[Any, str], Any]] = {
    int: _count,
    _BoundedInt: _whole,
    float: _number,
    bool: _flag,
    str: _text,
}


def _check_choice(value: Any, choices: tuple[Any, ...], name: str) -> Any:
    for choice in choices:
        if type(choice) is type(value) and choice == value:
            return choice
        if isinstance(value, str) and str.__str__(value) == choice:
            return choice
    if isinstance(value, str):
        close = nearest(value.lower(), map(str, choices))
        tail = "" if close.startswith("valid") else f" ({close})"
        raise _wrong(name, value, f"one of {', '.join(map(str, choices))} works{tail}")
    raise _wrong(name, value, f"one of {', '.join(map(repr, choices))} works")


def _check_tuple(value: Any, kinds: tuple[Any, ...], name: str) -> tuple[Any, ...]:
    some = len(kinds) == 2 and kinds[1] is Ellipsis
    if not isinstance(value, (list, tuple)):
        raise _wrong(name, value, "a tuple works" if some else f"{len(kinds)} values work")
    if not some and len(value) != len(kinds):
        raise _wrong(name, tuple(value), f"{len(kinds)} values work")
    each = [kinds[0]] * len(value) if some else kinds
    return tuple(
        check(v, kind, f"{name}[{i}]") for i, (v, kind) in enumerate(zip(value, each, strict=True))
    )


def _check_union(value: Any, kinds: tuple[Any, ...], name: str) -> Any:
    kinds = tuple(kind for kind in kinds if kind is not types.NoneType or value is None)
    for kind in kinds[:-1]:
        with contextlib.suppress(UserError):
            return check(value, kind, name)
    return None if value is None else check(value, kinds[-1], name)


# --- text, as files hold it ----------------------------------------------------------------------


def from_text(value: Any, annotation: Any) -> Any:
    """Text, alone or in lists, as the kind that the annotation asks for; what is no such text
    stays, for ``check`` to refuse."""
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return from_text(value, args[0])
    if origin in (Union, types.UnionType):
        return from_text(value, next(kind for kind in args if kind is not types.NoneType))
    if origin is tuple and isinstance(value, list):
        each = args[:1] * len(value) if args[-1] is Ellipsis else args + args[-1:] * len(value)
        return [from_text(v, kind) for v, kind in zip(value, each, strict=False)]
    if not isinstance(value, str):
        return value
    if annotation is bool:
        return _FLAGS.get(value.lower(), value)
    if annotation in (int, float):
        with contextlib.suppress(ValueError):
            return annotation(value)
    return value


_FLAGS = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


# --- classes of settings, functions --------------------------------------------------------------


class Settings:
    """Base of the configuration classes (frozen dataclasses): each field is held against its
    annotation where an instance is made.

    ``class DaliConfig(Settings, path="data.dali")``: where the class stands in the whole
    configuration, so that a sentence names the setting as users type it. A ``*`` stands for a part
    that the class cannot know.
    """

    _path: ClassVar[str] = ""

    def __init_subclass__(cls, path: str = "") -> None:
        cls._path = path

    def __post_init__(self) -> None:
        for name, annotation in rules(type(self)).items():
            given = getattr(self, name)
            value = check(given, annotation, self.setting(name))
            if value is not given:
                object.__setattr__(self, name, value)

    @classmethod
    def setting(cls, field: str) -> str:
        """The full name of a field, as users type it."""
        field = field.rstrip("_")  # 'lambda_' in Python, where 'lambda' is taken
        return f"{cls._path}.{field}" if cls._path else field


@functools.cache
def rules(owner: type) -> dict[str, Any]:
    """The annotations of a dataclass's fields, by name."""
    hints = get_type_hints(owner, include_extras=True)
    assert dataclasses.is_dataclass(owner)
    return {field.name: hints[field.name] for field in dataclasses.fields(owner)}


def checked(function: Callable[_P, _R]) -> Callable[_P, _R]:
    """Has the arguments of a function, or of a class's ``__init__``, held against its
    annotations."""
    signature = inspect.signature(function)
    owner = function.__qualname__.removesuffix(".__init__")
    single = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    names = [p.name for p in signature.parameters.values() if p.kind not in single]
    hints: dict[str, Any] = {}

    @functools.wraps(function)
    def call(*args: _P.args, **kwargs: _P.kwargs) -> _R:
        if not hints:  # here, since annotations may name what is defined below
            hints.update(get_type_hints(function, include_extras=True), **{"return": None})
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError:
            return function(*args, **kwargs)  # whose own words say more
        for name in names:
            if name in bound.arguments and name in hints:
                given = bound.arguments[name]
                bound.arguments[name] = check(given, hints[name], f"{owner}: {name}")
        return function(*bound.args, **bound.kwargs)

    return call
