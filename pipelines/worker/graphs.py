"""The captured step that a lane keeps from one subject to the next."""

from collections.abc import Callable
from typing import Any

from dreambooth.training.graphable import why_not_graphed
from pipelines.cluster.logs import log
from pipelines.cluster.processor import make_room
from pipelines.tasks import TrainTask


def _say(reason: str) -> None:
    log("not graphed", reason=reason)


class Graphs:
    """Engines with `train.graph`, whose step is captured once for subjects of one base model and equal settings.

    `say` takes the reason where one can't be captured; the default writes it into the log.
    """

    def __init__(self, say: Callable[[str], None] = _say) -> None:
        self._say = say
        self._of: Any = None
        self._step: Any = None

    def engine(self, model: Any, task: TrainTask, device: str, workers: int, *, sizes: int = 1) -> Any:
        """An engine that captures its step; None, after a word to `say`, where that can't be.

        `sizes` counts those of the instance images.
        """
        from dreambooth.training.graphed_engine import FixedStep, GraphedEngine

        config = task.config
        if config.train.graph == "off":
            self.forget()
            return None
        why = None if task.engine == "torch" else f"engine is {task.engine}"
        why = why or why_not_graphed(config.train, device, workers, sizes=sizes)
        if why is not None:
            self.forget()
            self._say(why)
            return None
        of = (task.base_hash, config.train, config.images.resolution, config.prior.prior_loss_weight)
        if of != self._of:
            self.forget()
            self._of, self._step = of, FixedStep(device, self._say)
        return GraphedEngine(model, config.train, device, self._step)

    def make_room(self, device: str, needed: int) -> None:
        """Forget the captured step unless the GPU has room for `needed` bytes, those of it and of other work."""
        if self._step is not None:
            make_room(device, needed, self.forget)

    def forget(self) -> None:
        """Free the memory of the last subject."""
        self._of = self._step = None
