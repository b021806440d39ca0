"""Train one stage of a subject after that of another: the base model and class latents stay in memory."""

import logging
from collections.abc import Callable

from dreambooth.models.base_model import BaseModel
from pipelines.cluster.logs import log
from pipelines.cluster.preemption import notice
from pipelines.tasks import TrainTask
from pipelines.worker.bases import Bases
from pipelines.worker.checkpoint_hook import Report
from pipelines.worker.checkpoints import checkpoints_of
from pipelines.worker.fine_tune import fine_tune
from pipelines.worker.graphs import Graphs
from pipelines.worker.publish import TrainedStage, published_weights
from pipelines.worker.train_data import ClassLatents


class StageTraining:
    """A lane's training of base models or, with `scales_up`, of second stages of cascades."""

    def __init__(self, device: str, rank: int, *, scales_up: bool = False) -> None:
        self._device, self._rank = device, rank
        self._bases = Bases(scales_up=scales_up)
        self._class_latents = ClassLatents()
        self._graphs = Graphs()

    def base(self, task: TrainTask) -> BaseModel:
        """Load the base model of a task. Raises RuntimeError if its hash is another."""
        return self._bases.get(task)

    def make_room(self, needed: int) -> None:
        """Free the captured step unless the GPU has room for `needed` bytes, those of it and of other work."""
        self._graphs.make_room(self._device, needed)

    def train(
        self, task: TrainTask, report: Report, stopping: Callable[[], bool], first: TrainedStage | None = None
    ) -> TrainedStage:
        """Fine-tune a copy of a task's base model, see `fine_tune`; `first` is the stage trained before it."""
        from dreambooth.training.model import build_model
        from pipelines.worker.fidelity import FirstStage

        def warn(text: str) -> None:
            if self._rank == 0:
                log("warning", level=logging.WARNING, text=text)
            report({"kind": "warning", "text": text})

        base, autocast = self.base(task), task.config.train.mixed_precision == "bf16"
        model = build_model(self._bases.components.copied(), task.config, autocast=autocast)
        checkpoints = checkpoints_of(task, warn)
        tuned = fine_tune(
            task,
            base,
            model,
            self._device,
            checkpoints,
            report,
            stopping,
            notice(),
            self._class_latents,
            self._bases.text_encoders,
            self._graphs,
            None if first is None else FirstStage(task=first.task, published=lambda: published_weights([first])),
        )
        return TrainedStage(task=task, base=base, tuned=tuned)
