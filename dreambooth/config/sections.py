"""Sections of settings that subjects of a batch have in common: read once, and kept once.

A configuration has some fifteen sections of a kilobyte or two each, and thousands of subjects differ in one or two.
"""

import pickle
from typing import Any, TypeVar

from pydantic import BaseModel, ValidationError

_Config = TypeVar("_Config", bound=BaseModel)
Sections = dict[Any, BaseModel]
"""Sections by their content, for `with_shared_sections`."""

_MOST_READ = 256
_read_before: dict[tuple[type[BaseModel], bytes], BaseModel | None] = {}


def read_sections(model: type[BaseModel], settings: dict[str, Any]) -> dict[str, Any]:
    """Settings in which each section that is valid by itself is the instance of earlier equal ones.

    Others stay as they are, for `model` to find their faults, and so does the subject, as no two have the same.
    """
    read = dict(settings)
    for name, section in settings.items():
        field = model.model_fields.get(name)
        kind = None if field is None else field.annotation
        if name != "subject" and isinstance(section, dict) and isinstance(kind, type) and issubclass(kind, BaseModel):
            known = _read(kind, section)
            read[name] = section if known is None else known
    return read


def _read(kind: type[BaseModel], section: dict[str, Any]) -> BaseModel | None:
    """The section as an instance, None if it isn't valid."""
    key = kind, pickle.dumps(section)  # which differs for 1 and true, and for a text and one that YAML misread
    if key not in _read_before:
        if len(_read_before) >= _MOST_READ:
            _read_before.clear()
        try:
            _read_before[key] = kind.model_validate(section)
        except ValidationError:
            _read_before[key] = None
    return _read_before[key]


def with_shared_sections(config: _Config, known: Sections) -> _Config:
    """The configuration with each section replaced by an equal one of `known`, or added to these."""
    sections = {}
    for name in type(config).model_fields:
        section = getattr(config, name)
        if isinstance(section, BaseModel):
            # What was given, and what is a default, may decide later: see `with_defaults_of`.
            key = type(section), pickle.dumps(section.__dict__), frozenset(section.model_fields_set)
            sections[name] = known.setdefault(key, section)
    return config.model_copy(update=sections)
