"""What is counted once per base model and settings, and kept on this machine: what counts takes seconds to import."""

import json
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dreambooth.base_model import BaseModel
from dreambooth.config import config_hash
from dreambooth.download import cache_directory


def counted(what: str, base: BaseModel, asked: Mapping[str, Any], count: Callable[[], Any]) -> Any:
    """The JSON value of `count`, or what it was for the same base, settings and versions of libraries."""
    key = config_hash(base.hash, json.dumps(asked), *_versions())
    if (what, key) not in _counted:
        _counted[what, key] = _read_or_count(cache_directory() / what / f"{key}.json", count)
    return _counted[what, key]


_counted: dict[tuple[str, str], Any] = {}
"""In this process; thousands of subjects of a batch are mostly alike."""


@cache
def _versions() -> tuple[str, ...]:
    return tuple(f"{package} {version(package)}" for package in ("torch", "diffusers", "transformers"))


def _read_or_count(path: Path, count: Callable[[], Any]) -> Any:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    value = count()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    return value
