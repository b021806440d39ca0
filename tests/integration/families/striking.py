"""Kill the worker of a run at chosen moments, and train the same without a fault, to compare."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest
import torch

from dreambooth.config.settings import DreamBoothConfig
from pipelines.cluster.preemption import WATCHER_SWITCH
from pipelines.cluster.ray_cluster import Resources
from pipelines.driver import single
from pipelines.driver.run_view import RunView
from pipelines.driver.train_stage import train_task
from pipelines.plan.run_plan import make_plan
from pipelines.stages.prior_stage import prior_set
from pipelines.tasks import Message
from pipelines.worker.publish import TrainedStage
from pipelines.worker.stage_training import StageTraining

FOUR_CPUS = Resources(cpus=4, gpus=0)
Moment = Callable[[Message], bool]


@contextmanager
def struck(*moments: Moment) -> Iterator[list[Message]]:
    """Kill a run's worker at each of these moments, in order; gives the messages that say where training began."""
    waiting, starts = list(moments), list[Message]()

    class Striking(RunView):
        lately = False
        """Whether training has begun since the last kill: what was on its way then is of no moment."""

        def message(self, name: str, message: Message) -> None:
            super().message(name, message)
            if message["kind"] == "phase" and message["phase"] == "training":
                starts.append(message)
                self.lately = True
            if waiting and self.lately and waiting[0](message):
                waiting.pop(0)
                [worker] = _workers()
                worker.kill()
                self.lately = False

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(single, "RunView", Striking)
        yield starts
    assert not waiting, f"{len(waiting)} of {len(moments)} moments never came"


def _workers() -> list[psutil.Process]:
    found = []
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.NoSuchProcess):
            if "RayTrainWorker" in " ".join(process.cmdline()):
                found.append(process)
    return found


def after_step(step: int, *, stage: str | None = None) -> Moment:
    """The first message of a later step than this one, in a stage of a cascade if it has two.

    A checkpoint of this step may not be whole by then, but the one before it is.
    """
    return lambda message: (
        message["kind"] == "step" and message.get("stage") == stage and message["metrics"]["step"] > step
    )


def at_start_of(stage: str) -> Moment:
    """When a stage begins at its first step."""
    return lambda message: (
        message["kind"] == "phase" and message["phase"] == "training" and message.get("stage") == stage
    )


def trained_calmly(config: DreamBoothConfig, folder: Path) -> list[TrainedStage]:
    """Both stages of a cascade, or the only one, trained here as a lane's worker does."""
    storage = config.storage.model_copy(update={"run": str(folder)})
    plan = make_plan(config.model_copy(update={"storage": storage}), FOUR_CPUS)
    assert plan.prior is not None
    task, threads = train_task(plan, prior_set(config.prior_uri, plan.prior)), torch.get_num_threads()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(WATCHER_SWITCH, "0")
        torch.set_num_threads(config.cluster.cpus_per_worker)
        trained: list[TrainedStage] = []
        try:
            for place, one in enumerate(task.stages):
                stage = StageTraining("cpu", 0, scales_up=place == 1)
                trained.append(stage.train(one, lambda message: None, lambda: False, trained[0] if place else None))
        finally:
            torch.set_num_threads(threads)
    return trained
