"""Settings as their differences from others, for a message that has most of them already."""

from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import BaseModel

_Settings = TypeVar("_Settings", bound=BaseModel)


def differences(settings: BaseModel, from_: BaseModel) -> dict[str, Any]:
    """Values in which settings differ from others of their type, section by section."""
    found: dict[str, Any] = {}
    for name in type(settings).model_fields:
        value, other = getattr(settings, name), getattr(from_, name)
        if value != other:
            found[name] = differences(value, other) if isinstance(value, BaseModel) else value
    return found


def with_differences(settings: _Settings, found: Mapping[str, Any]) -> _Settings:
    """The inverse: settings with their `differences` put in."""
    update = {}
    for name, value in found.items():
        own = getattr(settings, name)
        update[name] = with_differences(own, value) if isinstance(own, BaseModel) else value
    return settings.model_copy(update=update)
