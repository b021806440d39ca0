"""Fields of configuration files, checked and with defaults.

Missing fields have the defaults of the library's classes. Importing those would take seconds before a plan can be
shown, so the defaults are repeated in each family's list; a test compares them.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dreambooth.errors import InputError

NUMBER, COUNT = "a number above 0", "a whole number above 0"


@dataclass(frozen=True, kw_only=True)
class Field:
    """A field of a configuration file; `default` is the library's, `holds` checks a value."""

    file: str
    name: str
    default: Any
    expected: str
    holds: Callable[[Any], bool]

    @property
    def key(self) -> str:
        """`unet.in_channels`: folder and name."""
        return f"{self.file.partition('/')[0]}.{self.name}"

    def value(self, content: dict[str, Any], directory: Path) -> Any:
        """Its value in a file's content, or the default. Raises InputError naming file and field for an invalid one."""
        value = content.get(self.name, self.default)
        if self.name in content and not self.holds(value):
            raise InputError(
                f"{directory / self.file}: {self.name} is {json.dumps(value)}; expected {self.expected}. Is it the "
                f"file that came with the base model?"
            )
        return value


def whole(value: Any) -> bool:
    """A whole number above 0."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 < value < 2**31


def number(value: Any) -> bool:
    """A finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and -math.inf < value < math.inf


def positive(value: Any) -> bool:
    """A finite number above 0."""
    return number(value) and value > 0


def list_of(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """A list that isn't empty, each of whose values holds."""
    return lambda value: isinstance(value, list) and bool(value) and all(holds(one) for one in value)


def or_null(holds: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """null, or a value that holds."""
    return lambda value: value is None or holds(value)


def flag(value: Any) -> bool:
    """True or false."""
    return isinstance(value, bool)


def size(value: Any) -> bool:
    """A side, or height and width."""
    return whole(value) or (list_of(whole)(value) and len(value) == 2)


def is_version(value: Any) -> bool:
    """A version of a library, such as 0.10.0.dev0."""
    return isinstance(value, str) and re.match(r"\d+(\.\d|$)", value) is not None


def first_numbers(version: str) -> tuple[int, ...]:
    """The first two numbers of a version."""
    return tuple(int(number) for number in re.findall(r"\d+", version)[:2])


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON file of settings. Raises InputError if it is missing or invalid."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"there is no {path}; is the copy complete?") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path} is damaged: {error}; copy it again") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} is damaged: expected settings, got {type(content).__name__}; copy it again")
    return content
