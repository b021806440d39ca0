"""Send a subject's progress and messages from a lane to the queue, without waiting for it."""

import dataclasses
import time
from collections import deque
from typing import Any

from pipelines.tasks import Message, Progress, TrainTask
from pipelines.worker.hooks import Stopped

_MOST_MESSAGES = 100
"""Steps per report; further ones reach MLflow when the subject is published."""


class QueueCaller:
    """Calls to the queue's actor, repeated if its node dies."""

    def __init__(self, actor: Any) -> None:
        self._actor = actor

    def call(self, method: str, *arguments: Any, **keywords: Any) -> Any:
        """Call and wait for the answer."""
        import ray

        return ray.get(getattr(self._actor, method).remote(*arguments, **keywords))

    def start(self, method: str, *arguments: Any) -> Any:
        """Call without waiting."""
        return getattr(self._actor, method).remote(*arguments)


class Reports:
    """Reports of one subject, on rank 0. Steps are bundled every few seconds, other messages are sent at once.

    Steps of a second stage, whose messages have a `stage`, count after those of the first.
    """

    def __init__(self, queue: QueueCaller, task: TrainTask, every_seconds: float) -> None:
        steps = [stage.config.train.max_train_steps for stage in task.stages]
        self._queue, self._name, self._every_seconds = queue, task.config.subject.name, every_seconds
        self._progress = Progress(step=0, steps=sum(steps), images_per_second=0.0, loss=0.0)
        self._of_first = steps[0]
        self._messages: deque[Message] = deque(maxlen=_MOST_MESSAGES)
        self._sent = 0.0
        self._answer: Any = None
        self._stop = False

    def report(self, message: Message) -> None:
        """Report an event."""
        self._messages.append({"time": time.time()} | message)
        before = self._of_first if "stage" in message else 0
        if message["kind"] != "step":
            if "start" in message:  # where a resumed training starts
                self._progress = dataclasses.replace(self._progress, step=before + int(message["start"]))
            self._send()
            return
        metrics = message["metrics"]
        self._progress = dataclasses.replace(
            self._progress,
            step=before + int(metrics["step"]),
            images_per_second=metrics["images_per_second"],
            loss=metrics["loss"],
        )
        self._send_when_due()

    def report_pictures(self, made: int, total: int) -> None:
        """Report the evaluation's progress. Raises Stopped when asked to stop."""
        step = self._progress.step or self._progress.steps  # nothing to report for a model trained earlier
        self._progress = dataclasses.replace(self._progress, step=step, pictures=(made, total))
        self._send_when_due()
        if made < total and self.stopping():
            raise Stopped(f"stopped at picture {made} of the evaluation")

    def stopping(self) -> bool:
        """Whether to stop, as far as the queue has answered."""
        import ray

        if self._answer is not None and ray.wait([self._answer], timeout=0)[0]:
            self._stop = self._stop or bool(ray.get(self._answer))
            self._answer = None
        return self._stop

    def _send_when_due(self) -> None:
        if time.monotonic() - self._sent >= self._every_seconds:
            self._send()

    def _send(self) -> None:
        self.stopping()  # read the last answer before replacing it: steps may be slower than reports
        self._sent, messages = time.monotonic(), tuple(self._messages)
        self._messages.clear()
        self._answer = self._queue.start("progress", self._name, self._progress, messages)
