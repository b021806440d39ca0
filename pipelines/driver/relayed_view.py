"""Show a job's live view outside the cluster, through its log.

A relaying driver writes every update to the log as one marked line of JSON. The client that follows the log shows it
like a local view, and prints other lines unchanged.
"""

import dataclasses
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from types import TracebackType
from typing import Any, Self, TypeVar

from pipelines.driver.batch_console import BatchView
from pipelines.driver.console import RunConsole
from pipelines.driver.relay import MARK, SECONDS, Update, send
from pipelines.tasks import Progress, State

_Shown = TypeVar("_Shown")

_SECONDS_PER_LANE = 0.05
"""Updates of many lanes are long, so they are sent less often: logs grow by megabytes an hour, not gigabytes."""
_SENT_FAILURES = 5


class RelayedBatchView(BatchView):
    """The driver's side of a batch's view."""

    _sent = -SECONDS
    _last: tuple[int, ...] = ()

    def update(
        self,
        counts: Mapping[State, int],
        running: Mapping[str, Progress],
        *,
        class_images: tuple[int, int] | None,
        failures: Sequence[tuple[str, str]],
    ) -> None:
        """Send an update when due, or when a subject has changed its state."""
        now, states = self.seconds(), tuple(counts.values())
        if states == self._last and now - self._sent < max(SECONDS, _SECONDS_PER_LANE * len(running)):
            return
        self._sent, self._last = now, states
        send(
            {
                "seconds": round(now, 1),
                "total": self.total,
                "counts": dict(counts),
                "running": {name: dataclasses.asdict(progress) for name, progress in running.items()},
                "class_images": class_images,
                "failures": list(failures[-_SENT_FAILURES:]),
            }
        )


class Replay:
    """The client's side: reads the log, shows relayed updates, passes other lines to `show`."""

    def __init__(self, show: Callable[[str], None]) -> None:
        self._show = show
        self._rest = ""
        self._seconds = 0.0
        self._view: BatchView | None = None
        self._bar: tuple[str, Update] | None = None
        self._open = ExitStack()

    def __enter__(self) -> Self:
        """Show nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep the last view, and show an unfinished last line."""
        self._open.__exit__(kind, error, trace)
        if self._rest:
            self._show(self._rest)

    def feed(self, text: str) -> None:
        """Read the next piece of the log; it may end within a line."""
        *lines, self._rest = (self._rest + text).split("\n")
        for line in lines:
            if line.startswith(MARK):
                self._take(json.loads(line.removeprefix(MARK)))
            else:
                self._show(f"{line}\n")

    def _take(self, update: dict[str, Any]) -> None:
        if "bar" in update:
            self._bar_of(update["bar"])(update["done"], update["total"], update["note"])
            return
        if self._view is None:
            # By the driver's time: replaying the log an hour later shows the same.
            self._view = self._enter(BatchView(total=update["total"], clock=lambda: self._seconds))
        self._seconds = update["seconds"]
        made = update["class_images"]
        self._view.update(
            update["counts"],
            {name: Progress(**progress) for name, progress in update["running"].items()},
            class_images=tuple(made) if made else None,
            failures=[(name, reason) for name, reason in update["failures"]],
        )

    def _bar_of(self, title: str) -> Update:
        if self._bar is None or self._bar[0] != title:
            self._bar = title, self._enter(RunConsole().bar(title))
        return self._bar[1]

    def _enter(self, view: AbstractContextManager[_Shown]) -> _Shown:
        """Switch to another view; the previous one stays on screen."""
        self._open.close()
        return self._open.enter_context(view)
