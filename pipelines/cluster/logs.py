"""Structured logs of workers: one line of JSON per event, with its subject and lane.

    {"time": "2026-11-25T03:00:00.123+00:00", "level": "INFO", "event": "checkpoint", "lane": "0", "subject": "rex", …}

Lines go to standard error, which Ray keeps per process (`ray logs`, the dashboard) and Kubernetes per pod.
"""

import datetime
import json
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

from dreambooth.config.addresses import without_credentials

_LOGGER = logging.getLogger("dreambooth.worker")
_FIELDS: ContextVar[dict[str, Any]] = ContextVar("fields", default={})  # noqa: B039 - never changed in place


@contextmanager
def about(**fields: Any) -> Iterator[None]:
    """Add fields to every line of this thread within the context."""
    token = _FIELDS.set(_FIELDS.get() | fields)
    try:
        yield
    finally:
        _FIELDS.reset(token)


def log(event: str, *, level: int = logging.INFO, **fields: Any) -> None:
    """Write a line, in processes that called `to_stderr` only."""
    _LOGGER.log(level, event, extra={"fields": _FIELDS.get() | fields})


def to_stderr() -> None:
    """Write this process's lines to standard error from now on."""
    if not _LOGGER.handlers:
        handler = logging.StreamHandler(sys.stderr)
        handler.setFormatter(_Json())
        _LOGGER.addHandler(handler)
    _LOGGER.setLevel(logging.INFO)
    _LOGGER.propagate = False


class _Json(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        time = datetime.datetime.fromtimestamp(record.created, datetime.UTC).isoformat(timespec="milliseconds")
        fields = getattr(record, "fields", {})
        line = {"time": time, "level": record.levelname, "event": record.getMessage(), **fields}
        return without_credentials(json.dumps(line, ensure_ascii=False, default=str))
