"""The console of a run: bars on a terminal, occasional plain lines elsewhere."""

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from rich.console import Console, RenderableType
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from rich.text import Text

from dreambooth.config.addresses import without_credentials
from pipelines.driver.relay import Update, relayed_bar, relays

PLAIN_LINE_SECONDS = 10.0
_PLAIN_WIDTH = 160
_PACE_SECONDS = 300.0
"""Seconds of recent pace that the time left is estimated from, checkpoints and scores included."""


class RunConsole:
    """Prints to stderr, so that stdout carries results alone; `quiet` prints nothing but warnings."""

    def __init__(self, *, quiet: bool = False) -> None:
        self._console = Console(stderr=True, highlight=False)
        self.quiet = quiet
        self._began = time.monotonic()

    def table(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print two columns; values are never wrapped, so that paths can be copied."""
        if self.quiet:
            return
        width = max(len(what) for what, _ in rows)
        for what, value in rows:
            line = Text.assemble((f"{what:<{width}}", "bold"), "  ", without_credentials(value))
            self._console.print(line, soft_wrap=True)

    def findings(self, table: RenderableType) -> None:
        """Print a table of faults, even when quiet, and wide enough to read without a terminal."""
        terminal = self._console.is_terminal
        (self._console if terminal else Console(stderr=True, highlight=False, width=_PLAIN_WIDTH)).print(table)

    def line(self, text: str) -> None:
        """One plain line, with the seconds since the start."""
        if not self.quiet:
            seconds = time.monotonic() - self._began
            self._console.print(Text(f"[{seconds:5.0f} s] {without_credentials(text)}"), soft_wrap=True)

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._console.print(Text(f"warning: {without_credentials(text)}", style="yellow"), soft_wrap=True)

    @contextmanager
    def bar(self, title: str) -> Iterator[Update]:
        """Show a bar with the time left, moved by `update(done, total, note)`; without a terminal, print lines."""
        if self.quiet:
            yield lambda done, total, note: None
            return
        if not self._console.is_terminal:
            yield relayed_bar(title) if relays() else self._lines(title)
            return
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=self._console, speed_estimate_period=_PACE_SECONDS) as progress:
            task = progress.add_task(title, total=None, note="")
            yield lambda done, total, note: progress.update(task, completed=done, total=total, note=note)

    def _lines(self, title: str) -> Update:
        printed = 0.0

        def update(done: int, total: int, note: str) -> None:
            nonlocal printed
            now = time.monotonic()
            if done == total or now - printed >= PLAIN_LINE_SECONDS:
                printed = now
                self.line(f"{title}: {done}/{total} {note}".rstrip())

        return update
