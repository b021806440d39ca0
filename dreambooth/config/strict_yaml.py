"""Strict YAML: no duplicate keys, and no value silently read as another type than text.

PyYAML follows YAML 1.1, which reads `007` as 7, `NO` as false and `12:30:00` as 45000, and keeps the last of two equal
keys. Here equal keys are refused, and a plain value that YAML reads as something else is a `Misread`: the text as
written, so numbers and switches still accept it, and settings of text can refuse it.

>>> parse_yaml("{a: 007, b: 5e-6, c: [on, 12]}", "it")
{'a': '007', 'b': '5e-6', 'c': ['on', 12]}
"""

from collections.abc import Iterator
from typing import Any

import yaml
from yaml.constructor import SafeConstructor
from yaml.nodes import MappingNode, Node, ScalarNode, SequenceNode

from dreambooth.config.explain import in_yaml
from dreambooth.errors import InputError

_TAG = "tag:yaml.org,2002:"
_MOST_COPIES = 20
"""Most values from aliases per character; more is a bomb (`[*a, *a, *a]`, of `[*b, *b, *b]`, of …)."""


class NotYaml(InputError):
    """Text that isn't valid YAML."""


class Misread(str):
    """A plain value as written; `reading` names YAML's interpretation: "the number 7", "false", "a date"."""

    __slots__ = ("reading",)
    reading: str


class Mapping(dict[str, Any]):
    """A mapping with the `line` it begins on."""

    line: int


def parse_yaml(text: str, name: str) -> Any:
    """Parse a YAML document. Raises InputError, with the line, if it is invalid or has a duplicate key."""
    try:
        node = yaml.compose(text, Loader=yaml.SafeLoader)
        return None if node is None else _Reader(name, len(text)).value(node)
    except yaml.YAMLError as error:
        raise NotYaml(f"{name} is not valid YAML: {error}") from None
    except RecursionError:
        raise NotYaml(f"{name} is not valid YAML: it is nested too deep") from None


def misread(text: str, reading: str) -> Misread:
    """Mark a value with YAML's interpretation of it."""
    value = Misread(text)
    value.reading = reading
    return value


class _Reader:
    """Converts nodes to values and tracks the position for messages."""

    def __init__(self, name: str, length: int) -> None:
        self._name = name
        self._open: list[Node] = []
        self._left = _MOST_COPIES * (length + 50)

    def value(self, node: Node) -> Any:
        self._left -= 1
        if self._left < 0:
            raise InputError(f"{self._name}: its aliases (*name) multiply to too many values; write them out")
        if isinstance(node, ScalarNode):
            return self._scalar(node)
        if any(node is outer for outer in self._open):
            raise InputError(f"{self._name}, {_line(node)}: an alias (*name) stands inside its own value")
        self._open.append(node)
        try:
            if node.tag not in (f"{_TAG}seq", f"{_TAG}map"):
                raise self._foreign(node)
            if isinstance(node, SequenceNode):
                return [self.value(item) for item in node.value]
            return self._mapping(node)
        finally:
            self._open.pop()

    def _foreign(self, node: Node) -> NotYaml:
        """The error for a tag that asks for a Python object, a set or the like."""
        return NotYaml(
            f"{self._name} is not valid YAML for settings: {_line(node)} has a value of the kind {node.tag!r}"
        )

    def _mapping(self, node: Node) -> Mapping:
        mapping = Mapping()
        mapping.line = node.start_mark.line + 1
        mapping.update(self._merged(node))
        seen: dict[str, Node] = {}
        for key, value in node.value:
            if key.tag == f"{_TAG}merge":
                continue
            if not isinstance(key, ScalarNode):
                raise InputError(f"{self._name}, {_line(key)}: expected a name for a key, got a list or mapping")
            if (first := seen.setdefault(key.value, key)) is not key:
                raise InputError(f"{self._name}: {key.value!r} is there twice, in {_line(first)} and in {_line(key)}")
            mapping[key.value] = self.value(value)
        return mapping

    def _merged(self, node: Node) -> dict[str, Any]:
        """Keys merged by `<<: *name`; the first of several mappings wins."""
        merged: dict[str, Any] = {}
        for part in _merge_nodes(node):
            if not isinstance(part, MappingNode):
                raise InputError(f"{self._name}, {_line(part)}: << takes mappings, such as <<: *name")
            merged = self.value(part) | merged
        return merged

    def _scalar(self, node: ScalarNode) -> Any:
        text, kind = node.value, node.tag.removeprefix(_TAG)
        if kind in ("str", "value", "merge"):
            return text
        if kind == "null":
            return None
        if kind == "timestamp":
            return misread(text, "a date")
        if kind not in ("bool", "int", "float"):
            raise self._foreign(node)
        try:
            value = getattr(SafeConstructor(), f"construct_yaml_{kind}")(node)
        except (ValueError, KeyError, IndexError):  # 0x_, more digits than Python reads, !!bool perhaps
            return text
        if kind == "bool":
            return value if in_yaml(value) == text else misread(text, in_yaml(value))
        return value if str(value) == text else misread(text, f"the number {value}")


def _merge_nodes(node: Node) -> Iterator[Node]:
    for key, value in node.value:
        if key.tag == f"{_TAG}merge":
            yield from value.value if isinstance(value, SequenceNode) else [value]


def _line(node: Node) -> str:
    return f"line {node.start_mark.line + 1}"
