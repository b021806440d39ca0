"""Cache counts per base model and settings on this machine: the counting code takes seconds to import."""

import hashlib
import json
import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import dreambooth
from dreambooth.config.settings import config_hash
from dreambooth.models.base_model import BaseModel
from dreambooth.models.download import cache_directory


def counted(what: str, base: BaseModel, asked: Mapping[str, Any], count: Callable[[], Any]) -> Any:
    """The JSON value of `count`, cached for the same base, settings, code and library versions."""
    key = config_hash(base.hash, json.dumps(asked), _code(), *_versions())
    if (what, key) not in _counted:
        _counted[what, key] = _read_or_count(cache_directory() / what / f"{key}.json", count)
    return _counted[what, key]


def optimizer_bytes(base: BaseModel, optimizer: str, text_encoders: Sequence[str]) -> tuple[int, int]:
    """Bytes of an optimizer's state for a base's denoiser and these text encoders, and of its largest update."""

    def count() -> tuple[int, int]:
        from dreambooth.training.optimizer_memory import UPDATE_BYTES, moments_bytes, trained_shapes

        shapes = trained_shapes(base.directory, text_encoders)
        return moments_bytes(optimizer, shapes), UPDATE_BYTES[optimizer] * max(map(math.prod, shapes))

    asked = {"optimizer": optimizer, "text_encoders": list(text_encoders)}
    moments, update = counted("optimizer-memory", base, asked, count)
    return moments, update


_counted: dict[tuple[str, str], Any] = {}
"""Cache of this process; a batch's thousands of subjects are mostly alike."""


@cache
def _versions() -> tuple[str, ...]:
    return tuple(f"{package} {version(package)}" for package in ("torch", "diffusers", "transformers"))


@cache
def _code() -> str:
    """Hash of the counting and the counted code: other versions' counts may differ."""
    package, sources = Path(dreambooth.__file__).parent, hashlib.sha256()
    for path in sorted([*package.glob("training/*.py"), *package.glob("models/**/*.py")]):
        sources.update(path.read_bytes())
    return sources.hexdigest()


def _read_or_count(path: Path, count: Callable[[], Any]) -> Any:
    with suppress(OSError, ValueError):
        return json.loads(path.read_text())
    value = count()
    with suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(value))
    return value
