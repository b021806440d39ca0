"""Readable validation errors: where, what was expected, what was got, and the nearest known name."""

import difflib
import re
from collections.abc import Callable, Sequence
from types import UnionType
from typing import Any, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError

_LONGEST = 120
_ASIDE = re.compile(r", (unable to|got a number) .*")
_DECIMALS = re.compile(r"^\d.*[.e]")
_PLAINER = {
    "greater than or equal to": "at least",
    "less than or equal to": "at most",
    "a valid string": "text",
    "a valid integer": "a whole number",
    "a valid number": "a number",
    "a valid boolean": "true or false",
    "a valid dictionary": "a mapping of names to values",
}


def explain(error: ValidationError, root: type[BaseModel]) -> str:
    """One line per fault: where, what was expected, what was got, and the nearest name of an unknown setting."""
    defaults = {name: default for name, default, _ in list_settings(root)}
    lines, known = [], list(defaults)
    alternatives: dict[str, list[str]] = {}
    either = _settings_of_either_kind(root)
    for fault in error.errors():
        where = ".".join(str(part) for part in fault["loc"])
        setting = next((name for name in either if where.startswith(f"{name}.")), None)
        if fault["type"] == "extra_forbidden":
            nearest = nearest_setting(where, known)
            hint = f"; did you mean {nearest}?" if nearest else "; 'dreambooth settings' lists all"
            lines.append(f"unknown setting {where}{hint}")
        elif fault["type"] == "missing":
            lines.append(f"{where} is missing")
        elif fault["type"] == "model_type":
            example = next((name for name in known if name.startswith(f"{where}.")), "base_model")
            lines.append(f"{where}: expected settings such as {example}, got {_shown(fault['input'])}")
        else:
            message = plain_message(fault["msg"], defaults.get(setting or where))
            got = "" if fault["type"] == "value_error" else f"; got {_shown(fault['input'])}"
            if setting is None:
                lines.append(f"{where}: {message}{got}" if where else message)
            elif setting in alternatives:
                alternatives[setting].insert(-1, f", or {message.removeprefix('must be ')}")
            else:
                alternatives[setting] = [f"{setting}: {message}", got]
    return "\n".join([*lines, *("".join(parts) for parts in alternatives.values())])


def plain_message(message: str, default: str | None = None) -> str:
    """Pydantic's message in plainer words, with the default as an example of a number with decimals."""
    message = message.removeprefix("Value error, ")
    if not message.startswith("Input should "):
        # Pydantic's begin with a capital; what begins with two is an abbreviation.
        return message if message[:2].isupper() else message[0].lower() + message[1:]
    message = _ASIDE.sub("", message).replace("Input should ", "must ", 1)
    for words, plainer in _PLAINER.items():
        message = message.replace(words, plainer)
    if message == "must be a number" and _DECIMALS.search(default or ""):
        return f"{message}, such as {str(default).replace('e-0', 'e-')}"
    return message


def _settings_of_either_kind(model: type[BaseModel], prefix: str = "") -> list[str]:
    """Dotted names of settings that take values of two kinds, each of which pydantic finds its own fault with."""
    names = []
    for name, field in model.model_fields.items():
        dotted, kinds = f"{prefix}{field.alias or name}", set(get_args(field.annotation)) - {type(None)}
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            names += _settings_of_either_kind(field.annotation, f"{dotted}.")
        elif get_origin(field.annotation) in (Union, UnionType) and len(kinds) > 1:
            names.append(dotted)
    return names


def _shown(value: object) -> str:
    text = as_given(value)
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def nearest_setting(unknown: str, known: Sequence[str]) -> str | None:
    """The most similarly spelled setting or group; a common word counts more than letters."""

    def likeness(name: str) -> float:
        words, others = (set(each.rsplit(".", 1)[-1].split("_")) for each in (unknown, name))
        return difflib.SequenceMatcher(None, unknown, name).ratio() + 0.3 * bool(words & others)

    groups = dict.fromkeys(name.split(".")[0] for name in known)
    best = max([*known, *groups], key=likeness)
    return best if likeness(best) >= 0.5 else None


def list_settings(model: type[BaseModel], prefix: str = "") -> list[tuple[str, str, str]]:
    """All settings as (dotted name, default, description); "required" where there is no default."""
    rows = []
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{field.alias or name}"
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
            rows += list_settings(field.annotation, f"{dotted}.")
        else:
            default = "required" if field.is_required() else in_yaml(field.default)
            rows.append((dotted, default, field.description or ""))
    return rows


def in_yaml(value: Any) -> str:
    """A setting's value as a YAML file has it."""
    if isinstance(value, tuple | list):
        return f"[{', '.join(map(in_yaml, value))}]"
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return str(value)


def as_given(value: object, quoted: Callable[[object], str] = repr) -> str:
    """A value for a message: null, true and false as YAML and JSON have them, text in quotes.

    >>> as_given({"prompt": [None, True, "a dog"]})
    "{'prompt': [null, true, 'a dog']}"
    """
    if isinstance(value, dict):
        return f"{{{', '.join(f'{quoted(name)}: {as_given(each, quoted)}' for name, each in value.items())}}}"
    if isinstance(value, tuple | list):
        return f"[{', '.join(as_given(each, quoted) for each in value)}]"
    return in_yaml(value) if value is None or isinstance(value, bool) else quoted(value)
