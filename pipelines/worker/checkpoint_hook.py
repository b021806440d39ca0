"""When a checkpoint is written: a hook of the training loop, which goes on meanwhile."""

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dreambooth.config.train import TrainConfig
from pipelines.tasks import Message
from pipelines.worker.behind import Behind
from pipelines.worker.history import Checkpoints, History

if TYPE_CHECKING:
    from dreambooth.training.loop import StepMetrics

Report = Callable[[Message], None]


class Checkpoint:
    """Begins a checkpoint every so many steps and minutes of `train`, and writes one whenever `save` is called.

    One at a time is written. If another is due meanwhile, it waits for the end of the one before, and training doesn't.
    `any_rank` is collective: True on every rank if its argument is True on any.
    """

    def __init__(
        self,
        checkpoints: Checkpoints,
        engine: Any,
        history: History,
        train: TrainConfig,
        report: Report,
        any_rank: Callable[[bool], bool],
    ) -> None:
        self._checkpoints, self._engine, self._history = checkpoints, engine, history
        self._train, self._report, self._any_rank = train, report, any_rank
        self._writing: Behind | None = None
        self._begun, self._due, self._reserved = 0, False, False
        self._since = time.monotonic()

    def on_step(self, step: int, metrics: "StepMetrics | None") -> None:
        """Begin one if due, except after the last step, when the model itself is written.

        Without metrics nobody knows that the loss is finite: then it is begun after the next step that has some.
        Raises what ended the one before.
        """
        if step == self._train.max_train_steps:
            return
        self._reserve()
        self._due = self._due or step % self._train.checkpoint_every == 0
        if metrics is None or (self._writing is not None and self._any_rank(not self._writing.ended)):
            return
        self.settle()
        if self._due or self._minutes_are_over():
            self._begin(step)

    def save(self, step: int) -> None:
        """Write this step's checkpoint, unless it exists, and wait until it is whole."""
        self.settle()
        if step != self._begun:
            self._begin(step)
            self.settle()

    def settle(self) -> None:
        """Wait until the checkpoint that is being written is whole. Raises what ended it."""
        writing, self._writing = self._writing, None
        if writing is not None:
            writing.result()
            self._report({"kind": "checkpoint", "step": self._begun, "seconds": writing.seconds})

    def abandon(self) -> None:
        """Wait for the end of the checkpoint that is being written, whether it fails or not."""
        if self._writing is not None:
            self._writing.wait()
            self._writing = None

    def _begin(self, step: int) -> None:
        self._begun, self._due, self._since = step, False, time.monotonic()
        self._writing = self._checkpoints.begin(self._engine, self._history)

    def _minutes_are_over(self) -> bool:
        """Whether a checkpoint is due by the time, on rank 0's clock. Collective, if there is such an interval."""
        minutes = self._train.checkpoint_every_minutes
        if minutes is None:
            return False
        return self._any_rank(self._engine.rank == 0 and time.monotonic() - self._since >= 60 * minutes)

    def _reserve(self) -> None:
        """Reserve memory for the first checkpoint, once there is an optimizer's state and if one will come."""
        train = self._train
        comes = train.checkpoint_every < train.max_train_steps or train.checkpoint_every_minutes is not None
        if comes and not self._reserved:
            self._engine.reserve_snapshot()
        self._reserved = True
