"""What the driver does with what workers tell: a bar for the person, curves and pictures for MLflow."""

import io
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from types import TracebackType
from typing import Any, Self

from PIL import Image

from dreambooth.config import DreamBoothConfig
from pipelines.console import RunConsole, Update
from pipelines.events import Message
from pipelines.tracked_run import TrackedRun


class Follower:
    """Follows one subject's training. `milestones` maps a phase (and "first_step") to the time it was reached."""

    def __init__(self, run: TrackedRun, console: RunConsole, config: DreamBoothConfig) -> None:
        self.milestones: dict[str, float] = {}
        self._run = run
        self._console = console
        self._steps = config.train.max_train_steps
        self._warned = False
        self._stack = ExitStack()
        self._update: Update = lambda done, total, note: None

    def __enter__(self) -> Self:
        """Show the bar."""
        self._update = self._stack.enter_context(self._console.bar("training"))
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the bar away."""
        self._stack.close()

    def handle(self, message: Message) -> None:
        """Take one message of a worker."""
        if message["kind"] == "step":
            self._step(message["metrics"])
        elif message["kind"] == "phase":
            self.milestones.setdefault(message["phase"], message["time"])
            if message["phase"] == "training":
                self._began(message["start"], message["workers"], message["asked"])
        elif message["kind"] == "score":
            log_score(self._run, message["score"])
        elif message["kind"] == "samples":
            self._samples(message["step"], message["images"])

    def warn(self, error: Exception) -> None:
        """Say once that something could not be followed; what is missing is made up for by `complete`."""
        if not self._warned:
            self._console.warn(
                f"training goes on, but its curves can't be written now: {type(error).__name__}: {error}"
            )
        self._warned = True

    def _began(self, start: int, workers: int, asked: int) -> None:
        fewer = f" with {workers} of {asked} workers" if workers < asked else ""
        if start or fewer:
            whence = f"from the checkpoint of step {start}" if start else "from the beginning"
            self._console.line(f"going on {whence}{fewer}")

    def _step(self, metrics: dict[str, Any]) -> None:
        self.milestones.setdefault("first_step", time.time())
        step = int(metrics["step"])
        note = f"loss {metrics['loss']:.3f}  {metrics['images_per_second']:.1f} images/s"
        self._update(step, self._steps, note)
        log_step(self._run, metrics)

    def _samples(self, step: int, images: list[bytes]) -> None:
        for index, image in enumerate(images):
            self._run.log_image(Image.open(io.BytesIO(image)), f"validation/{index}", step)


def complete_curves(
    run: TrackedRun, history: Sequence[Mapping[str, float]], scores: Sequence[Mapping[str, float]]
) -> None:
    """Give MLflow the points that it lacks: a lane's, those of a driver that died, or that found no server."""
    for name, points, log in (("loss", history, log_step), ("score/total", scores, log_score)):
        known = run.logged_steps(name) if points else set()
        for point in points:
            if int(point["step"]) not in known:
                log(run, point)


def log_step(run: TrackedRun, metrics: Mapping[str, float]) -> None:
    """Add a step's metrics to their curves."""
    run.log_metrics({name: value for name, value in metrics.items() if name != "step"}, int(metrics["step"]))


def log_score(run: TrackedRun, score: Mapping[str, float]) -> None:
    """Add a score to its curves."""
    curves = {"score/total": score["score"], "score/dino": score["dino"], "score/clip_t": score["clip_t"]}
    run.log_metrics(curves, int(score["step"]))
