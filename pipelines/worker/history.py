"""A training's history, and the protocol of its checkpoints."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from dreambooth.training.best_checkpoint import Scores
from pipelines.worker.behind import Behind

if TYPE_CHECKING:
    from dreambooth.training.checkpoint_files import CheckpointFile, Sink

_PROGRESS = "progress.json"


@dataclass(kw_only=True)
class History:
    """The history of a run, part of every checkpoint, so a resumed run ends with the whole."""

    step: int = 0
    metrics: list[dict[str, float]] = field(default_factory=list)
    scores: Scores = field(default_factory=Scores)

    def files(self) -> "list[CheckpointFile]":
        """A checkpoint's files of the history up to now."""
        from dreambooth.training.checkpoint_files import CheckpointFile

        scores = [score.as_dict() for score in self.scores.measured]
        progress = {"step": self.step, "metrics": list(self.metrics), "scores": scores}
        return [CheckpointFile(name=_PROGRESS, content=progress, write=_write_json), *self.scores.files()]

    @classmethod
    def load(cls, folder: Path) -> "History":
        """Load a history from a checkpoint's folder."""
        progress = json.loads(Path(folder, _PROGRESS).read_text())
        scores = Scores.load(folder, progress["scores"])
        return cls(step=progress["step"], metrics=progress["metrics"], scores=scores)


def _write_json(content: Any, file: "Sink") -> None:
    file.write(json.dumps(content).encode())


class Checkpoints(Protocol):
    """Checkpoints of a worker group. Both methods are collective."""

    def restore(self, engine: Any) -> History:
        """Load the newest checkpoint into the engine; an empty history where there is none."""

    def begin(self, engine: Any, history: History) -> Behind:
        """Begin a checkpoint, which is written behind the training; the one before has ended.

        It ends on every rank in the same way: whole, or with the same error.
        """
