"""The console of a batch: a live table on a terminal, occasional plain lines elsewhere."""

import time
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dreambooth.amounts import counted
from dreambooth.config.addresses import without_credentials
from pipelines.driver.recent_rate import RecentRate
from pipelines.driver.time_left import TimeLeft
from pipelines.plan.subject_checks import SubjectCheck
from pipelines.tasks import Message, Progress, State

PLAIN_LINE_SECONDS = 10.0
_SHOWN_LANES = 12
_SHOWN_FAILURES = 5
_SHOWN_FAULTLESS = 20
"""Largest batch whose subjects are all listed; of a larger one, only those with errors or warnings."""


def checks_table(checks: Sequence[SubjectCheck]) -> RenderableType:
    """The checks of a batch's subjects: ready ones, errors and warnings."""
    invalid = sum(bool(check.errors) for check in checks)
    doubtful = sum(bool(check.warnings) for check in checks)
    title = f"{counted(len(checks), 'subject')} checked: {invalid} with errors, {doubtful} with warnings"
    table = Table("subject", "class noun", "[V]", "images", "findings", box=None)
    for check in checks:
        if not (check.errors or check.warnings) and len(checks) > _SHOWN_FAULTLESS:
            continue
        subject = check.plan.config.subject if check.plan is not None else None
        findings = [Text(f"error: {without_credentials(error)}", style="red") for error in check.errors]
        findings += [Text(f"warning: {without_credentials(warning)}", style="yellow") for warning in check.warnings]
        table.add_row(
            Text(check.name),
            Text(subject.class_noun if subject else "–"),
            Text(str(subject.identifier) if subject else "–"),
            str(len(check.plan.images)) if check.plan is not None else "–",
            Text("\n").join(findings) if findings else Text("ready", style="green"),
        )
    return Group(Text(title, style="bold"), table) if table.row_count else Text(title, style="bold")


class BatchView:
    """Prints to stderr; `quiet` prints nothing but warnings. `clock` gives seconds."""

    def __init__(
        self,
        *,
        total: int,
        quiet: bool = False,
        console: Console | None = None,
        clock: Callable[[], float] | None = None,
    ) -> None:
        self._console = console or Console(stderr=True, highlight=False)
        self.total, self._quiet = total, quiet
        self._clock = clock or time.monotonic
        self._began = self._clock()
        self._printed = self._began - PLAIN_LINE_SECONDS
        self._settled: int | None = None
        self._time_left = TimeLeft(total)
        self._live: Live | None = None
        self._making, self._pace = RecentRate(), 0.0

    def __enter__(self) -> Self:
        """Show the table on a terminal."""
        if self._console.is_terminal and not self._quiet:
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Keep the last table on screen."""
        if self._live is not None:
            self._live.__exit__(kind, error, trace)
            self._live = None

    def seconds(self) -> float:
        """Seconds since the view was made."""
        return self._clock() - self._began

    def update(
        self,
        counts: Mapping[State, int],
        running: Mapping[str, Progress],
        *,
        class_images: tuple[int, int] | None,
        failures: Sequence[tuple[str, str]],
    ) -> None:
        """Show subjects by state, those in lanes, class images (made, to make), and (name, reason) of failures."""
        settled = counts["done"] + counts["failed"]
        if class_images is not None:
            self._pace = self._making.update(self._clock(), class_images[0])
        left = self._time_left.update(self._clock(), counts, running, class_images)
        if self._live is not None:
            self._live.update(self._table(counts, running, class_images, failures, left))
        elif not self._quiet:
            self._plain(counts, running, class_images, settled, left)
        self._settled = settled

    def line(self, text: str) -> None:
        """One plain line, with the seconds since the start."""
        if not self._quiet:
            self._console.print(Text(f"[{self.seconds():5.0f} s] {text}"), soft_wrap=True)

    def message(self, name: str, message: Message) -> None:
        """Print a lane's warnings; progress comes with `update`."""
        if message["kind"] == "warning":
            self.warn(f"{name}: {message['text']}")

    def warn(self, text: str) -> None:
        """Print a warning."""
        self._console.print(Text(f"warning: {without_credentials(text)}", style="yellow"), soft_wrap=True)

    def _plain(
        self,
        counts: Mapping[State, int],
        running: Mapping[str, Progress],
        class_images: tuple[int, int] | None,
        settled: int,
        left: float | None,
    ) -> None:
        now = self._clock()
        if settled == self._settled and now - self._printed < PLAIN_LINE_SECONDS:
            return
        self._printed = now
        evaluated = sum(progress.pictures is not None for progress in running.values())
        training = f"{len(running) - evaluated} in training"
        training += f" at {_speed(running):.1f} images/s" if len(running) > evaluated else ""
        parts = [f"{counts['done']}/{self.total} done", training]
        parts += [f"{evaluated} in evaluation"] if evaluated else []
        parts += [f"{counts['failed']} failed"] if counts["failed"] else []
        parts += [self._made(*class_images)] if class_images else []
        parts += [f"{_clock(left)} left"] if left is not None else []
        self.line(", ".join(parts))

    def _made(self, made: int, total: int) -> str:
        return f"class images {made}/{total}{f' at {self._pace:.1f} images/s' if self._pace else ''}"

    def _table(
        self,
        counts: Mapping[State, int],
        running: Mapping[str, Progress],
        class_images: tuple[int, int] | None,
        failures: Sequence[tuple[str, str]],
        left: float | None,
    ) -> RenderableType:
        head = "  ".join(f"{count} {state}" for state, count in counts.items() if count)
        times = f"{_clock(self.seconds())} so far" + (f", {_clock(left)} left" if left else "")
        parts: list[RenderableType] = [
            Text.assemble((f"{counted(self.total, 'subject')}: ", "bold"), head, "   ", (times, "dim")),
            ProgressBar(total=self.total, completed=counts["done"] + counts["failed"], width=60),
        ]
        if class_images is not None and class_images[0] < class_images[1]:
            parts.append(Text(self._made(*class_images)))
        if running:
            lanes = Table("subject", "step", "loss", "images/s", box=None)
            for name, progress in list(running.items())[:_SHOWN_LANES]:
                lanes.add_row(name, *_cells(progress))
            more = len(running) - _SHOWN_LANES
            lanes.add_row(
                *(f"and {more} more" if more > 0 else "in all", "", "", f"{_speed(running):.1f}"), style="dim"
            )
            parts.append(lanes)
        parts += [Text(f"failed: {name}: {reason}", style="red") for name, reason in failures[-_SHOWN_FAILURES:]]
        return Group(*parts)


def _cells(progress: Progress) -> tuple[str, str, str]:
    if progress.pictures is not None:
        return "evaluation", "{}/{}".format(*progress.pictures), ""
    return f"{progress.step}/{progress.steps}", f"{progress.loss:.3f}", f"{progress.images_per_second:.1f}"


def _speed(running: Mapping[str, Progress]) -> float:
    return sum(progress.images_per_second for progress in running.values() if progress.pictures is None)


def _clock(seconds: float) -> str:
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"
