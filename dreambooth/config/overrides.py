"""Settings as nested mappings: read from YAML and from dotted overrides, and merged."""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from dreambooth.config.explain import as_given
from dreambooth.config.strict_yaml import NotYaml, parse_yaml
from dreambooth.config.text_files import read_text
from dreambooth.errors import InputError


def read_yaml(path: Path) -> dict[str, Any]:
    """Settings of a YAML file, dotted names nested. Raises InputError if unreadable, empty or with a duplicate."""
    settings = parse_yaml(read_text(path, what="the configuration"), str(path))
    if not isinstance(settings, dict):
        raise InputError(f"{path} should hold settings such as 'base_model: miniature', got {type(settings).__name__}")
    try:
        return nest(settings.items())
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def parse_override(override: str) -> dict[str, Any]:
    """Turn 'a.b=c' into {'a': {'b': c}}, the value read as YAML."""
    path, separator, text = override.partition("=")
    if not separator or not all(path.strip().split(".")):
        raise InputError(f"--set takes a.b=value, such as train.max_train_steps=400; got {override!r}")
    try:
        value = parse_yaml(text, f"--set {path.strip()}")
    except NotYaml:
        value = text
    return nest([(path.strip(), value)])


def nest(given: Iterable[tuple[str, Any]]) -> dict[str, Any]:
    """Nest settings given by dotted names or as mappings. Raises InputError for one given in both ways.

    >>> nest([("train.seed", 1), ("train", {"max_train_steps": 5})])
    {'train': {'seed': 1, 'max_train_steps': 5}}
    """
    nested: dict[str, Any] = {}
    for path, value in leaves(given):
        below = nested
        for depth, part in enumerate(path[:-1], start=1):
            inner = below.setdefault(part, {})
            if not isinstance(inner, dict):
                raise _twice(path[:depth], inner, {".".join(path[depth:]): value})
            below = inner
        if path[-1] in below and value != {}:
            raise _twice(path, below[path[-1]], value)
        below.setdefault(path[-1], value)
    return nested


_BY_FILE_NAME = ("images", "repeats")
"""A setting whose keys are names of files, with dots of their own."""


def leaves(given: Iterable[tuple[str, Any]], above: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Yield (path of names, value) for each single setting, dotted or nested."""
    for key, value in given:
        path = _path((*above, *str(key).split(".")))
        if isinstance(value, dict) and value:
            yield from leaves(value.items(), path)
        else:
            yield path, {} if value == {} else value


def _path(names: tuple[str, ...]) -> tuple[str, ...]:
    """The path of a setting, a file's name in one piece."""
    above = len(_BY_FILE_NAME)
    return (*names[:above], ".".join(names[above:])) if names[:above] == _BY_FILE_NAME != names else names


def _twice(path: tuple[str, ...], one: Any, other: Any) -> InputError:
    return InputError(
        f"{'.'.join(path)} is given twice, as {as_given(one)} and as {as_given(other)}; leave one of them out"
    )


def merge(under: dict[str, Any], over: dict[str, Any]) -> dict[str, Any]:
    """Merge `over` into `under`, level by level. Raises InputError where a mapping would replace a plain value."""
    merged = dict(under)
    for key, value in over.items():
        below = merged.get(key)
        if isinstance(value, dict) and not isinstance(below, dict | None):
            raise InputError(f"{key}: expected settings such as {key}.{next(iter(value), '…')}, got {below!r}")
        merged[key] = merge(below, value) if isinstance(below, dict) and isinstance(value, dict) else value
    return merged
