"""Send curves and pictures to MLflow, during training and at the end."""

import io
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from types import TracebackType
from typing import Self

from PIL import Image

from dreambooth.config.settings import DreamBoothConfig
from pipelines.plan.run_plan import Plan
from pipelines.report.by_step import find_pictures, validation_folder
from pipelines.storage.files import join, read_bytes, write_bytes
from pipelines.tasks import Message
from pipelines.tracking.tracked_run import TrackedRun

_FIRST = "train"
"""What the curves of a subject's first or only stage are named for."""


class Curves:
    """Writes lanes' reports of subjects to MLflow; `begin` starts a subject's run there.

    If `begin` returns None or a message is lost, the missing points are added when the subject is concluded.
    """

    def __init__(self, begin: Callable[[Plan], TrackedRun | None]) -> None:
        self._begin = begin
        self._runs: dict[str, TrackedRun] = {}

    def __enter__(self) -> Self:
        """Start without runs."""
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """End the runs of unconcluded subjects."""
        for run in self._runs.values():
            run.end("KILLED")

    def take(self, plan: Plan, message: Message) -> None:
        """Write a lane's message to MLflow."""
        if message["kind"] not in ("step", "score", "samples"):
            return
        if message["kind"] == "samples":
            for index, image in enumerate(message["images"]):
                write_bytes(
                    join(validation_folder(plan.config.run_uri, plan.key), f"{message['step']:08d}-{index}.png"), image
                )
        run = self._run(plan)
        if run is None or run.behind:
            return
        if message["kind"] == "samples":
            for index, image in enumerate(message["images"]):
                run.log_image(Image.open(io.BytesIO(image)), f"validation/{index}", message["step"])
            return
        stage = message.get("stage")
        step = message["kind"] == "step"
        point = step_point(message["metrics"], stage) if step else score_point(message["score"], stage)
        run.log_metrics(point[1], point[0])

    def leave(self, name: str) -> None:
        """Flush a subject's points before it is concluded in the same run."""
        if (run := self._runs.pop(name, None)) is not None:
            run.flush()

    def failed(self, names: Iterable[str]) -> None:
        """End the runs of subjects that were set aside."""
        for name in names:
            if (run := self._runs.pop(name, None)) is not None:
                run.end("FAILED")

    def _run(self, plan: Plan) -> TrackedRun | None:
        name = plan.config.subject.name
        if name not in self._runs and (run := self._begin(plan)) is not None:
            self._runs[name] = run
        return self._runs.get(name)


def complete_curves(
    run: TrackedRun,
    history: Sequence[Mapping[str, float]],
    scores: Sequence[Mapping[str, float]],
    stage: str | None = None,
) -> None:
    """Send missing points to MLflow: of a lane, of a driver that died or found no server."""
    steps = [step_point(one, stage) for one in history]
    points = {f"{stage or _FIRST}/loss": steps, f"{_scores(stage)}/total": [score_point(one, stage) for one in scores]}
    for curve, found in points.items():
        if found:
            run.log_missing(curve, found)


def complete_pictures(run: TrackedRun, config: DreamBoothConfig, key: str) -> None:
    """Send missing validation pictures to MLflow."""

    def open_picture(address: str) -> Image.Image:
        return Image.open(io.BytesIO(read_bytes(address)))

    found = find_pictures(config.run_uri, key)
    if found:
        run.log_missing_images(
            {
                (f"validation/{number}", step): partial(open_picture, address)
                for step, numbers in found.items()
                for number, address in numbers.items()
            }
        )


def step_point(metrics: Mapping[str, float], stage: str | None = None) -> tuple[int, dict[str, float]]:
    """The step of a training step's message, and its points by curve: train/loss; a further stage has its own name."""
    curves = {f"{stage or _FIRST}/{name}": value for name, value in metrics.items() if name != "step"}
    return int(metrics["step"]), curves


def score_point(score: Mapping[str, float], stage: str | None = None) -> tuple[int, dict[str, float]]:
    """The step of a score's message, and its points by curve: score/total, below a further stage's own name."""
    curves = {"total": score["score"], "dino": score["dino"], "clip_t": score["clip_t"]}
    return int(score["step"]), {f"{_scores(stage)}/{name}": value for name, value in curves.items()}


def _scores(stage: str | None) -> str:
    """What the curves of a stage's scores are named for."""
    return "score" if stage is None else f"{stage}/score"
