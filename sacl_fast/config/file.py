"""Configuration files: YAML whose keys are the settings' names, whole or in part.

Scalars are read as text and become what each setting's annotation asks for, as on the command
line: '1e-3' is a number (YAML 1.1 takes it for text), and a folder called '010' stays that.
Files come from elsewhere, so that whatever one holds ends in a value or in one sentence.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import yaml

from sacl_fast.checks import Settings, check, from_text, rules, shown
from sacl_fast.config import Config
from sacl_fast.errors import UserError, nearest, reason_and_remedy, reason_of
from sacl_fast.files import kind_of

_S = TypeVar("_S", bound=Settings)

_MOST_BYTES = 1_000_000  # a whole configuration has 3,000


def read_config_file(path: Path) -> dict[str, Any]:
    """The mapping that a YAML file holds.

    Raises:
        UserError: it cannot be read, or is no YAML mapping, or names a key twice.
    """
    if kind_of(path) == "folder":
        raise UserError(f"cannot read configuration {path}: it is a folder; a YAML file works")
    try:
        with path.open("rb") as file:
            text = file.read(_MOST_BYTES + 1)
    except OSError as error:
        raise UserError(f"cannot read configuration {path}: {reason_and_remedy(error)}") from None
    if len(text) > _MOST_BYTES:
        raise UserError(
            f"configuration {path} has more than {_MOST_BYTES:,} bytes; a YAML file of settings "
            "such as 'epochs: 10' works"
        )
    try:
        values = yaml.load(text, _Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark
        where = f" (line {mark.line + 1}, column {mark.column + 1})" if mark else ""
        why = error.problem or error.context or "it cannot be understood"
        raise UserError(f"{path} is not YAML: {why[:200]}{where}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{path} is not YAML: {reason_of(error)}") from None
    except RecursionError:
        raise UserError(
            f"{path} is nested too deep; a mapping such as 'epochs: 10' works"
        ) from None
    except (ValueError, TypeError) as error:  # of a tag, such as !!int many
        raise UserError(f"{path} is not YAML: {reason_of(error)}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path} holds no configuration; a mapping such as 'epochs: 10' works")
    return values


class _Loader(yaml.SafeLoader):
    """Scalars as text (but null and the merge key '<<'), and no key twice."""

    yaml_implicit_resolvers = {  # noqa: RUF012 - the name is PyYAML's
        first: [(tag, pattern) for tag, pattern in resolvers if tag.endswith((":null", ":merge"))]
        for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
    }

    yaml_constructors = {  # noqa: RUF012
        tag: construct
        for tag, construct in yaml.SafeLoader.yaml_constructors.items()
        if tag is None or tag.rpartition(":")[2] in ("str", "null", "seq", "map")
    }

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen and key.value != "<<":
                raise yaml.MarkedYAMLError(
                    problem=f"the key {shown(key.value)} is there twice",
                    problem_mark=key.start_mark,
                )
            seen.add(key.value if isinstance(key, yaml.ScalarNode) else "")
        return super().construct_mapping(node, deep)

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Merge what '<<' names, each key once: merged mappings that merge others would else
        grow as a power of their depth."""
        super().flatten_mapping(node)
        last = {key.value if isinstance(key, yaml.ScalarNode) else id(key): i
                for i, (key, _) in enumerate(node.value)}  # fmt: skip
        node.value = [node.value[i] for i in last.values()]


def layered(config: _S, values: Mapping[Any, Any], path: str = "") -> _S:
    """``config`` with the settings that ``values`` holds (see ``read_config_file``).

    Raises:
        UserError: an unknown setting, or a value that does not fit.
    """
    annotations = rules(type(config))
    names = {name.strip("_"): name for name in annotations}
    changes: dict[str, Any] = {}
    for key, given in values.items():
        name = names.get(str(key).strip("_").replace("-", "_")) if isinstance(key, str) else None
        if name is None:
            unknown = f"{path}{key}"[:100] if isinstance(key, str) else shown(key)
            if unknown in _all_names():
                group, _, last = unknown.rpartition(".")
                raise UserError(f"{unknown} is one name; '{last}' below '{group}:' works")
            raise UserError(f"unknown setting {unknown}; {nearest(unknown, _all_names())}")
        setting, annotation = f"{path}{name.strip('_')}", annotations[name]
        now = getattr(config, name)
        if name in changes:
            raise UserError(f"{setting} is there twice; once works")
        if not isinstance(now, Settings):
            changes[name] = check(from_text(given, annotation), annotation, setting)
        elif isinstance(given, dict):
            changes[name] = layered(now, given, f"{setting}.")
        elif given is not None:  # a heading of which every line is commented out is no change
            known = ", ".join(list(rules(type(now)))[:3])
            raise UserError(f"{setting} is {shown(given)}; settings below it work, such as {known}")
    return replace(config, **changes)  # type: ignore[type-var]


def _all_names(owner: type[Settings] = Config, path: str = "") -> Iterator[str]:
    for name, annotation in rules(owner).items():
        full = f"{path}{name.strip('_')}"
        yield full
        if isinstance(annotation, type) and issubclass(annotation, Settings):
            yield from _all_names(annotation, f"{full}.")
