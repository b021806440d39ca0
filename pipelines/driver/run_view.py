"""The view of a run: one bar at a time (class images, training, samples) and a few lines."""

import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Self

from pipelines.driver.clock import Milestones
from pipelines.driver.console import RunConsole
from pipelines.driver.recent_rate import RecentRate
from pipelines.driver.relay import Update
from pipelines.tasks import Message, Progress, State

_SECOND = "training, second stage"
_TITLES = {"measuring": "protocol samples", "evaluating": "evaluation samples"}


class RunView:
    """The view of a batch of one; it records milestones."""

    def __init__(self, console: RunConsole, steps: int, second_steps: int = 0) -> None:
        """`steps` are those of training, `second_steps` those of a second stage."""
        self.milestones = Milestones()
        self._console, self._steps, self._second_steps = console, steps, second_steps
        self._pictures = "samples"
        self._sampled: tuple[int, int] | None = None
        self._bar: tuple[str, Update] | None = None
        self._open = ExitStack()
        self._class_images: tuple[int, int] | None = None
        self._making = RecentRate()

    def __enter__(self) -> Self:
        """Show nothing yet."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Remove the last bar."""
        self._open.close()

    def update(
        self,
        counts: Mapping[State, int],
        running: Mapping[str, Progress],
        *,
        class_images: tuple[int, int] | None,
        failures: Sequence[tuple[str, str]],
    ) -> None:
        """Show the progress of class images and of the evaluation."""
        if class_images is not None and class_images != self._class_images:
            self._class_images = class_images
            speed = self._making.update(time.monotonic(), class_images[0])
            self._show("class images", *class_images, f"{speed:.1f} images/s" if speed else "images")
        for progress in running.values():
            # A set's last count stays until the next one's first.
            if progress.pictures is not None and progress.pictures != self._sampled:
                self._sampled = progress.pictures
                self._show(self._pictures, *progress.pictures, "images")

    def message(self, name: str, message: Message) -> None:
        """Show a step or another report of a lane."""
        self.milestones.take(message)
        if message["kind"] == "step":
            metrics = message["metrics"]
            note = f"loss {metrics['loss']:.3f}  {metrics['images_per_second']:.1f} images/s"
            title, steps = ("training", self._steps) if "stage" not in message else (_SECOND, self._second_steps)
            self._show(title, int(metrics["step"]), steps, note)
        elif message["kind"] == "warning":
            self._console.warn(message["text"])
        elif message["kind"] == "phase":
            self._pictures = _TITLES.get(message["phase"], self._pictures)
            if message["phase"] == "loading":
                self._console.line("loading the base model")
            elif message["phase"] == "training":
                self._began(message["start"], message["workers"], message["asked"], second="stage" in message)

    def line(self, text: str) -> None:
        """Print a line."""
        self._console.line(text)

    def _began(self, start: int, workers: int, asked: int, *, second: bool) -> None:
        fewer = f" with {workers} of {asked} workers" if workers < asked else ""
        if start or fewer:
            whence = f"from the checkpoint of step {start}" if start else "from the beginning"
            self._console.line(f"{'second stage: ' if second else ''}continuing {whence}{fewer}")

    def _show(self, title: str, done: int, total: int, note: str) -> None:
        if self._bar is None or self._bar[0] != title:
            self._open.close()
            self._bar = title, self._open.enter_context(self._console.bar(title))
        self._bar[1](done, total, note)
