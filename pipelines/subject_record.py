"""Where one subject of a batch stands, as it is kept in storage and shown to a person."""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any, Literal, Self, get_args

from pipelines.storage import filesystem

State = Literal["waiting", "training", "trained", "done", "failed"]
"""waiting for its class images or a lane; in a lane; published but not registered yet; registered; set aside."""

STATES: tuple[State, ...] = get_args(State)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SubjectRecord:
    """One subject: `key` is its plan's, `attempts` how often it was begun, `failures` how often it failed.

    `reason` and `traceback` are the last failure's, `began` and `ended` seconds since the epoch.
    """

    name: str
    key: str
    class_noun: str
    identifier: str
    state: State = "waiting"
    lane: str | None = None
    attempts: int = 0
    failures: int = 0
    reason: str | None = None
    traceback: str | None = None
    began: float | None = None
    ended: float | None = None

    def changed(self, **changes: Any) -> Self:
        """The record with some fields changed."""
        return dataclasses.replace(self, **changes)

    def as_dict(self) -> dict[str, Any]:
        """As plain data, for JSON."""
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Self:
        """What `as_dict` gave."""
        return cls(**plain)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Progress:
    """How far a subject that is in a lane has come.

    `pictures` are those of its evaluation (made, to make), None while it trains.
    """

    step: int
    steps: int
    images_per_second: float
    loss: float
    pictures: tuple[int, int] | None = None


def read_records(uri: str) -> dict[str, SubjectRecord]:
    """The records in a folder, by subject name."""
    fs, path = filesystem(uri)
    try:
        files = [name for name in fs.ls(path, detail=False) if name.endswith(".json")]
    except (FileNotFoundError, NotADirectoryError):
        return {}
    contents = fs.cat(files) if files else {}
    records = [SubjectRecord.from_dict(json.loads(content)) for content in contents.values()]
    return {record.name: record for record in records}
