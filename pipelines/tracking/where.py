"""Conditions on registered models: `clip_t > 0.3 and subject = rex`.

Names are those of MLflow: figures with their bank before them (`miniature/clip_t`), and `subject`, `class_noun` and
others. The last part of a figure's name is enough where one bank measured it.
"""

import operator
import re
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from dreambooth.errors import InputError

_COMPARISONS: Mapping[str, Callable[[Any, Any], bool]] = {
    "<=": operator.le,
    ">=": operator.ge,
    "!=": operator.ne,
    "<": operator.lt,
    ">": operator.gt,
    "=": operator.eq,
}
_AND = re.compile(r"\s+and\s+(?=[\w./-]+\s*(?:[<>]=?|!?=))", re.IGNORECASE)
_CONDITION = re.compile(r"(?P<name>[\w./-]+)\s*(?P<sign><=|>=|!=|=|<|>)\s*(?P<value>'[^']*'|\"[^\"]*\"|[^<>=!'\"]+)")


@dataclass(frozen=True, kw_only=True)
class Condition:
    """A value of a model compared with one that was given."""

    name: str
    sign: str
    value: str | float

    def holds(self, values: Mapping[str, str | float]) -> bool:
        """Whether it holds for a model of these values; without one of this name it doesn't."""
        return self.name in values and _COMPARISONS[self.sign](values[self.name], self.value)


def parse_where(text: str, *, texts: Collection[str], numbers: Collection[str]) -> tuple[Condition, ...]:
    """Conditions joined by `and`, on values of these names.

    Raises InputError, with the names that there are, for another name, one that several banks have, and other forms.
    """
    return tuple(_condition(text, part, texts, numbers) for part in _AND.split(text.strip()))


def _condition(text: str, part: str, texts: Collection[str], numbers: Collection[str]) -> Condition:
    what = f"--where {text!r}"
    found = _CONDITION.fullmatch(part.strip())
    if found is None:
        raise InputError(
            f"{what}: {part.strip()!r} isn't a condition; expected NAME, one of {' '.join(_COMPARISONS)}, and a value, "
            f"as in 'clip_t > 0.3 and class_noun = dog'"
        )
    name, sign, value = found["name"], found["sign"], found["value"].strip().strip("'\"")
    if name in texts:
        if sign not in ("=", "!="):
            raise InputError(f"{what}: {name} is text; compare it with = or !=")
        return Condition(name=name, sign=sign, value=value)
    name = _whole_name(what, name, texts, numbers)
    try:
        return Condition(name=name, sign=sign, value=float(value))
    except ValueError:
        raise InputError(f"{what}: {name} is a number, and {value!r} isn't") from None


def _whole_name(what: str, name: str, texts: Collection[str], numbers: Collection[str]) -> str:
    """A number's name with its bank."""
    if name in numbers:
        return name
    meant = sorted(one for one in numbers if one.rpartition("/")[2] == name)
    if len(meant) == 1:
        return meant[0]
    if meant:
        raise InputError(f"{what}: {name} may be {' or '.join(meant)}, which can't be compared; name one of them")
    raise InputError(
        f"{what}: no model has {name!r}; there are {', '.join(sorted(texts))}, and of numbers "
        f"{', '.join(sorted(numbers)) or 'none yet'}"
    )
