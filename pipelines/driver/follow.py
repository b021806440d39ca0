"""What the driver does with what workers tell: a bar for the person, curves and pictures for MLflow."""

import io
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from types import TracebackType
from typing import Any, Self

from PIL import Image

from dreambooth.config.settings import DreamBoothConfig
from pipelines.cluster.events import Message
from pipelines.driver.console import RunConsole
from pipelines.driver.relay import Update
from pipelines.storage.publications import filesystem, join, write_bytes
from pipelines.tracking.tracked_run import TrackedRun


class Follower:
    """Follows the training of a plan's `key`.

    `milestones` maps a phase (and "first_step") to the time it was reached.
    """

    def __init__(self, run: TrackedRun, console: RunConsole, config: DreamBoothConfig, key: str) -> None:
        self.milestones: dict[str, float] = {}
        self._run = run
        self._console = console
        self._steps = config.train.max_train_steps
        self._folder = validation_folder(config, key)
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
            self._log(score_point(message["score"]))
        elif message["kind"] == "samples":
            self._samples(message["step"], message["images"])

    def warn(self, error: Exception) -> None:
        """Say once that something could not be followed; what is missing is made up for by `complete`."""
        if not self._warned:
            self._console.warn(f"training goes on, but it can't be followed now: {type(error).__name__}: {error}")
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
        self._log(step_point(metrics))

    def _log(self, point: tuple[int, Mapping[str, float]]) -> None:
        step, metrics = point
        self._run.log_metrics(metrics, step)

    def _samples(self, step: int, images: list[bytes]) -> None:
        for index, image in enumerate(images):
            if not self._run.behind:
                self._run.log_image(Image.open(io.BytesIO(image)), f"validation/{index}", step)
            write_bytes(join(self._folder, f"{step:08d}-{index}.png"), image)


def validation_folder(config: DreamBoothConfig, key: str) -> str:
    """Where the validation pictures of a plan's key lie, named STEP-NUMBER.png."""
    return join(config.run_uri, "validation", key)


def complete_curves(
    run: TrackedRun, history: Sequence[Mapping[str, float]], scores: Sequence[Mapping[str, float]]
) -> None:
    """Give MLflow the points that it lacks: a lane's, those of a driver that died, or that found no server."""
    for curve, points in (("loss", [step_point(one) for one in history]), ("score/total", [*map(score_point, scores)])):
        if points:
            run.log_missing(curve, points)


def complete_pictures(run: TrackedRun, config: DreamBoothConfig, key: str) -> None:
    """Give MLflow the validation pictures that it lacks."""
    fs, path = filesystem(validation_folder(config, key))
    try:
        names = [name for name in fs.ls(path, detail=False) if name.endswith(".png")]
    except (FileNotFoundError, NotADirectoryError):
        return

    def open_picture(name: str) -> Image.Image:
        return Image.open(io.BytesIO(fs.cat_file(name)))

    pictures = {}
    for name in sorted(names):
        step, _, index = name.rsplit("/", 1)[-1].removesuffix(".png").partition("-")
        pictures[f"validation/{index}", int(step)] = partial(open_picture, name)
    run.log_missing_images(pictures)


def step_point(metrics: Mapping[str, float]) -> tuple[int, dict[str, float]]:
    """The step of a step's metrics, and what its curves get."""
    return int(metrics["step"]), {name: value for name, value in metrics.items() if name != "step"}


def score_point(score: Mapping[str, float]) -> tuple[int, dict[str, float]]:
    """The step of a score, and what its curves get."""
    curves = {"score/total": score["score"], "score/dino": score["dino"], "score/clip_t": score["clip_t"]}
    return int(score["step"]), curves
