"""A training's history, and the protocol of its checkpoints."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

from dreambooth.training.best_checkpoint import Scores

_PROGRESS = "progress.json"


@dataclass(kw_only=True)
class History:
    """The history of a run, part of every checkpoint, so a resumed run ends with the whole."""

    step: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    scores: Scores = field(default_factory=Scores)

    def save(self, folder: Path) -> None:
        """Write the history into a checkpoint's folder."""
        scores = [score.as_dict() for score in self.scores.measured]
        progress = {"step": self.step, "metrics": self.metrics, "scores": scores}
        Path(folder, _PROGRESS).write_text(json.dumps(progress))
        self.scores.save(folder)

    @classmethod
    def load(cls, folder: Path) -> "History":
        """Load a history written by `save`."""
        progress = json.loads(Path(folder, _PROGRESS).read_text())
        scores = Scores.load(folder, progress["scores"])
        return cls(step=progress["step"], metrics=progress["metrics"], scores=scores)


class Checkpoints(Protocol):
    """Checkpoints of a worker group. Both methods are collective."""

    def restore(self, engine: Any) -> History:
        """Load the newest checkpoint into the engine; an empty history where there is none."""

    def save(self, engine: Any, history: History) -> None:
        """Write a checkpoint."""
